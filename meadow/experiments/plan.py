"""The cost of a run before it runs: rounds, optimiser steps and bytes, exact if all clients reply."""

import statistics
from pathlib import Path
from typing import Any

from meadow.arrays.named import flat, nbytes
from meadow.client.rehearsal import forecast
from meadow.config.cohort import draw_cohort
from meadow.config.schema import Experiment
from meadow.experiments.folds import fold_runs
from meadow.privacy.plan import claim, forecasts, steps_a_round
from meadow.server.cohorts import read_schedule
from meadow.server.session import setup
from meadow.strategies import algorithm, check, server_of
from meadow.strategies.roles import roles_of
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task, settle


def plan(experiment: Experiment) -> dict[str, Any]:
    """Rounds, cohort, clients and samples; parameters by role; steps and bytes of the whole run (`summary.json`'s cost).

    Bytes count the arrays, as if each client had its own message. For a cross-validation, rounds, steps and bytes are sums
    over its `runs`, the rest is that of the first fold. Raises UserError as a run would.
    """
    experiment = settle(experiment)
    check(experiment)
    folds = [_plan(fold) for fold, _ in fold_runs(experiment, Path())]
    totals = {key: sum(one[key] for one in folds) for key in ("rounds", "steps", "bytes_up", "bytes_down")}
    return {"runs": len(folds)} | folds[0] | totals


def _plan(experiment: Experiment) -> dict[str, Any]:
    task, start = open_task(experiment), initial_state(experiment)
    model = task.new_model()
    parts, chosen = roles_of(experiment, model), algorithm(experiment.strategy.name)
    pooled = experiment.run.placement == "pooled"
    sizes = [len(task.pool())] if pooled else [len(c.train) for c in task.split.clients]
    schedule = read_schedule(experiment)
    cohorts = [draw_cohort(experiment, r, sizes, schedule) for r in range(1, experiment.run.rounds + 1)]
    local = experiment.local
    if experiment.privacy.unit == "example":
        local = local.model_copy(update={"steps": steps_a_round(experiment)})
    steps = [chosen.client.steps(experiment.strategy, local, n) for n in sizes]
    arrays = {n: start[n] for n in parts.shared}
    server = server_of(setup(experiment, task, parts))
    auxiliary = server.auxiliary(server.init(arrays), arrays)
    shared = 0 if pooled else nbytes(arrays | flat(auxiliary))
    own = start if chosen.own_start else (*parts.personal, *parts.fixed)
    once = nbytes({n: start[n] for n in own}) if experiment.task.pretrained else 0
    asked = sum(len(c) for c in cohorts)
    return {
        "rounds": experiment.run.rounds,
        "clients": experiment.partition.clients,
        "cohort": len(cohorts[0]),
        "training_samples": sum(sizes),
        "parameters": {
            role: int(sum(start[n].size for n in getattr(parts, role)))
            for role in ("trained", "shared", "personal", "fixed")
        },
        "steps": sum(steps[c] for cohort in cohorts for c in cohort),
        "bytes_up": shared * asked,
        "bytes_down": shared * asked + (0 if pooled else once * experiment.partition.clients),
        "training": [
            {"trainer": choice.trainer.name, "passed_over": dict(choice.reasons)}
            for choice in forecast(experiment, task, model, parts, chosen.client, auxiliary)
        ],
        "privacy": _privacy(experiment),
    }


def _privacy(experiment: Experiment) -> dict[str, Any]:
    """The privacy loss of the run with new ledgers: noise multipliers, and epsilon over the clients."""
    if experiment.privacy.unit == "none":
        return {"unit": "none", "epsilon": None}
    forecast = forecasts(experiment)
    spent = [epsilon for _, epsilon, _ in forecast]
    noise = [z for z, _, _ in forecast]
    return {
        "unit": experiment.privacy.unit,
        "noise": f"{min(noise):.4g} to {max(noise):.4g} times the clip",
        "epsilon": str(claim(experiment, max(spent))),
        "median epsilon": round(statistics.median(spent), 4),
        "clients that leave early": sum(early for _, _, early in forecast),
    }
