"""Adding up what the clients of a block have become, several in one pass: a sum in float64 is twice as long as a client.

By compiled code (`sums.c`) where there is a compiler, else by NumPy, to the same bits: each client's numbers in
float64 times its weight, added in the clients' order (`meadow.arrays.sums.weighted_sum`).
"""

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from meadow.native.build import NotCompiled, compiled

AT_ONCE = 2**15
"""Numbers that NumPy adds up at once: what is between stays in a core's cache."""


def together(size: int) -> int:
    """How many trained clients of so many numbers wait to be added up in one pass, so that the sum is read and written once
    for all of them: as many as a cache holds; of a larger model five, if 64 MiB hold them."""
    return max(2**20 // size, min(5, 2**24 // size), 1)


def add_up(
    total: npt.NDArray[np.float64],
    works: Sequence[npt.NDArray[np.float32]],
    weights: Sequence[Mapping[str, float]],
    begins: Mapping[str, int],
    first: bool,
    native: bool = True,
) -> bool:
    """total += each weight times that work, in order, or begins so; whether all numbers of the works are finite.

    total, works: of one length, in which the arrays begin at `begins`, ascending from 0. weights: of each work, by array.
    native: by compiled code, where there is any; the bits are the same.
    """
    library, count, finite = _library() if native else None, len(works), True
    places = (ctypes.c_void_p * count)(*(work.ctypes.data for work in works))
    for begin, end, given in _stretches(weights, begins, len(total)):
        if library is None:
            finite &= _by_numpy(total, works, given, begin, end, first)
        else:
            by_work = (ctypes.c_double * count)(*given)
            finite &= bool(library.add_up(total.ctypes.data, places, by_work, count, begin, end, first))
    return finite


def _stretches(
    weights: Sequence[Mapping[str, float]], begins: Mapping[str, int], size: int
) -> Iterator[tuple[int, int, list[float]]]:
    """Neighbouring arrays in which each work has one weight: where they begin and end, and these weights."""
    found = [
        (begins[next(names)], given)
        for given, names in groupby(begins, key=lambda name: [each[name] for each in weights])
    ]
    ends = [*(begin for begin, _ in found[1:]), size]
    return ((begin, end, given) for (begin, given), end in zip(found, ends, strict=True))


def _by_numpy(
    total: npt.NDArray[np.float64],
    works: Sequence[npt.NDArray[np.float32]],
    weights: Sequence[float],
    begin: int,
    end: int,
    first: bool,
) -> bool:
    finite, room = True, np.empty(AT_ONCE)
    for at in range(begin, end, AT_ONCE):
        stop = min(at + AT_ONCE, end)
        for number, (work, weight) in enumerate(zip(works, weights, strict=True)):
            what, begins = work[at:stop], first and number == 0
            finite = finite and bool(np.isfinite(what).all())
            term = total[at:stop] if begins else room[: stop - at]
            np.multiply(what, weight, out=term, dtype=np.float64)
            if not begins:
                total[at:stop] += term
    return finite


def available() -> bool:
    """Whether `sums.c` can be had here."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled `sums.c`, where it can be had."""
    try:
        found = compiled("sums.c")
    except NotCompiled:
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found.add_up.restype, found.add_up.argtypes = ctypes.c_int, [*[pointer] * 3, *[count] * 3, ctypes.c_int]
    return found
