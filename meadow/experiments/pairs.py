"""Paired comparison of methods, client by client on the same split, and confidence intervals over the seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meadow.experiments.results import RunResult, higher_is_better


@dataclass(frozen=True)
class Paired:
    """A method compared with another on the same clients. A positive gain means that it is better than the other.

    `gains`: each seed's mean gain over its clients and folds, in order of `seeds`. `losers`: the clients of each
    (seed, fold) that do strictly worse. `clients`: the number of pairs in all runs. `interval`: that of the mean gain,
    None below three seeds.
    """

    seeds: tuple[int, ...]
    gains: tuple[float, ...]
    losers: Mapping[tuple[int, int], frozenset[int]]
    clients: int
    interval: tuple[float, float] | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.gains))

    @property
    def lost(self) -> int:
        return sum(len(clients) for clients in self.losers.values())


def compare_paired(runs: Sequence[RunResult], others: Sequence[RunResult], target: str, metric: str) -> Paired | None:
    """Pair two methods by (seed, fold, client) on the final metric; None if no seed has the same split in both.

    The interval is the two-sided 95% paired t-interval over the seeds: each seed's mean gain is one observation. The folds
    of a seed are not separate observations: they share most of their training samples, and no estimate of the variance
    over them is unbiased (Bengio and Grandvalet 2004).
    """
    sign = 1.0 if higher_is_better(metric) else -1.0
    reference = {(other.seed, other.fold): other for other in others}
    by_seed: dict[int, list[float]] = {}
    losers: dict[tuple[int, int], frozenset[int]] = {}
    for run in runs:
        other = reference.get((run.seed, run.fold))
        if other is None or other.split_sha256 != run.split_sha256:
            continue
        mine, theirs = run.scores(target, metric), other.scores(target, metric)
        gain = {client: sign * (mine[client] - theirs[client]) for client in mine.keys() & theirs.keys()}
        if gain:
            by_seed.setdefault(run.seed, []).extend(gain.values())
            losers[run.seed, run.fold] = frozenset(client for client, value in gain.items() if value < 0)
    if not by_seed:
        return None
    gains = [float(np.mean(values)) for values in by_seed.values()]
    return Paired(tuple(by_seed), tuple(gains), losers, sum(map(len, by_seed.values())), t_interval(gains))


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The two-sided 95% t-interval of the mean, `mean +- t(0.975, n - 1) * s / sqrt(n)`; None below three values."""
    n = len(values)
    if n < 3:
        return None
    from scipy.special import stdtrit  # slow to import

    half = float(stdtrit(n - 1, 0.975)) * float(np.std(values, ddof=1)) / n**0.5
    return float(np.mean(values)) - half, float(np.mean(values)) + half
