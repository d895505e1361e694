"""Bucketing: Karimireddy, He and Jaggi, Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing (ICLR 2022),
algorithm 1. The aggregation rule then gets fewer updates, each nearer to the mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meadow.strategies.stages.builtin import BuiltIn
from meadow.strategies.stages.stage import Moves


@dataclass(frozen=True)
class Update:
    """The weight and the moves of some arrays of one client, or their mean over a bucket."""

    weight: float
    moves: Moves


class Bucketing(BuiltIn):
    """Replaces admitted updates by the means of `size` updates each, at the server."""

    name = "bucketing"

    def __init__(self, size: int) -> None:
        self._size = size

    def gather(self, updates: Sequence[Update], draw: np.random.Generator) -> list[Update]:
        """Shuffle updates, cut them into buckets, and return each bucket's weighted mean and total weight."""
        if self._size == 1:
            return list(updates)
        order = draw.permutation(len(updates))
        buckets = [[updates[i] for i in order[at : at + self._size]] for at in range(0, len(order), self._size)]
        return [Update(sum(u.weight for u in bucket), weighted_mean(bucket)) for bucket in buckets]


def weighted_mean(updates: Sequence[Update], scales: Sequence[float] | None = None) -> Moves:
    """The sum of weight * scale * moves, divided by the sum of weights."""
    total, each = sum(u.weight for u in updates), scales or [1.0] * len(updates)
    return {
        name: np.asarray(sum(u.weight * s * u.moves[name] for u, s in zip(updates, each, strict=True)) / total)
        for name in updates[0].moves
    }
