"""A cache of the most recently used values, limited in bytes."""

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class LRU(Generic[K, T]):
    """Values by key. Drops the least recently used ones above `limit` bytes; always keeps the newest.

    >>> kept = LRU[str, int](limit=10)
    >>> kept.put("a", 1, size=6), kept.put("b", 2, size=6)
    (1, 2)
    >>> kept.get("a"), kept.get("b")
    (None, 2)
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: dict[K, tuple[T, int]] = {}

    def get(self, key: K) -> T | None:
        """Return the value of a key, or None."""
        if key not in self._kept:
            return None
        found = self._kept[key] = self._kept.pop(key)
        return found[0]

    def put(self, key: K, value: T, size: int) -> T:
        """Keep and return a value that takes `size` bytes."""
        self._bytes += size - self._kept.pop(key, (None, 0))[1]
        self._kept[key] = value, size
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.pop(next(iter(self._kept)))[1]
        return value
