"""`meadow audit`: measures the mechanism of this experiment, through the code that trains, against what it claims.

Example-level: canaries and the experiment's own model go through `meadow.client.loop.training.train` with the permits
that a client's ledger gives. Client-level: canary clients go through the server's own combination. Local: canary
updates through the client's. Then a short run of the experiment itself: what was trained against what the ledgers say.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor, nn

import meadow.client.node
from meadow.arrays.flower import to_record
from meadow.arrays.named import Arrays
from meadow.client.context import LocalContext
from meadow.client.loop.training import train
from meadow.client.release import Allowed, Keeper, charge, noised_update
from meadow.config.cohort import draw_cohort, participations
from meadow.config.load import apply, to_tree
from meadow.config.schema import Experiment
from meadow.privacy.accounting import epsilon
from meadow.privacy.client_level import update_noise
from meadow.privacy.dpsgd import GradSample, Mechanism, Permit, chosen_mode
from meadow.privacy.noise import Stream
from meadow.privacy.plan import claim, client_cost, client_denominator, client_noise, steps_a_round
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
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator, one_thread
from meadow.server.folder import RunFolder
from meadow.server.protection import Protection, adaptive, protection
from meadow.simulation.launch import engine
from meadow.strategies import algorithm, check
from meadow.strategies.check import resolve
from meadow.strategies.roles import roles_of
from meadow.strategies.wire.packing import Answer
from meadow.tasks.data import Data, Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.task import Task, initial_state, open_task, settle

CANARIES = 1000
_LONG = 100.0
"""A canary's gradient or update before the clip, in clips."""
_MOST_STEPS = 600


def audit(experiment: Experiment) -> list[Check]:
    """All checks of an experiment under DP. Raises UserError if nothing is claimed, or if the run would be refused."""
    experiment = settle(experiment)
    check(experiment)
    if experiment.privacy.unit == "none":
        raise UserError('privacy.unit = "none": nothing is claimed, so there is nothing to audit')
    task = open_task(experiment)
    protection(experiment, task, roles_of(experiment, task.new_model()))
    parts = {"example": _example, "client": _client, "local": _local}
    with one_thread():
        return [*parts[experiment.privacy.unit](experiment, task), *_ledgers(experiment)]


def _changed(experiment: Experiment, **settings: Any) -> Experiment:
    """The experiment with other values, `section__key=value`."""
    return resolve(apply(to_tree(experiment), [(key.replace("__", "."), value) for key, value in settings.items()]))


def _unbudgeted(experiment: Experiment, noise: float) -> Experiment:
    return _changed(experiment, privacy__noise_multiplier=noise, privacy__epsilon=0.0, privacy__budgets="")


# ---- example-level ----


