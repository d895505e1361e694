"""The data of a task: targets, samples, and data sets with their hash."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MISSING = -1
"""A missing class label; a missing number is NaN. Losses and metrics ignore both."""


@dataclass(frozen=True)
class Target:
    """One thing to predict from a sample.

    kind "class": one of `size` classes, labels 0..size-1. "labels": any of `size` labels at once. "value": a number,
    `size` is 1. "quantiles": the `quantiles` of a number's distribution, `size` of them. The model gives logits for the
    first two and (value - offset) / scale for the others; metrics are in the value's own unit. Scale, offset, weights and
    names are public constants, because constants fitted on private samples would leak. `weights`: of each class's loss, or
    of each label's positives (pos_weight); with `balanced` each client weights by inverse frequency in its training data.
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
        """Which values are not missing: bool, in the shape of `y`."""
        return y != MISSING if self.kind == "class" else ~torch.isnan(y)

    def labelled(self, y: Tensor) -> int:
        """The number of samples that have a value of the target."""
        return int(self.known(y).flatten(1).any(1).sum()) if y.ndim > 1 else int(self.known(y).sum())


@dataclass(frozen=True)
class Data:
    """n samples. x: (n, *shape), float32; uint8 for stored images; int64 for tokens, 0 as padding.

    y of each target: int64 (n,) for a class, or (n, length) for a class per token; float32 (n, size) of 0 and 1 for
    labels; float32 (n,) for values and quantiles.
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
        """The samples at `index` (int64 (k,)), in that order, as new tensors.

        Always a copy: kernels choose their path by memory alignment, so equal numbers in a view could give other bits.
        """
        index = index.to(self.x.device)
        return Data(self.x.index_select(0, index), {k: v.index_select(0, index) for k, v in self.y.items()})

    def to(self, device: torch.device) -> "Data":
        """The same samples on a device; itself if they are there already."""
        if self.x.device == device and all(y.device == device for y in self.y.values()):
            return self
        return Data(self.x.to(device), {name: y.to(device) for name, y in self.y.items()})


@dataclass(frozen=True)
class Dataset:
    """A data set: a training pool that is divided among the clients, and a global test set that no client has.

    `sha256`: the hash (`data_sha256`) that all processes of a run compare before round 1. `owner`: the client of each
    training sample, if the data has clients: int64 (n,), indices into `clients`, the sorted names. `tokens`: the
    vocabulary size if x are tokens, else 0. `images`: whether x are images, (n, channels, height, width).
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
    """Samples as a reader returns them, before their targets are encoded as numbers.

    x as in `Data`. `columns`: the possible targets, one raw array (n, ...) each: numbers (NaN if missing), strings ("" if
    missing), or rows of 0 and 1 (n, labels). `client`: the name of each sample's client, if the data has clients.
    `source` and `lines` (int64 (n,)) locate a sample in error messages.
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
        """The location of a sample, for error messages."""
        place = f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"
        return f"{self.source}, {place}" if self.source else place


@dataclass(frozen=True)
class Raw:
    """A data set as a reader returns it. `test` None: `meadow.tasks.readers.datasets` holds out a share of `train`.

    `kinds`: the kinds (`meadow.tasks.targets`) of columns that the reader knows; others are guessed from the values.
    """

    name: str
    train: Part
    test: Part | None
    kinds: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    images: bool = False


@dataclass(frozen=True)
class Inputs:
    """What a model is built for: the shape of one prepared sample, and the vocabulary size (0: not tokens)."""

    shape: tuple[int, ...]
    tokens: int = 0


def make_dataset(name: str, train: Data, test: Data, targets: tuple[Target, ...], **more: Any) -> Dataset:
    """A data set with its hash; `more`: the other fields of `Dataset`."""
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
    """Concatenate samples that have the same targets."""
    return Data(torch.cat([p.x for p in parts]), {k: torch.cat([p.y[k] for p in parts]) for k in parts[0].y})
