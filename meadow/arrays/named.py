"""Named arrays: what a model's state is between a file, a process and a sum."""

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.generic]]

BESIDE = "@"
"""In a name, between what an algorithm keeps or sends beside a model and the state name that it is of: "c@trunk.w"."""


def beside(kind: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """Arrays under the names of what goes beside a model: "w" as "kind@w"."""
    return {f"{kind}{BESIDE}{name}": value for name, value in arrays.items()}


def of_kind(kind: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """The inverse of `beside`: those of one kind, under the state names that they are of."""
    start = kind + BESIDE
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


def split_beside(arrays: Mapping[str, npt.NDArray[np.generic]]) -> tuple[Arrays, Arrays]:
    """Arrays divided into a model's own and those beside it."""
    own = {name: value for name, value in arrays.items() if BESIDE not in name}
    return own, {name: value for name, value in arrays.items() if BESIDE in name}


def doubles(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.float64]]:
    """The arrays in float64, in which everything is combined."""
    return {name: value.astype(np.float64) for name, value in arrays.items()}


def arrays_sha256(arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """SHA-256 over arrays: for each name in sorted order, the name in UTF-8, then the array's little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        value = np.ascontiguousarray(arrays[name])
        digest.update(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def nbytes(arrays: Mapping[str, npt.NDArray[np.generic]]) -> int:
    """Bytes of the arrays' values, without any wrapping."""
    return sum(value.nbytes for value in arrays.values())
