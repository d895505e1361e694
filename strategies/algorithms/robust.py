"""Robust aggregation rules, which need each client's update.

Flower implements coordinate median and trimmed mean (Yin et al. 2018), Krum and Multi-Krum (Blanchard et al. 2017).
Bulyan (El Mhamdi et al. 2018) is made of Flower's parts: Flower's own uses a single Multi-Krum ranking and runs the
garbage collector for each update (0.4 s). Geometric median, centred clipping and norm bound are ours. Bucketing
(Karimireddy et al. 2022, algorithm 1) may come before any rule.

A rule gets moves (y_k - x, float64) instead of models, because distances between similar models would lose digits in
float32. Arrays that the same clients trained with the same weights are combined together; a head that only some clients
train, among these clients.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
from flwr.serverapp.strategy.multikrum import select_multikrum

from meadow.arrays.flower import to_record
from meadow.arrays.named import Arrays, Float64, Named, split_auxiliary
from meadow.config.rules.rule import Rule
from meadow.config.schema import Strategy as Settings
from meadow.runtime.seeds import numpy_generator
from meadow.strategies.adaptors.flower import aggregated
from meadow.strategies.algorithms.fedavg import stepped
from meadow.strategies.check import update_count
from meadow.strategies.protocol import Algorithm, ClientUpdate, ServerAlgorithm, Setup, State
from meadow.strategies.stages.bucketing import Bucketing, Update, weighted_mean
from meadow.strategies.stages.stage import Moves

log = logging.getLogger("meadow.server")

Combine = Callable[[Sequence[Update], Settings], Moves]
"""Combines one or more updates with the same names."""


class Robust(ServerAlgorithm[Sequence[ClientUpdate]]):
    """x <- x + server_lr * rule(moves). Arrays with too few updates to withstand `byzantine` attackers stay
    unchanged."""

    sums_only = False

    def __init__(self, setup: Setup, combine: Combine, least: Callable[[int], int]) -> None:
        super().__init__(setup)
        self._combine, self._least = combine, least

    def update(self, state: State, total: Sequence[ClientUpdate], model: Arrays) -> tuple[Arrays, State]:
        """Group arrays by the clients that trained them, then bucket and combine each group's updates."""
        before, plan, steps = Named(model), self.setup.settings, dict[str, Float64]()
        moves = {reply.client: Named(split_auxiliary(reply.arrays)[0]) - before for reply in total}
        for senders, names in _groups(total, moves).items():
            updates = [Update(weight, {n: moves[client][n] for n in names}) for client, weight in senders]
            draw = numpy_generator(self.setup.seed, "bucket", total[0].round)
            given = Bucketing(plan.bucket).gather(updates, draw)
            if (needed := self._least(plan.byzantine)) > len(given) and plan.byzantine:
                log.warning(
                    "round %d: %s stay unchanged: strategy.name = %s with strategy.byzantine = %d needs %d updates, not %d",
                    *(total[0].round, ", ".join(names), plan.name, plan.byzantine, needed, len(given)),
                )
                continue
            steps |= self._combine(given, plan)
        return stepped(self.setup, steps, model), state


def _groups(
    total: Sequence[ClientUpdate], moves: Mapping[int, Named]
) -> dict[tuple[tuple[int, float], ...], list[str]]:
    """Groups of names that the same clients trained with the same weights, by these (client, weight) pairs."""
    senders: dict[str, list[tuple[int, float]]] = {}
    for reply in total:
        for name in moves[reply.client]:
            senders.setdefault(name, []).append((reply.client, reply.weights[name]))
    groups: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, theirs in senders.items():
        groups.setdefault(tuple(theirs), []).append(name)
    return groups


def distance(update: Update, point: Moves) -> float:
    """The Euclidean distance from a point, over all arrays."""
    return float(np.sqrt(sum(float(np.square(v - point[n]).sum()) for n, v in update.moves.items())))


def geometric_median(updates: Sequence[Update], settings: Settings) -> Moves:
    """RFA: Pillutla, Kakade and Harchaoui, Robust Aggregation for Federated Learning (2022), algorithm 2: smoothed
    Weiszfeld. From the mean, `iterations` times z <- mean of the moves with weights w_k / max(smoothing, |z - v_k|)."""
    z = weighted_mean(updates)
    for _ in range(settings.iterations):
        near = [Update(u.weight / max(settings.smoothing, distance(u, z)), u.moves) for u in updates]
        z = weighted_mean(near)
    return z


