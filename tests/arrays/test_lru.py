"""What was used last is kept, within a number of bytes."""

import doctest

from meadow.arrays import lru
from meadow.arrays.lru import LRU


def test_the_newest_stays_within_the_bytes() -> None:
    kept: LRU[str, int] = LRU(10)
    for number, name in enumerate("abcd"):
        assert kept.put(name, number, 4) == number
    assert [kept.get(name) for name in "abcd"] == [None, None, 2, 3]
    kept.put("c", 5, 6)
    assert [kept.get(name) for name in "cd"] == [5, 3]
    kept.put("e", 6, 100)
    assert [kept.get(name) for name in "cde"] == [None, None, 6]


def test_what_was_used_stays_longer() -> None:
    kept: LRU[str, int] = LRU(10)
    kept.put("a", 1, 5)
    kept.put("b", 2, 5)
    assert kept.get("a") == 1
    kept.put("c", 3, 5)
    assert [kept.get(name) for name in "abc"] == [1, None, 3]


def test_the_example_runs() -> None:
    assert doctest.testmod(lru).failed == 0
