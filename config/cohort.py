"""Who takes part when: a function of the experiment alone, which both sides of a run, and an account before it, know."""

import functools

from config.schema import Experiment
from config.seeds import numpy_generator


def draw_cohort(experiment: Experiment, round_: int, secret: int | None = None) -> list[int]:
    """The clients of a round, ascending: a function of (run.seed, round). Without federation, whoever trains at all.

    "fixed": so many, without replacement; "poisson": each on its own with probability cohort size / clients. `secret`
    takes the place of run.seed where who takes part must not be foretold: amplification by sampling holds only then.
    """
    if experiment.run.placement == "pooled":
        return [0]
    everyone = experiment.partition.clients
    if experiment.cohort_size == everyone:
        return list(range(everyone))
    draw = numpy_generator(experiment.run.seed if secret is None else secret, "cohort", round_)
    if experiment.cohort.sampling == "poisson":
        chance = experiment.cohort_size / everyone
        return [client for client, u in enumerate(draw.random(everyone).tolist()) if u < chance]
    return sorted(int(c) for c in draw.choice(everyone, experiment.cohort_size, replace=False))


@functools.lru_cache(maxsize=8)
def participations(experiment: Experiment) -> tuple[int, ...]:
    """How many rounds of the whole run each client is drawn for."""
    counts = [0] * (1 if experiment.run.placement == "pooled" else experiment.partition.clients)
    for round_ in range(1, experiment.run.rounds + 1):
        for client in draw_cohort(experiment, round_):
            counts[client] += 1
    return tuple(counts)
