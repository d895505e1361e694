"""Blocks: the fixed grouping in which clients' updates are added up, so that every engine gives the same bits.

Floating-point addition is not associative: ((a+b)+c)+d differs from (a+b)+(c+d). If a worker added up whatever it
happened to train, the result would depend on the number of workers. So the cohort, in ascending order, is cut into
blocks of `BLOCK` consecutive clients; within a block clients are added in order, then the blocks of each span of `FAN`
blocks, then the spans of each span of `FAN` spans, and so on up to the whole cohort, all in float64. A node that holds a
whole block or span sends one sum for it; otherwise the server adds up what there is in the same order, to the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from meadow.arrays.named import Arrays, split_auxiliary

T = TypeVar("T")

BLOCK = 10
"""Clients a block. Part of the result's definition: another value gives other last bits."""
FAN = 5
"""Parts that a span of blocks is made of. Part of the result's definition, as `BLOCK`."""

Span = tuple[int, int]
"""Consecutive blocks of a cohort, by the index of the first and of the one after the last."""


@dataclass(frozen=True)
class WeightedSum:
    """Sum of weight times array over some clients, and the sum of the weights, separately for each name.

    sums: float64 arrays. weights: the total weight of those who sent that name, so that clients may send different
    names (different tasks) and each name is averaged over those who trained it.
    """

    sums: dict[str, npt.NDArray[np.float64]]
    weights: dict[str, float]


def cut(cohort: Sequence[int]) -> list[tuple[int, ...]]:
    """The blocks of a cohort: ascending client ids, `BLOCK` at a time, the last one shorter."""
    ordered = sorted(cohort)
    return [tuple(ordered[i : i + BLOCK]) for i in range(0, len(ordered), BLOCK)]


def parts(span: Span) -> Iterator[Span]:
    """What a span of more than one block is the sum of, in order: at most FAN of equal length, the last one shorter."""
    first, stop = span
    width = 1
    while width * FAN < stop - first:
        width *= FAN
    return ((at, min(at + width, stop)) for at in range(first, stop, width))


def spans(count: int) -> list[Span]:
    """Of a cohort of `count` blocks all spans of more than one block, each behind its parts; the last one is the whole."""
    found: list[Span] = []

    def visit(span: Span) -> None:
        if span[1] - span[0] > 1:
            for part in parts(span):
                visit(part)
            found.append(span)

    if count:
        visit((0, count))
    return found


def total(span: Span, known: Callable[[Span], T | None], together: Callable[[list[T]], T]) -> T | None:
    """The sum over a span in the order that defines its bits. `known` gives the sums that there are; it is asked for a span
    before its parts, and for a single block last. `together` adds up. None where there is nothing to add up."""
    found = known(span)
    if found is None and span[1] - span[0] > 1:
        there = [part for part in (total(part, known, together) for part in parts(span)) if part is not None]
        found = together(there) if there else None
    return found


def fault(
    arrays: Mapping[str, npt.NDArray[np.generic]],
    sent: Mapping[str, npt.NDArray[np.generic]],
    weights: Mapping[str, float] | None = None,
    max_norm: float = 0,
) -> str:
    """Why an update may not enter a sum, or "" if it may: its names, shapes, dtypes, finiteness and length, in that order.

    `sent` are the arrays that the client received; an update must have the same names, but for those whose weight
    (`meadow.strategies.roles.name_weights`) is 0, and the same shapes and dtypes. `max_norm`, if not 0, bounds the length of
    the model's move.
    """
    expected = {name for name in sent if weights is None or weights[name] > 0}
    if arrays.keys() != expected:
        missing, extra = sorted(expected - arrays.keys()), sorted(arrays.keys() - expected)
        return f"its arrays have other names: missing {missing}, unexpected {extra}"
    for name, value in arrays.items():
        if value.shape != sent[name].shape:
            return f"{name} has shape {value.shape}, not {sent[name].shape}"
        if value.dtype != sent[name].dtype:
            return f"{name} has dtype {value.dtype}, not {sent[name].dtype}"
        if not _finite(value):
            return f"{name} has values that are not finite"
    if max_norm and (moved := length(split_auxiliary(arrays)[0], sent)) > max_norm:
        return f"its update is {moved:.6g} long, more than cohort.max_norm = {max_norm:.6g}"
    return ""


def _finite(value: npt.NDArray[np.generic]) -> bool:
    """Whether all numbers are finite. Where their squares have a finite sum they are; that is quicker to see."""
    flat = value.ravel(order="K")
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.dot(flat, flat)
    return bool(np.isfinite(squares)) or bool(np.isfinite(value).all())


def weighted_sum(
    updates: Iterable[tuple[float | Mapping[str, float], Mapping[str, npt.NDArray[np.generic]]]],
) -> WeightedSum:
    """Add up (weight, arrays) pairs in the order given, in float64. A weight is a number, or one for each name."""
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
    """The sum of the parts of a span, in order."""
    sums: dict[str, npt.NDArray[np.float64]] = {}
    weights: dict[str, float] = {}
    ours = set()
    for block in blocks:
        for name, value in block.sums.items():
            if name not in sums:
                sums[name] = value
            elif name in ours:
                sums[name] += value
            else:
                sums[name] = sums[name] + value
                ours.add(name)
            weights[name] = weights.get(name, 0.0) + block.weights[name]
    return WeightedSum(sums, weights)


def mean(total: WeightedSum, before: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """Sum over weight for each name of `before`, `as_before`. A name that nobody sent stays as it was."""
    result: Arrays = {}
    for name, old in before.items():
        result[name] = as_before(total.sums[name] / total.weights[name], old) if name in total.sums else old
    return result


def as_before(value: npt.NDArray[np.float64], old: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """The value in the dtype that it had; integers are rounded to the nearest."""
    return (np.rint(value) if np.issubdtype(old.dtype, np.integer) else value).astype(old.dtype)


def average(blocks: Iterable[WeightedSum], before: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
    """The weighted mean over all blocks (`add`, then `mean`)."""
    return mean(add(blocks), before)


def length(update: Mapping[str, npt.NDArray[np.generic]], sent: Mapping[str, npt.NDArray[np.generic]]) -> float:
    """The Euclidean length of an update's move away from what was sent, over all arrays together, in float64."""
    squares = (
        np.square(value.astype(np.float64) - sent[name].astype(np.float64)).sum() for name, value in update.items()
    )
    return float(np.sqrt(sum(squares, start=np.float64(0))))
