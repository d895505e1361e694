"""Named arrays, the form of a model's state in files, messages and sums; and arithmetic on them."""

import hashlib
from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.generic]]

Float64 = npt.NDArray[np.float64]

AUXILIARY = "@"
"""Separates an auxiliary array's kind from its state name: "c@trunk.w"."""

Kinds = Mapping[str, Mapping[str, npt.NDArray[np.generic]]]
"""Auxiliary arrays, which an algorithm keeps or sends in addition to the model: by kind ("c", "m", "own") and state
name."""


def auxiliary(kind: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """Rename arrays to auxiliary ones: "w" becomes "kind@w"."""
    return {f"{kind}{AUXILIARY}{name}": value for name, value in arrays.items()}


def of_kind(kind: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """Invert `auxiliary`: the arrays of one kind, by state name."""
    start = kind + AUXILIARY
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


def split_auxiliary(arrays: Mapping[str, npt.NDArray[np.generic]]) -> tuple[Arrays, Arrays]:
    """Split arrays into the model's and the auxiliary ones."""
    own = {name: value for name, value in arrays.items() if AUXILIARY not in name}
    return own, {name: value for name, value in arrays.items() if AUXILIARY in name}


def flat(kinds: Kinds) -> Arrays:
    """Flatten auxiliary arrays: {"c": {"w": ...}} becomes {"c@w": ...}."""
    return {name: value for kind, arrays in kinds.items() for name, value in auxiliary(kind, arrays).items()}


def by_kind(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Arrays]:
    """Invert `flat`."""
    kinds: dict[str, Arrays] = {}
    for name, value in arrays.items():
        kind, _, of = name.partition(AUXILIARY)
        kinds.setdefault(kind, {})[of] = value
    return kinds


class Named(dict[str, Float64]):
    """Float64 arrays by name, with arithmetic by name, so that an algorithm reads like its paper.

    The other operand of + - * / is a number, or numbers or arrays by name; the result has the names that both have. No
    operation modifies its operands.

    >>> x, y = Named({"w": np.array([1.0, 2.0]), "b": np.array([3.0])}), Named({"w": np.array([0.5, 0.5])})
    >>> (x - y) * 2
    {'w': array([1., 3.])}
    """

    def __init__(self, arrays: Mapping[str, npt.ArrayLike] = MappingProxyType({})) -> None:
        super().__init__({name: np.asarray(value, np.float64) for name, value in arrays.items()})

    def __add__(self, other: "Operand") -> "Named":
        return self._by_name(other, np.add)

    def __sub__(self, other: "Operand") -> "Named":
        return self._by_name(other, np.subtract)

    def __mul__(self, other: "Operand") -> "Named":
        return self._by_name(other, np.multiply)

    __rmul__ = __mul__

    def __truediv__(self, other: "Operand") -> "Named":
        return self._by_name(other, np.divide)

    def __or__(self, other: Mapping[str, npt.ArrayLike]) -> "Named":  # type: ignore[override]
        """Merge; arrays of `other` replace those with the same name."""
        return Named({**self, **other})

    def map(self, function: Callable[[Float64], Float64]) -> "Named":
        """Apply a function to each array."""
        return Named({name: function(value) for name, value in self.items()})

    def only(self, names: Container[str]) -> "Named":
        """Keep only the arrays with these names."""
        return Named({name: value for name, value in self.items() if name in names})

    def where(self, names: Container[str], otherwise: Mapping[str, npt.ArrayLike]) -> "Named":
        """Take these arrays for `names`, and those of `otherwise` for the other names that both have."""
        return Named({n: value if n in names else otherwise[n] for n, value in self.items() if n in otherwise})

    def like(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
        """Cast each array to the dtype of its namesake in `arrays`."""
        return {name: value.astype(arrays[name].dtype) for name, value in self.items()}

    def _by_name(self, other: "Operand", function: Callable[[Float64, Any], Any]) -> "Named":
        if not isinstance(other, Mapping):
            return Named({name: function(value, other) for name, value in self.items()})
        return Named({name: function(value, other[name]) for name, value in self.items() if name in other})


Operand = float | Mapping[str, npt.ArrayLike]


def zeros_like(arrays: Mapping[str, npt.NDArray[np.generic]], names: Iterable[str]) -> Named:
    """Zeros in the shapes of the arrays with these names."""
    return Named({name: np.zeros(arrays[name].shape) for name in names})


def arrays_sha256(arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """SHA-256 over arrays: for each name in sorted order, the name in UTF-8, then the array's little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        value = np.ascontiguousarray(arrays[name])
        digest.update(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def nbytes(arrays: Mapping[str, npt.NDArray[np.generic]]) -> int:
    """The bytes of the arrays' values."""
    return sum(value.nbytes for value in arrays.values())
