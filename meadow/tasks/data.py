"""What a task's data looks like: targets, samples, and a data set with its identity."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MISSING = -1
"""A class label that is not known. A missing number is NaN. Losses and metrics leave both out."""


@dataclass(frozen=True)
class Target:
    """One thing to predict from a sample.

    kind "class": one of `size` classes, labels 0..size-1. "labels": any of `size` labels at once. "value": a number,
    `size` is 1. "quantiles": the `quantiles` of a number's distribution, `size` of them. The model gives logits for the
    first two and (value - offset) / scale for the others. Scale, offset, weights and names are public constants, never
    fitted on data, because a scaler fitted on a client's private samples would leak; metrics are in the value's own
    unit. `weights`: of each class's loss, or of each label's positives (pos_weight); `balanced` instead lets each
    client weight by the inverse frequency in its own training data.
    """

    name: str
    kind: Literal["class", "labels", "value", "quantiles"]
    size: int
    scale: float = 1.0
    offset: float = 0.0
    quantiles: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    balanced: bool = False
    names: tuple[str, ...] = ()

    def known(self, y: Tensor) -> Tensor:
        """Where the target's values are not missing: bool, of the shape of `y`."""
        return y != MISSING if self.kind == "class" else ~torch.isnan(y)

    def labelled(self, y: Tensor) -> int:
        """How many samples have any value of the target."""
        return int(self.known(y).flatten(1).any(1).sum()) if y.ndim > 1 else int(self.known(y).sum())


@dataclass(frozen=True)
class Data:
    """n samples. x: (n, *shape), float32; uint8 for images as stored; int64 for tokens, 0 where there is none.

    y, for each target: int64 (n,) if it is a class, or (n, length) if there is one at each token; float32 (n, size) of
    0 and 1 for labels; float32 (n,) for values and quantiles.
    """

    x: Tensor
    y: dict[str, Tensor]

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.x.nbytes + sum(y.nbytes for y in self.y.values())

    def take(self, index: Tensor) -> "Data":
        """The samples at `index` (int64 (k,)), in that order, gathered into fresh tensors.

        Always a copy, even of everything: kernels choose their path by memory alignment, and a view's alignment would
        depend on where the samples lie, so that equal numbers could give unequal bits.
        """
        index = index.to(self.x.device)
        return Data(self.x.index_select(0, index), {k: v.index_select(0, index) for k, v in self.y.items()})

    def to(self, device: torch.device) -> "Data":
        """The same samples on a device; these themselves if they are there."""
        if self.x.device == device and all(y.device == device for y in self.y.values()):
            return self
        return Data(self.x.to(device), {name: y.to(device) for name, y in self.y.items()})


@dataclass(frozen=True)
class Dataset:
    """A data set: a training pool that is dealt to clients, and a global test set that no client has.

    `sha256` is the data's identity (`data_sha256`): every process of a run compares it before the first round.
    `owner`, where the data says whose each training sample is: int64 (n,), indices into `clients`, the sorted names.
    `tokens`: how many tokens there are if x are tokens, else 0. `images`: x are images, (n, channels, height, width).
    """

    name: str
    train: Data
    test: Data
    targets: tuple[Target, ...]
    sha256: str
    owner: npt.NDArray[np.int64] | None = None
    clients: tuple[str, ...] = ()
    tokens: int = 0
    images: bool = False


@dataclass(frozen=True)
class Part:
    """Samples as a format's reader gives them, before their targets are made numbers.

    x as in `Data`. `columns` holds what may be a target, raw, one array (n, ...) each: numbers (NaN where missing),
    strings ("" where missing), or 0/1 rows (n, labels). `client` names each sample's owner, where the data says it.
    `source` and `lines` (int64 (n,)) say in errors where a sample comes from.
    """

    x: Tensor
    columns: Mapping[str, npt.NDArray[Any]]
    client: npt.NDArray[Any] | None = None
    source: str = ""
    lines: npt.NDArray[np.int64] | None = None

    def take(self, index: npt.NDArray[np.int64]) -> "Part":
        """The samples at `index`, in that order."""
        return Part(
            self.x[torch.from_numpy(index)],
            {name: column[index] for name, column in self.columns.items()},
            None if self.client is None else self.client[index],
            self.source,
            None if self.lines is None else self.lines[index],
        )

    def where(self, row: int) -> str:
        """Where the sample in that row comes from."""
        place = f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"
        return f"{self.source}, {place}" if self.source else place


@dataclass(frozen=True)
class Raw:
    """A data set as a format's reader gives it. `test` None: `meadow.tasks.readers.datasets` holds out a share of `train`.

    `kinds`: the kinds (`meadow.tasks.targets`) of columns that the reader knows better than their values tell.
    """

    name: str
    train: Part
    test: Part | None
    kinds: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    images: bool = False


@dataclass(frozen=True)
class Inputs:
    """What a model is built for: the shape of one prepared sample, and how many tokens there are (0: no tokens)."""

    shape: tuple[int, ...]
    tokens: int = 0


def make_dataset(name: str, train: Data, test: Data, targets: tuple[Target, ...], **more: Any) -> Dataset:
    """A data set with its identity computed; `more`: the other fields of `Dataset`."""
    return Dataset(name, train, test, targets, data_sha256(train, test), **more)


def data_sha256(train: Data, test: Data) -> str:
    """SHA-256 over all arrays: for each of train/x, train/<target> in sorted order, test/x, test/<target>: the text
    "name:dtype:shape;" in UTF-8, then the array's little-endian bytes in C order."""
    digest = hashlib.sha256()
    for part, data in (("train", train), ("test", test)):
        for name, tensor in [("x", data.x), *sorted(data.y.items())]:
            array = tensor.contiguous().numpy()
            digest.update(f"{part}/{name}:{array.dtype.name}:{array.shape};".encode())
            digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def concatenate(parts: list[Data]) -> Data:
    """The samples of several Data with the same targets, one after another."""
    return Data(torch.cat([p.x for p in parts]), {k: torch.cat([p.y[k] for p in parts]) for k in parts[0].y})
