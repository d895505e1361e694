"""Named arrays: what a model's state is between a file, a process and a sum."""

import hashlib
from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.generic]]

Float64 = npt.NDArray[np.float64]

AUXILIARY = "@"
"""In a name, between a kind of auxiliary arrays and the state name that an array belongs to: "c@trunk.w"."""

Kinds = Mapping[str, Mapping[str, npt.NDArray[np.generic]]]
"""What an algorithm keeps or sends beside a model: for each kind ("c", "m", "own"), arrays by state name."""


def auxiliary(kind: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """Arrays under their names beside a model: "w" as "kind@w"."""
    return {f"{kind}{AUXILIARY}{name}": value for name, value in arrays.items()}


def of_kind(kind: str, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """The inverse of `auxiliary`: the arrays of one kind, by the state names that they belong to."""
    start = kind + AUXILIARY
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


def split_auxiliary(arrays: Mapping[str, npt.NDArray[np.generic]]) -> tuple[Arrays, Arrays]:
    """Arrays divided into a model's own and the auxiliary ones."""
    own = {name: value for name, value in arrays.items() if AUXILIARY not in name}
    return own, {name: value for name, value in arrays.items() if AUXILIARY in name}


def flat(kinds: Kinds) -> Arrays:
    """All kinds in one dictionary: {"c": {"w": ...}} as {"c@w": ...}."""
    return {name: value for kind, arrays in kinds.items() for name, value in auxiliary(kind, arrays).items()}


def by_kind(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Arrays]:
    """The inverse of `flat`."""
    kinds: dict[str, Arrays] = {}
    for name, value in arrays.items():
        kind, _, of = name.partition(AUXILIARY)
        kinds.setdefault(kind, {})[of] = value
    return kinds


class Named(dict[str, Float64]):
    """Float64 arrays by name, with arithmetic by name, so that an algorithm reads as its paper.

    The other side of + - * / is a number, or numbers or arrays by name; the result has the names that both sides have. No
    operation writes to an array that it was given.

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
        """These arrays, and those of `other` in the place of the ones with the same name."""
        return Named({**self, **other})

    def map(self, function: Callable[[Float64], Float64]) -> "Named":
        """The function of each array."""
        return Named({name: function(value) for name, value in self.items()})

    def only(self, names: Container[str]) -> "Named":
        """The arrays with these names."""
        return Named({name: value for name, value in self.items() if name in names})

    def where(self, names: Container[str], otherwise: Mapping[str, npt.ArrayLike]) -> "Named":
        """These arrays for `names`, those of `otherwise` for all other names that both have."""
        return Named({n: value if n in names else otherwise[n] for n, value in self.items() if n in otherwise})

    def like(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
        """Each array in the dtype of the one with its name in `arrays`."""
        return {name: value.astype(arrays[name].dtype) for name, value in self.items()}

    def _by_name(self, other: "Operand", function: Callable[[Float64, Any], Any]) -> "Named":
        if not isinstance(other, Mapping):
            return Named({name: function(value, other) for name, value in self.items()})
        return Named({name: function(value, other[name]) for name, value in self.items() if name in other})


Operand = float | Mapping[str, npt.ArrayLike]


def zeros_like(arrays: Mapping[str, npt.NDArray[np.generic]], names: Iterable[str]) -> Named:
    """Zeros of the shape of each of these names' arrays."""
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
    """Bytes of the arrays' values, without any wrapping."""
    return sum(value.nbytes for value in arrays.values())
