"""Assigns blocks of clients to nodes, where any node may train any client, so that all nodes finish together."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

EVEN = 0.02
"""Adjacent blocks stay together unless the last worker then finishes later by more than this share of the time."""
LEVEL = 0.005
"""Pieces move between workers while the last one finishes later than an even share by more than this fraction."""


@dataclass
class Paces:
    """Seconds that each node takes per unit of work, as a moving average."""

    _rates: dict[int, float] = field(default_factory=dict)
    _opened: set[int] = field(default_factory=set)
    """Nodes that have trained before. A node's first round is not measured, because it also opens its data."""

    def places(
        self, nodes: Sequence[int], blocks: Sequence[tuple[int, ...]], work: Mapping[int, float]
    ) -> dict[int, int]:
        """The node of each client: whole blocks, assigned by their expected time on each node. None without nodes."""
        if not nodes:
            return {}
        usual = statistics.fmean(self._rates.values()) if self._rates else 1.0
        rates = [self._rates.get(node, usual) for node in nodes]
        places = assign([sum(work[c] for c in block) for block in blocks], rates)
        return {client: nodes[place] for block, place in zip(blocks, places, strict=True) for client in block}

    def learn(self, seconds: Mapping[int, float], work: Mapping[int, float]) -> None:
        """Update the paces with the seconds that each node took and the work that it did."""
        for node, taken in seconds.items():
            if node in self._opened:
                now = taken / work[node]
                usual = self._rates.get(node, now)
                self._rates[node] = usual + (now - usual) / 4
        self._opened |= seconds.keys()


def assign(work: Sequence[float], rates: Sequence[float]) -> list[int]:
    """Assign each piece of `work` to one of the workers 0..len(rates)-1, so that they finish together.

    `rates`: each worker's time per unit of work. The longest piece goes first, each to the worker that finishes it first
    (Graham 1969); this takes at most 4/3 of the shortest possible time. Then the worker that finishes last gives away or
    exchanges pieces while that helps. Adjacent pieces stay together, so that a worker can add up whole spans of blocks, if
    the last worker then finishes at most EVEN later.
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
    """Move a piece away from the worker that finishes last, or swap two pieces, while the later of both then finishes
    earlier; stop when the last worker is within LEVEL of the even share. Changes `ends` and `places` in place."""
    even = amount.sum() / speeds.sum()
    while ends.max() > (1 + LEVEL) * even:
        last = int(np.argmax(ends))
        ours, best = np.flatnonzero(places == last), (float(ends[last]), -1, -1, -1)
        for other in set(range(len(speeds))) - {last}:
            theirs = np.flatnonzero(places == other)
            back = np.append(amount[theirs], 0)  # last column: a move without a piece in return
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
