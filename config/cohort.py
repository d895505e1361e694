"""Who takes part when: a function of the experiment (and of public facts), which both sides of a run, and an account before
it, know."""

import functools
import math
from collections.abc import Sequence

from config.schema import Experiment
from config.seeds import numpy_generator


@functools.lru_cache(maxsize=8)
def unseen(experiment: Experiment) -> frozenset[int]:
    """The clients that no cohort ever has: `evaluate.unseen` of all, rounded, drawn from the seed."""
    clients = experiment.partition.clients
    order = numpy_generator(experiment.run.seed, "unseen").permutation(clients)
    return frozenset(int(c) for c in order[: clients - experiment.participants])


def draw_cohort(
    experiment: Experiment,
    round_: int,
    sizes: Sequence[int] = (),
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
    cohort, hidden = experiment.cohort, unseen(experiment)
    everyone = [c for c in range(experiment.partition.clients) if c not in hidden]
    if cohort.sampling == "schedule":
        return sorted(schedule[round_ - 1])
    path = (round_,) if attempt == 1 else (round_, attempt)
    wanted = min(len(everyone), math.ceil(experiment.cohort_size * (1 + cohort.over_selection)))
    if wanted == len(everyone):
        return everyone
    draw = numpy_generator(experiment.run.seed if secret is None else secret, "cohort", *path)
    if cohort.sampling == "poisson":
        chance = experiment.cohort_size / len(everyone)
        return [c for c, u in zip(everyone, draw.random(len(everyone)).tolist(), strict=True) if u < chance]
    shares = [sizes[c] / sum(sizes[c] for c in everyone) for c in everyone] if cohort.sampling == "size" else None
    return sorted(int(c) for c in draw.choice(everyone, wanted, replace=False, p=shares))


@functools.lru_cache(maxsize=8)
def participations(experiment: Experiment) -> tuple[int, ...]:
    """How many rounds of the whole run each client is drawn for."""
    counts = [0] * (1 if experiment.run.placement == "pooled" else experiment.partition.clients)
    for round_ in range(1, experiment.run.rounds + 1):
        for client in draw_cohort(experiment, round_):
            counts[client] += 1
    return tuple(counts)
