"""Which clients take part in which round: a function of the experiment and of public facts, so that server, clients and
privacy accounting agree on it."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from meadow.config.schema import Experiment
from meadow.runtime.seeds import numpy_generator


@functools.lru_cache(maxsize=8)
def unseen(experiment: Experiment) -> frozenset[int]:
    """The clients kept out of every cohort: the rounded share `evaluate.unseen` of all, drawn from the seed."""
    clients = experiment.partition.clients
    if experiment.participants == clients:
        return frozenset()
    order = numpy_generator(experiment.run.seed, "unseen").permutation(clients)
    return frozenset(int(c) for c in order[: clients - experiment.participants])


def draw_cohort(
    experiment: Experiment,
    round_: int,
    sizes: Sequence[int] | npt.NDArray[np.int64] = (),
    schedule: Sequence[Sequence[int]] = (),
    attempt: int = 1,
    secret: int | None = None,
) -> list[int]:
    """The clients asked to train in a round, ascending; never unseen ones. Without federation, all that train.

    Each kind of `cohort.sampling` is explained in the schema; "size" alone uses `sizes` (training samples of all clients),
    "schedule" alone uses `schedule` (clients of each round). The first attempt at a round draws from (seed, "cohort",
    round), later ones from (seed, "cohort", round, attempt). `secret` replaces run.seed where nobody may predict the
    cohort, as privacy amplification by sampling requires.
    """
    if experiment.run.placement == "pooled":
        return [0]
    cohort, everyone = experiment.cohort, _participants(experiment)
    if cohort.sampling == "schedule":
        return sorted(schedule[round_ - 1])
    path = (round_,) if attempt == 1 else (round_, attempt)
    wanted = min(len(everyone), math.ceil(experiment.cohort_size * (1 + cohort.over_selection)))
    if wanted == len(everyone):
        return [int(c) for c in everyone]
    draw = numpy_generator(experiment.run.seed if secret is None else secret, "cohort", *path)
    if cohort.sampling == "poisson":
        chance = experiment.cohort_size / len(everyone)
        return [int(everyone[int(i)]) for i in np.flatnonzero(draw.random(len(everyone)) < chance)]
    shares = None
    if cohort.sampling == "size":
        own = np.asarray(sizes)[np.asarray(everyone)]
        shares = own / own.sum()
    # choice(n) without p uses Floyd's algorithm for small samples: memory grows with the cohort, not with all clients.
    return sorted(int(everyone[int(i)]) for i in draw.choice(len(everyone), wanted, replace=False, p=shares))


@functools.lru_cache(maxsize=2)
def _participants(experiment: Experiment) -> Sequence[int] | npt.NDArray[np.int64]:
    """The clients that may be in a cohort, ascending."""
    everyone = range(experiment.partition.clients)
    hidden = unseen(experiment)
    return np.delete(np.asarray(everyone), sorted(hidden)) if hidden else everyone


@functools.lru_cache(maxsize=8)
def participations(experiment: Experiment) -> tuple[int, ...]:
    """The number of rounds that each client is drawn for in the whole run."""
    counts = [0] * (1 if experiment.run.placement == "pooled" else experiment.partition.clients)
    for round_ in range(1, experiment.run.rounds + 1):
        for client in draw_cohort(experiment, round_):
            counts[client] += 1
    return tuple(counts)
