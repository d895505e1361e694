"""The stage of buckets: Karimireddy, He and Jaggi, Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing
(ICLR 2022), algorithm 1. The rule that comes behind sees fewer updates, each nearer to the mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from meadow.strategies.stages.own import Own
from meadow.strategies.stages.stage import Moves


@dataclass(frozen=True)
class Update:
    """One client's moves of some arrays and its weight; or, behind bucketing, the mean of a bucket's."""

    weight: float
    moves: Moves


class Bucketing(Own):
    """Means of `size` updates at a time take the place of the updates: the server's half, behind admission."""

    name = "bucketing"

    def __init__(self, size: int) -> None:
        self._size = size

    def gather(self, updates: Sequence[Update], draw: np.random.Generator) -> list[Update]:
        """Shuffle, cut into buckets, and take each bucket's weighted mean, with the bucket's weight."""
        if self._size == 1:
            return list(updates)
        order = draw.permutation(len(updates))
        buckets = [[updates[i] for i in order[at : at + self._size]] for at in range(0, len(order), self._size)]
        return [Update(sum(u.weight for u in bucket), weighted_mean(bucket)) for bucket in buckets]


def weighted_mean(updates: Sequence[Update], scales: Sequence[float] | None = None) -> Moves:
    """sum of weight * scale * moves over the sum of the weights."""
    total, each = sum(u.weight for u in updates), scales or [1.0] * len(updates)
    return {
        name: np.asarray(sum(u.weight * s * u.moves[name] for u, s in zip(updates, each, strict=True)) / total)
        for name in updates[0].moves
    }
