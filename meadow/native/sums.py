"""Adds the trained models of a block to its float64 sum, several in one pass to save memory traffic.

Compiled code (`sums.c`) and NumPy give the same bits: each model in float64 times its weight, added in the clients'
order (`meadow.arrays.sums.weighted_sum`).
"""

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from meadow.native.build import COUNT, POINTER, NotCompiled, declared

AT_ONCE = 2**15
"""Values that NumPy adds at once, so that intermediate results stay in the cache."""


def models_at_once(size: int) -> int:
    """How many trained models of `size` parameters to buffer before adding them to the sum: as many as fit into a
    cache; of a larger model five, if they fit into 64 MiB."""
    return max(2**20 // size, min(5, 2**24 // size), 1)


def add_up(
    total: npt.NDArray[np.float64],
    works: Sequence[npt.NDArray[np.float32]],
    weights: Sequence[Mapping[str, float]],
    begins: Mapping[str, int],
    first: bool,
    native: bool = True,
) -> bool:
    """Add each weight times its work to `total`, in order; with `first`, overwrite it. Returns whether all works are
    finite.

    total, works: flat arrays of one length. begins: the offset of each named array, ascending from 0. weights: of each
    work, by name. native: use compiled code if available; the bits are the same.
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
    """Ranges of neighbouring arrays with the same weights: begin, end, and the weight of each work."""
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
    """Whether `sums.c` can be used here."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load `sums.c`, or return None."""
    try:
        return declared("sums.c", {"add_up": (ctypes.c_int, [*[POINTER] * 3, *[COUNT] * 3, ctypes.c_int])})
    except NotCompiled:
        return None