class _Canaries(nn.Module):
    """A linear model in which a sample touches its own coordinate alone."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"canary": nn.Linear(CANARIES, 1, bias=False)})
        nn.init.zeros_(self.heads["canary"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"canary": self.heads["canary"](x)}


def _example(experiment: Experiment, task: Task) -> list[Check]:
    # What comes after the noise, or is none of the mechanism's, is taken out of the way.
    mode = _mode(experiment, task)
    plain = _changed(experiment, local__clip_norm=0.0, local__lr=1e-6, local__weight_decay=0.0, task__augment=())
    busiest = int(np.argmax(participations(experiment)))
    with tempfile.TemporaryDirectory() as folder:
        keeper = Keeper(plain, Path(folder), "canaries", "audit", True)
        rounds = max(1, min(participations(experiment)[busiest], _MOST_STEPS // steps_a_round(plain)))
        allowed = [charge(keeper, RecordDict(), r, busiest, {}) for r in range(1, rounds + 1)]
        permits = [replace(_permit(one), grad_sample=mode) for one in allowed]
        mechanism = permits[0].mechanism
        included = numpy_generator(experiment.run.seed, "audit").random(CANARIES) < 0.5
        scores = np.concatenate([_canaries(plain, task, included, one) for one in permits])
        silent = replace(mechanism, noise_multiplier=0.0, steps=max(mechanism.steps, min(200, _MOST_STEPS)))
        bare = _canaries(plain, task, included, replace(permits[0], mechanism=silent, _taken=0))
        rate, noise, delta = mechanism.sample_rate, mechanism.noise_multiplier, experiment.privacy.delta
        longest = float(np.abs(bare).max())
        checks = [
            *canary_checks(scores, included, rate, noise),
            *sampling_checks(np.abs(bare[:, included]) > 0.5, rate),
            Check("longest part of a canary", "1 clip", f"{longest:.4g}", None, longest <= 1 + 1e-4),
        ]
        claimed = epsilon([(rate, noise, len(scores))], delta, experiment.privacy.accountant)
        checks += bound_checks(scores.sum(0), included, claimed, delta)
        checks += _probe(plain, task, busiest, mechanism, mode)
        others = [c for c, times in enumerate(participations(experiment)) if times and c != busiest]
        who, when = (others[0], 1) if others else (busiest, rounds + 1)
        another = charge(replace(keeper, experiment=_unbudgeted(plain, noise)), RecordDict(), when, who, {})
        checks += _noise(plain, task, allowed[0], another, mode)
    return checks


def _mode(experiment: Experiment, task: Task) -> GradSample:
    """How the run has its clipped gradients: by what of its model learns."""
    model = _quiet(task).new_model()
    learning = roles_of(experiment, model).trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    return chosen_mode(model, experiment.privacy.grad_sample)


def _permit(allowed: Allowed) -> Permit:
    assert allowed.permit is not None
    return allowed.permit


def _canaries(experiment: Experiment, task: Task, included: np.ndarray, permit: Permit) -> Floats:
    """What each step's private gradient shows of each canary, in clips, (steps, canaries)."""
    x = _LONG * permit.mechanism.clip * torch.eye(CANARIES)[torch.from_numpy(included)]
    target = Target("canary", "quantiles", 1, quantiles=(0.5,))  # the pinball loss has a gradient that is a constant
    data = Data(x, {"canary": torch.full((len(x),), 1e6)})
    small = replace(task, targets=(target,), weights=(1.0,), pipeline=None)
    seen = _watched(_Canaries(), data, small, experiment, permit)
    return np.stack([step["heads.canary.weight"].ravel() for step in seen]) / -permit.mechanism.clip


def _watched(
    model: nn.Module, data: Data, task: Task, experiment: Experiment, permit: Permit
) -> list[dict[str, Floats]]:
    """Train, and return the sums that each step's gradient is the share of: before the optimiser, after the noise."""
    steps: list[dict[str, Floats]] = []

    def watch(learning: Mapping[str, nn.Parameter]) -> None:
        scale = permit.mechanism.denominator
        steps.append({n: scale * p.grad.detach().double().numpy() for n, p in learning.items() if p.grad is not None})

    train(model, data, task, experiment, 1, 0, correct=watch, permit=permit)
    return steps


def _quiet(task: Task) -> Task:
    """The task without augmentation: what is random beside the mechanism would hide what a record does."""
    pipeline = replace(task.pipeline, steps=()) if task.pipeline is not None else None
    return replace(task, pipeline=pipeline)


def _probe(experiment: Experiment, task: Task, who: int, mechanism: Mechanism, mode: GradSample) -> list[Check]:
    """Noise off, one record added: how far the sum moves, for several records of a client, and what moved beside it."""
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
        Check("largest move by one record added", "1 clip", f"{largest:.4g}", None, largest <= 1 + 1e-3),
        Check("statistics that follow the data", "none", ", ".join(sorted(buffers)) or "none", None, not buffers),
    ]


def _model(experiment: Experiment, task: Task) -> tuple[nn.Module, Task]:
    quiet = _quiet(task)
    model = quiet.new_model()
    load_into(model, initial_state(experiment))
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model, quiet


def _noise(experiment: Experiment, task: Task, one: Allowed, another: Allowed, mode: GradSample) -> list[Check]:
    """Steps that take nobody: noise alone, of the claimed deviation in each array, normal, and never the same twice."""
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


# ---- whole clients ----


