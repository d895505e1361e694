"""What a task's data looks like: targets, samples, and a data set with its identity."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """One thing to predict from a sample.

    kind "class": `size` classes, labels 0..size-1, the model gives `size` logits. kind "value": `size` is 1 and the
    model gives value / `scale`. The scale is a public constant, never fitted on data, because a scaler fitted on a
    client's private samples would leak; metrics are in the value's own unit.
    """

    name: str
    kind: Literal["class", "value"]
    size: int
    scale: float = 1.0


@dataclass(frozen=True)
class Data:
    """n samples. x: float32 (n, *shape). y: for each target, int64 (n,) if it is a class, float32 (n,) if a value."""

    x: Tensor
    y: dict[str, Tensor]

    def __len__(self) -> int:
        return self.x.shape[0]

    def take(self, index: Tensor) -> "Data":
        """The samples at `index` (int64 (k,)), in that order, gathered into fresh tensors.

        Always a copy, even of everything: kernels choose their path by memory alignment, and a view's alignment would
        depend on where the samples lie, so that equal numbers could give unequal bits.
        """
        return Data(self.x.index_select(0, index), {k: v.index_select(0, index) for k, v in self.y.items()})


@dataclass(frozen=True)
class Dataset:
    """A data set: a training pool that is dealt to clients, and a global test set that no client has.

    `sha256` is the data's identity (`data_sha256`): every process of a run compares it before the first round.
    """

    name: str
    train: Data
    test: Data
    targets: tuple[Target, ...]
    sha256: str


def make_dataset(name: str, train: Data, test: Data, targets: tuple[Target, ...]) -> Dataset:
    """A data set with its identity computed."""
    return Dataset(name, train, test, targets, data_sha256(train, test))


def data_sha256(train: Data, test: Data) -> str:
    """SHA-256 over all arrays: for each of train/x, train/<target> in sorted order, test/x, test/<target>: the text
    "name:dtype:shape;" in UTF-8, then the array's little-endian bytes in C order."""
    digest = hashlib.sha256()
    for part, data in (("train", train), ("test", test)):
        for name, tensor in [("x", data.x), *sorted(data.y.items())]:
            array = tensor.contiguous().numpy()
            digest.update(f"{part}/{name}:{array.dtype.name}:{array.shape};".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def concatenate(parts: list[Data]) -> Data:
    """The samples of several Data with the same targets, one after another."""
    return Data(torch.cat([p.x for p in parts]), {k: torch.cat([p.y[k] for p in parts]) for k in parts[0].y})
