"""Adds up clients' updates in a fixed order, so that every engine gives the same bits.

Floating-point addition is not associative: ((a+b)+c)+d differs from (a+b)+(c+d). If workers simply added up the clients
that they trained, the result would depend on the number of workers. So the cohort, in ascending order, is cut into
blocks of `BLOCK` consecutive clients. In float64, we add the clients of a block in order, then the blocks of each span
of `FAN` blocks, then the spans of each span of `FAN` spans, up to the whole cohort. A node that has a whole block or
span sends its sum; otherwise the server adds up the available parts in the same order.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from meadow.arrays.named import Arrays

T = TypeVar("T")

BLOCK = 10
"""Clients per block. Another value changes the last bits of results."""
FAN = 5
"""Parts per span. Another value changes the last bits of results."""
GROWTH = 1e6
"""An array of an update may be this many times as long as the one that was sent, or as 1: far more than training gives, and
little enough to compute with. For statistics of activations, which may jump to the scale of the data, its square."""
_STATISTICS = ("running_mean", "running_var")

Span = tuple[int, int]
"""Consecutive blocks of a cohort: the index of the first, and the one after the last."""


@dataclass(frozen=True)
class WeightedSum:
    """Sum of weight times array over some clients, and the sum of the weights, separately for each name.

    sums: float64 arrays. weights: for each name, the total weight of the clients that sent it; clients with different
    tasks send different names.
    """

    sums: dict[str, npt.NDArray[np.float64]]
    weights: dict[str, float]


def cut(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """Cut a cohort into blocks: ascending client ids, `BLOCK` at a time; the last block may be shorter."""
    ordered = sorted(cohort)
    return [tuple(ordered[i : i + BLOCK]) for i in range(0, len(ordered), BLOCK)]


def parts(span: Span) -> Iterator[Span]:
    """The parts of a span of several blocks, in order: at most FAN of equal length; the last may be shorter."""
    first, stop = span
    width = 1
    while width * FAN < stop - first:
        width *= FAN
    return ((at, min(at + width, stop)) for at in range(first, stop, width))


def spans(count: int) -> list[Span]:
    """All spans of more than one block in a cohort of `count` blocks, each after its parts; the last is the whole
    cohort."""
    found: list[Span] = []

    def visit(span: Span) -> None:
        if span[1] - span[0] > 1:
            for part in parts(span):
                visit(part)
            found.append(span)

    if count:
        visit((0, count))
    return found


def total(span: Span, known: Callable[[Span], T | None], add_up: Callable[[list[T]], T]) -> T | None:
    """The sum over a span, or None if it has no known part.

    known: returns an available sum; called for a span before its parts. add_up: adds the sums of parts, in order.
    """
    found = known(span)
    if found is None and span[1] - span[0] > 1:
        there = [part for part in (total(part, known, add_up) for part in parts(span)) if part is not None]
        found = add_up(there) if there else None
    return found


def fault(
    arrays: Mapping[str, npt.NDArray[np.generic]],
    sent: Mapping[str, npt.NDArray[np.generic]],
    weights: Mapping[str, float] | None = None,
    summed: bool = False,
) -> str:
    """Return why an update must be rejected, or "": checks names, shapes, dtypes, finite values and `GROWTH`, in that order.

    The update must have the names of `sent`, except those of weight 0 (`meadow.strategies.roles.name_weights`), and the
    same shapes and dtypes. `summed`: it is a sum over clients, in float64, of these weights.
    """
    expected = {name for name in sent if weights is None or weights[name] > 0}
    if arrays.keys() != expected:
        missing, extra = sorted(expected - arrays.keys()), sorted(arrays.keys() - expected)
        return f"its arrays have other names: missing {missing}, unexpected {extra}"
    for name, value in arrays.items():
        if value.shape != sent[name].shape:
            return f"{name} has shape {value.shape}, not {sent[name].shape}"
        dtype = np.dtype(np.float64) if summed else sent[name].dtype
        if value.dtype != dtype:
            return f"{name} has dtype {value.dtype}, not {dtype}"
        norm, most = _norm(value), GROWTH * (weights[name] if summed and weights else 1)
        if not math.isfinite(norm):
            return f"{name} has values that are not finite"
        if name.endswith(_STATISTICS):
            most *= GROWTH
        if norm > most and norm > most * _norm(sent[name]):
            return (
                f"{name} has values that are not usable: it is over {GROWTH:g} times as long as the array that was sent"
            )
    return ""


def _norm(value: npt.NDArray[np.generic]) -> float:
    """The Euclidean norm; not finite if a value is not, or if its square is not a float64. 0 for integers."""
    if not np.issubdtype(value.dtype, np.inexact):
        return 0.0
    flat: npt.NDArray[Any] = value.ravel(order="K")
    with np.errstate(over="ignore", invalid="ignore"):
        # In the array's own precision, which is faster. Not by np.dot: after it, the threads of NumPy's BLAS wait for more
        # work in a busy loop for 10 ms and more, on the cores on which clients train.
        squares = np.einsum("i,i->", flat, flat)
        if not np.isfinite(squares):
            squares = np.square(flat, dtype=np.float64).sum()
    return float(np.sqrt(squares))


def weighted_sum(
    updates: Iterable[tuple[float | Mapping[str, float], Mapping[str, npt.NDArray[np.generic]]]],
) -> WeightedSum:
    """Add up (weight, arrays) pairs in order, in float64. A weight is a number, or a number for each name."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    totals: dict[str, float] = {}
    for weights, arrays in updates:
        for name, value in arrays.items():
            weight = weights[name] if isinstance(weights, Mapping) else weights
            term = np.multiply(value, weight, dtype=np.float64)
            if name in sums:
                sums[name] += term
                totals[name] += weight
            else:
                sums[name], totals[name] = term, weight
    return WeightedSum(sums, totals)


def add(blocks: Iterable[WeightedSum]) -> WeightedSum:
    """Add up the parts of a span, in order."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    weights: dict[str, float] = {}
    copied = set()
    for block in blocks:
        for name, value in block.sums.items():
            if name not in sums:
                sums[name] = value
            elif name in copied:
                sums[name] += value
            else:
                sums[name] = sums[name] + value
                copied.add(name)
            weights[name] = weights.get(name, 0.0) + block.weights[name]
    return WeightedSum(sums, weights)


def mean(total: WeightedSum, before: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """Sum divided by weight for each name of `before`, in its dtype. Arrays that nobody sent stay unchanged."""
    result: Arrays = {}
    for name, old in before.items():
        result[name] = as_before(total.sums[name] / total.weights[name], old) if name in total.sums else old
    return result


def as_before(value: npt.NDArray[np.float64], old: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Cast to the dtype of `old`; integers are rounded to the nearest."""
    return (np.rint(value) if np.issubdtype(old.dtype, np.integer) else value).astype(old.dtype)


def length(update: Mapping[str, npt.NDArray[np.generic]], sent: Mapping[str, npt.NDArray[np.generic]]) -> float:
    """The Euclidean norm of update minus `sent`, over all arrays, in float64."""
    squares = (
        np.square(value.astype(np.float64) - sent[name].astype(np.float64)).sum() for name, value in update.items()
    )
    return float(np.sqrt(sum(squares, start=np.float64(0))))