def _client(experiment: Experiment, task: Task) -> list[Check]:
    size = max(1, round(experiment.cohort_size / experiment.participants * CANARIES))
    rate = size / CANARIES
    z, rounds = client_noise(experiment), min(experiment.run.rounds, 60)
    many = _changed(
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
    """What each round's model shows of each canary client, in clips, (rounds, canaries)."""
    guard = Protection(experiment, ("w",), bound=experiment.privacy.clip, noise_multiplier=z)
    guard.begin(True, None)
    model: Arrays = {"w": np.zeros(CANARIES, np.float64)}
    scores = []
    for round_, row in enumerate(hits, 1):
        bound = guard.bound
        answers = []
        for number in np.flatnonzero(row):
            update = model["w"].copy()
            update[number] += _LONG * bound
            answers.append(Answer(int(number), RecordDict({"arrays": to_record({"w": update})})))
        after = guard.combine(model, answers, round_)
        scores.append(_floats(after, model) * client_denominator(experiment) / bound)
        model = after
    return np.stack(scores)


def _floats(after: Arrays, before: Arrays) -> Floats:
    return np.asarray(after["w"], np.float64) - np.asarray(before["w"], np.float64)


# ---- local DP ----


def _local(experiment: Experiment, task: Task) -> list[Check]:
    bound, times, delta = experiment.privacy.clip, 400, experiment.privacy.delta
    busiest = int(np.argmax(participations(experiment)))
    with tempfile.TemporaryDirectory() as folder:
        keeper = Keeper(experiment, Path(folder), "canaries", "audit", True)
        z = charge(keeper, RecordDict(), 1, busiest, {}).noise_multiplier
        free = _unbudgeted(experiment, z)
        included = numpy_generator(experiment.run.seed, "audit").random(times) < 0.5
        before: Arrays = {"w": np.zeros(200, np.float64)}
        rows = []
        for round_, positive in enumerate(included, 1):
            after = {"w": before["w"].copy()}
            after["w"][0] = (1 if positive else -1) * _LONG * bound  # two data sets of a client differ in everything
            own = replace(keeper, experiment=free, root=Path(folder) / str(round_))  # each is a release by itself
            allowed = charge(own, RecordDict(), round_, busiest, before)
            rows.append(_floats(noised_update(free, allowed, before, after), before) / bound)
    scores = np.stack(rows)
    bare = _floats(noised_update(free, replace(allowed, noise_multiplier=0.0), before, after), before)
    longest = float(np.linalg.norm(bare)) / bound
    return [
        noise_check("noise multiplier", scores[:, 1:].ravel(), z),
        normality_check("noise", scores[:, 1:].ravel() / z),
        independence_check("noise of two releases", scores[0, 1:], scores[1, 1:]),
        Check("longest update", "1 clip", f"{longest:.4g}", None, longest <= 1 + 1e-6),
        *bound_checks(scores[:, 0], included, epsilon([(1.0, z / 2, 1)], delta), delta),
    ]


# ---- the ledgers ----


def _ledgers(experiment: Experiment) -> list[Check]:
    """A short run of the experiment: what was trained, and what the ledgers and the summary say of it."""
    unit = experiment.privacy.unit
    short: dict[str, Any] = {
        "run__rounds": min(3, experiment.run.rounds),
        "cohort__size": min(3, experiment.cohort_size),
        "engine__name": "inline",
        "evaluate__every": 1000,
    }
    if unit == "example":
        short |= {"local__steps": min(3, steps_a_round(experiment)), "cohort__sampling": "fixed"}
    if unit == "client" and experiment.privacy.adaptive_clip:
        short["cohort__size"] = experiment.cohort_size
    brief = _changed(experiment, **short)
    with tempfile.TemporaryDirectory() as folder, engine("inline") as launch:
        out = Path(folder) / "run"
        with _observing() as seen:
            launch(brief, out)
        summary = RunFolder(out).summary() or {}
        if unit == "client":
            rounds = int(summary["rounds"])
            truth = client_cost(brief, client_noise(brief), rounds).epsilon
            checks = [_reported(summary, truth, str(claim(brief, truth)))]
        else:
            checks = _charged(brief, out, summary, seen)
        return [*checks, _replayed(brief, out, launch)]


def _charged(experiment: Experiment, out: Path, summary: Mapping[str, Any], seen: list[dict[str, Any]]) -> list[Check]:
    by_client: dict[int, list[list[float]]] = {}
    for one in seen:
        by_client.setdefault(one["client"], []).append(one["part"])
    written: dict[int, list[list[float]]] = {}
    for path in (out / "state").rglob("client-*.ledger"):
        entries = [json.loads(line) for line in path.read_text().splitlines()][1:]
        written[int(path.name.split("-")[1])] = [part for entry in entries for part in entry["parts"]]
    missing = sum(written.get(c, []) != parts for c, parts in by_client.items())
    privacy = experiment.privacy
    costs = [epsilon([(q, s, int(n)) for q, s, n in p], privacy.delta, privacy.accountant) for p in by_client.values()]
    bare = sorted({name for one in seen for name in one["bare"]})
    checks = [
        Check(
            "entries of the ledgers",
            f"all {len(seen)} releases, in order",
            "they agree" if not missing else f"{missing} of {len(by_client)} clients' do not agree",
            None,
            not missing,
        ),
        _reported(summary, max(costs, default=0.0), "of all that was trained"),
    ]
    if privacy.unit == "example":
        said = ", ".join(bare) or "none"
        checks.append(Check("arrays trained without noise", "none", said, None, not bare))
    return checks


def _reported(summary: Mapping[str, Any], truth: float, what: str) -> Check:
    said = summary["privacy"]["epsilon"]["max"] or 0.0
    return Check("epsilon in the summary", f"{truth:.6g}, {what}", f"{said:.6g}", None, said >= truth * (1 - 1e-9))


def _replayed(experiment: Experiment, out: Path, launch: Callable[..., Any]) -> Check:
    """The last round made again, as after a crash: the same release, or another one that is charged."""
    before = RunFolder(out).summary() or {}
    entries = sum(path.read_text().count("\n") for path in (out / "state").rglob("client-*.ledger"))
    rounds = int(before["rounds"])
    for path in [out / "summary.json", *(out / "checkpoints").glob(f"round-{rounds:08d}.*")]:
        path.unlink(missing_ok=True)
    launch(experiment, out, resume=True)
    after = RunFolder(out).summary() or {}
    more = sum(path.read_text().count("\n") for path in (out / "state").rglob("client-*.ledger")) - entries
    same = after["model_sha256"] == before["model_sha256"] and after["personal_sha256"] == before["personal_sha256"]
    found = "the same bits" if same else f"other bits, {more} more entries"
    return Check("a round made again", "the same release", found, None, same)


@contextmanager
def _observing() -> Iterator[list[dict[str, Any]]]:
    """What every training of a client does, written down beside it: its client, its release, and what moved without noise.

    A training that the algorithm says leaves nothing (a personal model of its own, as Ditto's) is no release.
    """
    seen: list[dict[str, Any]] = []
    honest, room = LocalContext.fit, vars(meadow.client.node)
    honest_noise = room["noised_update"]

    def fit(context: LocalContext, *, correct: Any = None, leaves: bool = True, **more: Any) -> Any:
        before = {name: p.detach().clone() for name, p in context.model.named_parameters()}
        learning: set[str] = set()

        def watch(now: Mapping[str, nn.Parameter]) -> None:
            learning.update(now)
            if correct is not None:
                correct(now)

        trained = honest(context, correct=watch, leaves=leaves, **more)
        if not leaves and algorithm(context.settings.name).own_model:
            return trained
        moved = {name for name, p in context.model.named_parameters() if not torch.equal(p, before[name])}
        part = [0.0, 0.0, 0]
        if context.permit is not None and leaves:
            mechanism = context.permit.mechanism
            part, moved = [mechanism.sample_rate, mechanism.noise_multiplier, trained.steps], moved - learning
        seen.append({"client": context.client, "part": part, "bare": moved})
        return trained

    def noised(whole: Experiment, allowed: Allowed, *arrays: Arrays) -> Arrays:
        seen[-1] |= {"part": [1.0, allowed.noise_multiplier / 2, 1]}
        return dict(honest_noise(whole, allowed, *arrays))

    LocalContext.fit = fit  # type: ignore[method-assign, assignment]
    room |= {"noised_update": noised}
    try:
        yield seen
    finally:
        LocalContext.fit = honest  # type: ignore[method-assign]
        room |= {"noised_update": honest_noise}
