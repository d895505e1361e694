"""Audit of example-level DP: canaries and the experiment's own model go through the client's training loop."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from meadow.client.loop.training import Training, train
from meadow.client.release import Ledgers, PrivateRelease, charge
from meadow.config.cohort import participations
from meadow.config.schema import Experiment
from meadow.experiments.audit.settings import CANARIES, LONG, MOST_STEPS, changed, unbudgeted
from meadow.privacy.accounting import epsilon
from meadow.privacy.dpsgd.choose import GradSample, chosen_mode
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.noise import Stream
from meadow.privacy.plan import steps_a_round
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
from meadow.strategies.roles import roles_of
from meadow.tasks.data import Data, Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task


class _Canaries(nn.Module):
    """A linear model in which each sample changes only its own coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"canary": nn.Linear(CANARIES, 1, bias=False)})
        nn.init.zeros_(self.heads["canary"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"canary": self.heads["canary"](x)}


def checks(experiment: Experiment, task: Task) -> list[Check]:
    """Check noise, clip, sampling and epsilon with canaries; then how far one record moves the experiment's own model."""
    # Turn off what is applied after the noise or is no part of the mechanism.
    mode = _mode(experiment, task)
    plain = changed(experiment, local__clip_norm=0.0, local__lr=1e-6, local__weight_decay=0.0, task__augment=())
    busiest = int(np.argmax(participations(experiment)))
    with tempfile.TemporaryDirectory() as folder:
        ledgers = Ledgers(plain, Path(folder), "canaries", "audit", True)
        rounds = max(1, min(participations(experiment)[busiest], MOST_STEPS // steps_a_round(plain)))
        allowed = [charge(ledgers, None, r, busiest, {}) for r in range(1, rounds + 1)]
        permits = [replace(_permit(one), grad_sample=mode) for one in allowed]
        mechanism = permits[0].mechanism
        included = numpy_generator(experiment.run.seed, "audit").random(CANARIES) < 0.5
        scores = np.concatenate([_canaries(plain, task, included, one) for one in permits])
        silent = replace(mechanism, noise_multiplier=0.0, steps=max(mechanism.steps, min(200, MOST_STEPS)))
        bare = _canaries(plain, task, included, replace(permits[0], mechanism=silent, _taken=0))
        rate, noise, delta = mechanism.sample_rate, mechanism.noise_multiplier, experiment.privacy.delta
        longest = float(np.abs(bare).max())
        found = [
            *canary_checks(scores, included, rate, noise),
            *sampling_checks(np.abs(bare[:, included]) > 0.5, rate),
            Check("longest part of a canary", "1 clip", f"{longest:.4g}", None, longest <= 1 + 1e-4),
        ]
        claimed = epsilon([(rate, noise, len(scores))], delta, experiment.privacy.accountant)
        found += bound_checks(scores.sum(0), included, claimed, delta)
        found += _probe(plain, task, busiest, mechanism, mode)
        others = [c for c, times in enumerate(participations(experiment)) if times and c != busiest]
        who, when = (others[0], 1) if others else (busiest, rounds + 1)
        another = charge(replace(ledgers, experiment=unbudgeted(plain, noise)), None, when, who, {})
        found += _noise(plain, task, allowed[0], another, mode)
    return found


def _mode(experiment: Experiment, task: Task) -> GradSample:
    """How the run computes per-example gradients; this depends on its trained parameters."""
    model = _quiet(task).new_model()
    learning = roles_of(experiment, model).trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    return chosen_mode(model, experiment.privacy.grad_sample)


def _permit(allowed: PrivateRelease) -> Permit:
    assert allowed.permit is not None
    return allowed.permit


def _canaries(experiment: Experiment, task: Task, included: np.ndarray, permit: Permit) -> Floats:
    """Each canary's coordinate of each step's private gradient, (steps, canaries), in units of the clip."""
    x = LONG * permit.mechanism.clip * torch.eye(CANARIES)[torch.from_numpy(included)]
    target = Target("canary", "quantiles", 1, quantiles=(0.5,))  # the pinball loss has a constant gradient
    data = Data(x, {"canary": torch.full((len(x),), 1e6)})
    small = replace(task, targets=(target,), weights=(1.0,), pipeline=None)
    seen = _watched(_Canaries(), data, small, experiment, permit)
    return np.stack([step["heads.canary.weight"].ravel() for step in seen]) / -permit.mechanism.clip


def _watched(
    model: nn.Module, data: Data, task: Task, experiment: Experiment, permit: Permit
) -> list[dict[str, Floats]]:
    """Train, and return each step's noised sum of gradients by parameter, as the optimiser receives it."""
    steps: list[dict[str, Floats]] = []

    def watch(learning: Mapping[str, nn.Parameter]) -> None:
        scale = permit.mechanism.denominator
        steps.append({n: scale * p.grad.detach().double().numpy() for n, p in learning.items() if p.grad is not None})

    train(model, Training(data, 1, 0, experiment.local, correct=watch, permit=permit), task, experiment)
    return steps


def _quiet(task: Task) -> Task:
    """The task without augmentation, whose randomness would hide the effect of a record."""
    pipeline = replace(task.pipeline, steps=()) if task.pipeline is not None else None
    return replace(task, pipeline=pipeline)


def _probe(experiment: Experiment, task: Task, who: int, mechanism: Mechanism, mode: GradSample) -> list[Check]:
    """Without noise: how far one record moves the sum of gradients, and whether buffers change."""
    model, quiet = _model(experiment, task)
    data = quiet.pool() if experiment.run.placement == "pooled" else quiet.client(who).train
    size = min(len(data), 24)
    silent = replace(mechanism, sample_rate=1.0, noise_multiplier=0.0, denominator=1.0, steps=1)
    start = state_of(model)

    def total(indices: list[int]) -> Floats:
        load_into(model, start)
        permit = Permit(silent, Stream(0), Stream(0), mode)
        (step,) = _watched(model, data.take(torch.tensor(indices)), quiet, experiment, permit)
        return np.concatenate([step[name].ravel() for name in sorted(step)])

    everyone = list(range(size))
    whole = total(everyone)
    moves = [float(np.linalg.norm(whole - total([i for i in everyone if i != j]))) for j in everyone[:8]]
    buffers = {n for n, b in model.named_buffers() if not np.array_equal(state_of(model).get(n, b.numpy()), start[n])}
    largest = max(moves) / mechanism.clip
    return [
        Check("largest effect of one record", "1 clip", f"{largest:.4g}", None, largest <= 1 + 1e-3),
        Check("statistics that depend on the data", "none", ", ".join(sorted(buffers)) or "none", None, not buffers),
    ]


def _model(experiment: Experiment, task: Task) -> tuple[nn.Module, Task]:
    quiet = _quiet(task)
    model = quiet.new_model()
    load_into(model, initial_state(experiment))
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model, quiet


def _noise(
    experiment: Experiment, task: Task, one: PrivateRelease, another: PrivateRelease, mode: GradSample
) -> list[Check]:
    """Steps without a sample: only noise, of the claimed deviation in each array, normal, and independent."""
    model, quiet = _model(experiment, task)
    data = quiet.client(0).train
    draws = []
    for allowed in (one, another):
        permit = _permit(allowed)
        nobody = replace(permit.mechanism, sample_rate=1e-12, steps=2)
        load_into(model, initial_state(experiment))
        noise = Stream(allowed.noise_seed)
        draws += _watched(model, data, quiet, experiment, Permit(nobody, Stream(0), noise, mode))
    mechanism = _permit(one).mechanism
    z = [{name: value / mechanism.clip for name, value in draw.items()} for draw in draws]
    checks = [
        noise_check(
            f"noise on {name}", np.concatenate([draw[name].ravel() for draw in z[:2]]), mechanism.noise_multiplier
        )
        for name in z[0]
    ]
    flat = [np.concatenate([draw[name].ravel() for name in sorted(draw)]) / mechanism.noise_multiplier for draw in z]
    return [
        *checks,
        normality_check("noise", np.concatenate(flat[:2])),
        independence_check("noise of two steps", flat[0], flat[1]),
        independence_check("noise of two releases", flat[0], flat[2]),
    ]