def centred_clipping(updates: Sequence[Update], settings: Settings, once: bool = False) -> Moves:
    """Karimireddy, He and Jaggi, Learning from History for Byzantine Robust Optimization (ICML 2021), equation 4: from
    v = 0, `iterations` times v <- v + mean((v_k - v) min(1, radius / |v_k - v|)).

    once: one iteration, which is the norm bound of Sun et al., Can You Really Backdoor Federated Learning? (2019).
    """
    v: Moves = {name: np.zeros_like(move) for name, move in updates[0].moves.items()}
    for _ in range(1 if once else settings.iterations):
        apart = [Update(u.weight, {n: m - v[n] for n, m in u.moves.items()}) for u in updates]
        zero = {name: np.zeros_like(value) for name, value in v.items()}
        lengths = [distance(u, zero) for u in apart]
        step = weighted_mean(apart, [min(1.0, settings.radius / far) if far else 1.0 for far in lengths])
        v = {name: value + step[name] for name, value in v.items()}
    return v


def by_flower(make: Callable[[Settings], FlowerFedAvg], updates: Sequence[Update], settings: Settings) -> Moves:
    """Let a Flower strategy combine the moves, as if they were models."""
    replies: list[tuple[Arrays, dict[str, float]]] = [
        ({**update.moves}, {"num-examples": update.weight}) for update in updates
    ]
    return Named(aggregated(make(settings), 0, replies))


def bulyan(updates: Sequence[Update], settings: Settings) -> Moves:
    """El Mhamdi et al. 2018, section 4: theta = n - 2 byzantine times, choose one of the remaining updates by Krum;
    then, for each coordinate, average the theta - 2 byzantine chosen values nearest to their median."""
    left = [(RecordDict({"arrays": to_record(update.moves)}), update) for update in updates]
    chosen: list[Update] = []
    theta = len(updates) - 2 * settings.byzantine
    while len(chosen) < theta:
        (best,) = select_multikrum([content for content, _ in left], settings.byzantine, 1)
        chosen += [update for content, update in left if content is best]
        left = [pair for pair in left if pair[0] is not best]
    columns = [[update.moves[name] for name in updates[0].moves] for update in chosen]
    medians = [np.median(column, axis=0) for column in zip(*columns, strict=True)]
    nearest = aggregate_n_closest_weights(medians, columns, theta - 2 * settings.byzantine)
    return dict(zip(updates[0].moves, nearest, strict=True))


def multi_krum(updates: Sequence[Update], settings: Settings) -> Moves:
    """Flower's Multi-Krum; keep = 0 keeps all but `byzantine` updates."""
    keep = settings.keep or max(1, len(updates) - settings.byzantine)
    krum = MultiKrum(num_malicious_nodes=settings.byzantine, num_nodes_to_select=keep)
    return by_flower(lambda _: krum, updates, settings)


def _algorithm(combine: Combine, least: Callable[[int], int] = lambda byzantine: 1, *rules: Rule) -> Algorithm:
    return Algorithm(partial(Robust, combine=combine, least=least), buckets=True, least_updates=least, rules=rules)


def _for_krum(byzantine: int) -> int:
    """Blanchard et al. 2017, proposition 4.2."""
    return 2 * byzantine + 3


_KEEP = Rule(
    ("strategy.keep", "strategy.name"),
    lambda e: e.partition.clients > 0 and e.strategy.keep > update_count(e),
    lambda e: f"that is more than the {update_count(e)} updates of a cohort",
    "write a smaller value, or a larger cohort",
    ("strategy.name=multi-krum", "strategy.keep=8", "partition.clients=7", "cohort.fraction=1"),
    ("strategy.name=multi-krum", "strategy.keep=7", "partition.clients=7", "cohort.fraction=1"),
)

MEDIAN = _algorithm(partial(by_flower, lambda s: FedMedian()))
TRIMMED_MEAN = _algorithm(partial(by_flower, lambda s: FedTrimmedAvg(beta=s.trim)))
KRUM = _algorithm(partial(by_flower, lambda s: Krum(num_malicious_nodes=s.byzantine)), _for_krum)
MULTI_KRUM = _algorithm(multi_krum, _for_krum, _KEEP)
BULYAN = _algorithm(bulyan, lambda byzantine: 4 * byzantine + 3)  # El Mhamdi et al. 2018
GEOMETRIC_MEDIAN = _algorithm(geometric_median)
CENTRED_CLIPPING = _algorithm(centred_clipping)
NORM_BOUND = _algorithm(partial(centred_clipping, once=True))
