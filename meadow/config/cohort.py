"""Who takes part when: a function of the experiment (and of public facts), which both sides of a run, and an account before
it, know."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from meadow.config.schema import Experiment
from meadow.runtime.seeds import numpy_generator


@functools.lru_cache(maxsize=8)
def unseen(experiment: Experiment) -> frozenset[int]:
    """The clients that no cohort ever has: `evaluate.unseen` of all, rounded, drawn from the seed."""
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
    """The clients asked in a round, ascending, unseen ones never. Without federation, whoever trains at all.

    "fixed": so many, without replacement; "poisson": each on its own with probability cohort size / participants; "size":
    so many, the chance of each by its training samples (`sizes`, which the others do not look at); "schedule": as
    `schedule` says. The first attempt at a round draws from (seed, "cohort", round), the next ones from (seed, "cohort",
    round, attempt). `secret` takes the place of run.seed where who takes part must not be foretold: amplification by
    sampling holds only then.
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
    # Of many clients few are drawn without a list of all: NumPy's choice of few out of many (Floyd) takes the few's memory.
    return sorted(int(everyone[int(i)]) for i in draw.choice(len(everyone), wanted, replace=False, p=shares))


@functools.lru_cache(maxsize=2)
def _participants(experiment: Experiment) -> Sequence[int] | npt.NDArray[np.int64]:
    """The clients that a cohort may have, ascending."""
    everyone = range(experiment.partition.clients)
    hidden = unseen(experiment)
    return np.delete(np.asarray(everyone), sorted(hidden)) if hidden else everyone


@functools.lru_cache(maxsize=8)
def participations(experiment: Experiment) -> tuple[int, ...]:
    """How many rounds of the whole run each client is drawn for."""
    counts = [0] * (1 if experiment.run.placement == "pooled" else experiment.partition.clients)
    for round_ in range(1, experiment.run.rounds + 1):
        for client in draw_cohort(experiment, round_):
            counts[client] += 1
    return tuple(counts)
