"""Dealing: which node trains which blocks of clients, where any node may train any, so that all end together."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

EVEN = 0.02
"""Share of the time by which the last worker may end later before blocks next to each other are parted."""
LEVEL = 0.005
"""Share of the even time by which the last worker may end later before pieces are exchanged."""


@dataclass
class Paces:
    """How long each node took for a unit of work, of late, in seconds."""

    _rates: dict[int, float] = field(default_factory=dict)
    _opened: set[int] = field(default_factory=set)
    """Nodes that have trained before: in its first round a node opens its data as well, which tells nothing of its pace."""

    def places(
        self, nodes: Sequence[int], blocks: Sequence[tuple[int, ...]], work: Mapping[int, float]
    ) -> dict[int, int]:
        """The node of each client: whole blocks by what they are expected to take on each node."""
        usual = statistics.fmean(self._rates.values()) if self._rates else 1.0
        rates = [self._rates.get(node, usual) for node in nodes]
        places = deal([sum(work[c] for c in block) for block in blocks], rates)
        return {client: nodes[place] for block, place in zip(blocks, places, strict=True) for client in block}

    def learn(self, seconds: Mapping[int, float], work: Mapping[int, float]) -> None:
        """Take in how many seconds each node took, and for how much work."""
        for node, taken in seconds.items():
            if node in self._opened:
                now = taken / work[node]
                usual = self._rates.get(node, now)
                self._rates[node] = usual + (now - usual) / 4
        self._opened |= seconds.keys()


def deal(work: Sequence[float], rates: Sequence[float]) -> list[int]:
    """Which of several workers (0..len(rates)-1) does each of several pieces of `work`, so that they end together.

    `rates`: the time that each worker takes for a unit. The longest piece comes first and each goes to the worker that
    ends first with it (Graham 1969): that takes at most 4/3 of the shortest time possible. Then the worker that ends last
    gives away a piece, or exchanges one, as long as that helps. But where pieces next to each other can stay together (a
    worker then adds up whole spans of blocks) and the last worker ends at most EVEN later, they do.
    """
    speeds = np.array([1 / rate for rate in rates])
    amount = np.array(work, dtype=np.float64)
    middle = (np.cumsum(amount) - amount / 2) / amount.sum()
    together = np.minimum(np.searchsorted(np.cumsum(speeds) / speeds.sum(), middle), len(speeds) - 1)
    end = (np.bincount(together, amount, len(speeds)) / speeds).max()
    ends, parted = np.zeros(len(speeds)), np.zeros(len(amount), dtype=np.int64)
    for piece in np.argsort(-amount, kind="stable"):
        place = int(np.argmin(ends + amount[piece] / speeds))
        ends[place] += amount[piece] / speeds[place]
        parted[piece] = place
    _level(amount, speeds, ends, parted)
    return [int(place) for place in (together if end <= (1 + EVEN) * ends.max() else parted)]


def _level(
    amount: npt.NDArray[np.float64],
    speeds: npt.NDArray[np.float64],
    ends: npt.NDArray[np.float64],
    places: npt.NDArray[np.int64],
) -> None:
    """Let the worker that ends last give a piece to another one, or exchange two with it, while that makes the later of both
    end earlier, until the last one ends LEVEL after the even share. `ends` and `places` change."""
    even = amount.sum() / speeds.sum()
    while ends.max() > (1 + LEVEL) * even:
        last = int(np.argmax(ends))
        ours, best = np.flatnonzero(places == last), (float(ends[last]), -1, -1, -1)
        for other in set(range(len(speeds))) - {last}:
            theirs = np.flatnonzero(places == other)
            back = np.append(amount[theirs], 0)  # in the last column nothing comes back
            moved = amount[ours][:, None] - back
            later = np.maximum(ends[last] - moved / speeds[last], ends[other] + moved / speeds[other])
            i, j = divmod(int(later.argmin()), len(back))
            best = min(best, (float(later[i, j]), other, int(ours[i]), int(theirs[j]) if j < len(theirs) else -1))
        _, other, given, taken = best
        if other < 0:
            return
        moved = amount[given] - (amount[taken] if taken >= 0 else 0)
        places[given] = other
        places[[taken] if taken >= 0 else []] = last
        ends[last] -= moved / speeds[last]
        ends[other] += moved / speeds[other]
