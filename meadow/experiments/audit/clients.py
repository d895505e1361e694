"""Audit of client-level and local DP: canary clients through the server's aggregation, canary updates through a client."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from meadow.arrays.named import Arrays
from meadow.client.release import Ledgers, charge, noised_update
from meadow.config.cohort import draw_cohort, participations
from meadow.config.schema import Experiment
from meadow.experiments.audit.settings import CANARIES, LONG, changed, unbudgeted
from meadow.privacy.accounting import epsilon
from meadow.privacy.client_level import update_noise
from meadow.privacy.plan import client_cost, client_denominator, client_noise
from meadow.privacy.statistics import (
    Check,
    Floats,
    bound_checks,
    canary_checks,
    independence_check,
    noise_check,
    normality_check,
    sampling_checks,
)
from meadow.runtime.seeds import numpy_generator
from meadow.server.client_level import ClientLevel, adaptive
from meadow.tasks.task import Task


def central_checks(experiment: Experiment, task: Task) -> list[Check]:
    """Client-level DP: how far each canary client's update is visible in each round's model."""
    size = max(1, round(experiment.cohort_size / experiment.participants * CANARIES))
    rate = size / CANARIES
    z, rounds = client_noise(experiment), min(experiment.run.rounds, 60)
    many = changed(
        experiment,
        partition__clients=CANARIES,
        cohort__size=size,
        evaluate__unseen=0.0,
        privacy__noise_multiplier=z,
        privacy__epsilon=0.0,
        privacy__denominator=experiment.privacy.denominator,
    )
    included = numpy_generator(experiment.run.seed, "audit").random(CANARIES) < 0.5
    hits = np.array([np.isin(np.arange(CANARIES), draw_cohort(many, r)) for r in range(1, rounds + 1)])
    scores, noise = _combined(many, z, hits & included), z
    if experiment.privacy.adaptive_clip:
        noise = update_noise(z, adaptive(many).count_noise)
    silent = _combined(many, 0.0, hits & included)
    longest = float(np.abs(silent).max())
    checks = [
        *canary_checks(scores, included, rate, noise),
        Check("longest part of a canary", "1 clip", f"{longest:.4g}", None, longest <= 1 + 1e-4),
        normality_check("noise", scores[:, ~included].ravel() / noise),
        independence_check("noise of two rounds", scores[0, ~included], scores[-1, ~included]),
    ]
    if experiment.cohort.sampling == "poisson":
        checks += sampling_checks(hits, rate)
    claimed, delta = client_cost(many, z, rounds).epsilon, experiment.privacy.delta
    return checks + bound_checks(scores.sum(0), included, claimed, delta)


def _combined(experiment: Experiment, z: float, hits: np.ndarray) -> Floats:
    """Each canary client's coordinate of each round's model change, (rounds, canaries), in units of the clip."""
    guard = ClientLevel(experiment, ("w",), z)
    guard.begin(True, None)
    model: Arrays = {"w": np.zeros(CANARIES, np.float64)}
    scores = []
    for round_, row in enumerate(hits, 1):
        bound = guard.bound
        updates: list[Arrays] = []
        for number in np.flatnonzero(row):
            update = model["w"].copy()
            update[number] += LONG * bound
            updates.append({"w": update})
        after = guard.combine(model, updates, round_)
        scores.append(_change(after, model) * client_denominator(experiment) / bound)
        model = after
    return np.stack(scores)


def _change(after: Arrays, before: Arrays) -> Floats:
    return np.asarray(after["w"], np.float64) - np.asarray(before["w"], np.float64)


def local_checks(experiment: Experiment, task: Task) -> list[Check]:
    """Local DP: how well noised updates distinguish two opposite data sets of one client."""
    bound, times, delta = experiment.privacy.clip, 400, experiment.privacy.delta
    busiest = int(np.argmax(participations(experiment)))
    with tempfile.TemporaryDirectory() as folder:
        ledgers = Ledgers(experiment, Path(folder), "canaries", "audit", True)
        z = charge(ledgers, None, 1, busiest, {}).noise_multiplier
        free = unbudgeted(experiment, z)
        included = numpy_generator(experiment.run.seed, "audit").random(times) < 0.5
        before: Arrays = {"w": np.zeros(200, np.float64)}
        rows = []
        for round_, positive in enumerate(included, 1):
            after = {"w": before["w"].copy()}
            after["w"][0] = (1 if positive else -1) * LONG * bound  # opposite updates, the worst case
            own = replace(ledgers, experiment=free, root=Path(folder) / str(round_))  # each release has its own ledger
            allowed = charge(own, None, round_, busiest, before)
            rows.append(_change(noised_update(free, allowed, before, after), before) / bound)
    scores = np.stack(rows)
    bare = _change(noised_update(free, replace(allowed, noise_multiplier=0.0), before, after), before)
    longest = float(np.linalg.norm(bare)) / bound
    return [
        noise_check("noise multiplier", scores[:, 1:].ravel(), z),
        normality_check("noise", scores[:, 1:].ravel() / z),
        independence_check("noise of two releases", scores[0, 1:], scores[1, 1:]),
        Check("longest update", "1 clip", f"{longest:.4g}", None, longest <= 1 + 1e-6),
        *bound_checks(scores[:, 0], included, epsilon([(1.0, z / 2, 1)], delta), delta),
    ]
