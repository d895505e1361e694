"""How local training steps: the optimisers' formulas, the rates over the rounds, clipping, early stopping, smoothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.rounding import close, floats, in_double, stepped
from helpers.runs import run_inline, small
from meadow.arrays.files import read_arrays
from meadow.arrays.named import Arrays
from meadow.client.loop.optimisers import PLATEAU, make_optimizer, plateau, scheduled
from meadow.client.loop.training import Training, batch_at, train
from meadow.client.loop.validation import validation_loss
from meadow.config.schema import Experiment, Local
from meadow.strategies.protocol import Batch
from meadow.tasks.data import MISSING, Data, Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.losses import losses
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task

GRADIENTS = [torch.tensor(g, dtype=torch.float64) for g in ([1.0, -2.0], [0.5, 3.0], [-4.0, 0.1], [2.0, 2.0])]
LR, DECAY, MOMENTUM = 0.1, 0.02, 0.8


def by_hand(kind: str, nesterov: bool) -> Tensor:
    """Where each optimiser's published formula takes (1, -1) with GRADIENTS; constants are torch's."""
    p = torch.tensor([1.0, -1.0], dtype=torch.float64)
    v = torch.zeros_like(p)
    s = torch.zeros_like(p)
    for t, g in enumerate(GRADIENTS, start=1):
        if kind == "adamw":
            p = p * (1 - LR * DECAY)
        else:
            g = g + DECAY * p
        if kind == "sgd":
            v = MOMENTUM * v + g
            p = p - LR * (g + MOMENTUM * v if nesterov else v)
        elif kind == "adagrad":
            s = s + g**2
            p = p - LR * g / (s.sqrt() + 1e-10)
        elif kind == "rmsprop":
            s = 0.99 * s + 0.01 * g**2
            v = MOMENTUM * v + g / (s.sqrt() + 1e-8)
            p = p - LR * v
        else:
            v, s = 0.9 * v + 0.1 * g, 0.999 * s + 0.001 * g**2
            p = p - LR * (v / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


@pytest.mark.parametrize(
    ("kind", "nesterov"),
    [("sgd", False), ("sgd", True), ("adagrad", False), ("rmsprop", False), ("adam", False), ("adamw", False)],
)
def test_an_optimiser_does_what_its_paper_says(kind: Any, nesterov: bool) -> None:
    plan = Local(optimizer=kind, nesterov=nesterov, lr=LR, weight_decay=DECAY, momentum=MOMENTUM)
    half, whole = (nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64)) for _ in range(2))
    extra = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    optimizer = make_optimizer({"half": half, "whole": whole}, plan, {"half": 0.5, "whole": 1.0}, [extra])
    for gradient in GRADIENTS:
        half.grad, whole.grad, extra.grad = gradient.clone(), gradient.clone(), gradient.clone()
        optimizer.step()
    assert torch.allclose(whole.detach(), by_hand(kind, nesterov), rtol=1e-9)
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert rates == [(0.05, DECAY), (0.1, DECAY), (0.1, 0.0)]


def opened(*overrides: str) -> tuple[Experiment, Task, nn.Module]:
    experiment = small("fedavg", "task.hidden=16", *overrides)
    task = open_task(experiment)
    model = task.new_model()
    load_into(model, initial_state(experiment))
    return experiment, task, model


def gradient(model: nn.Module, task: Task, data: Data) -> dict[str, Tensor]:
    """The gradient of the weighted loss over all the data, by torch."""
    parts = losses(model(data.x), data.y, task.targets)
    loss = torch.stack([parts[t.name] for t in task.targets]).sum()
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
def test_a_full_batch_is_one_step_of_gradient_descent(clip: float) -> None:
    """p - lr g over all samples; clipped, g times min(1, clip / |g|) (torch adds 1e-6 to |g|)."""
    experiment, task, model = opened(
        "local.batch_size=0", "local.epochs=1", "local.momentum=0.0", f"local.clip_norm={clip}", "local.lr=0.3"
    )
    model, data = model.double(), in_double(task.client(0).train)
    before, g = state_of(model), gradient(model, task, data)
    length = math.sqrt(sum(float((v**2).sum()) for v in g.values()))
    factor = min(1.0, clip / (length + 1e-6)) if clip else 1.0
    assert length > 0.05
    assert train(model, Training(data, 1, 0, experiment.local), task, experiment).steps == 1
    stepped(state_of(model), before, {name: 0.3 * factor * value for name, value in g.items()})


def test_batches_of_one_are_a_step_a_sample() -> None:
    """One epoch of single samples: each has its own step, in the order that the next epoch does not repeat."""
    experiment, task, model = opened("local.batch_size=1", "local.epochs=2", "local.momentum=0.0", "local.lr=0.01")
    data = task.client(0).train
    seen: list[Tensor] = []

    def watch(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
        seen.append(batch.x)
        return torch.zeros(())

    assert (
        train(model, Training(data, 1, 0, experiment.local, term=watch), task, experiment).steps
        == 2 * len(data)
        == len(seen)
    )
    first, second = torch.cat(seen[: len(data)]), torch.cat(seen[len(data) :])
    assert not torch.equal(first, second)
    for order in (first, second):
        assert sorted(order.flatten(1).tolist()) == sorted(data.x.flatten(1).tolist())


def test_rates_of_the_schedules() -> None:
    def over(rounds: int, **settings: Any) -> list[float]:
        return [scheduled(Local(**settings), r, 6) for r in range(1, rounds + 1)]

    assert over(7) == [1.0] * 7
    assert over(7, schedule="step", schedule_every=2, schedule_factor=0.5) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
    half = math.sqrt(3) / 4
    assert over(7, schedule="cosine") == pytest.approx([1, 0.5 + half, 0.75, 0.5, 0.25, 0.5 - half, 0.5 - half])
    assert over(5, warmup=4) == [0.25, 0.5, 0.75, 1, 1]
    assert over(3, warmup=2, schedule="step", schedule_every=1, schedule_factor=0.5) == [0.5, 0.5, 0.25]


def test_a_scheduled_rate_scales_the_step() -> None:
    """Plain SGD over the full batch from one state: the change in round 3 is a quarter of that in round 1."""
    changes = list[Arrays]()
    for round_ in (1, 3):
        experiment, task, model = opened(
            "local.batch_size=0", "local.steps=1", "local.schedule=step", "local.schedule_every=1",
            "local.schedule_factor=0.5",
        )  # fmt: skip
        before = floats(state_of(model.double()))
        train(model, Training(in_double(task.client(0).train), round_, 0, experiment.local), task, experiment)
        changes.append({n: v - before[n] for n, v in floats(state_of(model)).items()})
    stepped(changes[0], {n: 4 * v for n, v in floats(changes[1]).items()}, {})


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_is_torchs(patience: int) -> None:
    plan = Local(schedule="plateau", schedule_factor=0.5, schedule_patience=patience)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=1e-4, min_lr=0, eps=0
    )
    memory: Arrays = {}
    seen = set()
    for loss in [3.0, 2.0, 2.5, 1.99999, 1.5, 1.6, 1.7, 1.8, 1.9, 1.2, 1.3, 1.2, 1.1999, 5.0, 6.0, 7.0, 1.0, 1.0]:
        oracle.step(loss)
        factor = plateau(plan, memory, loss)
        assert factor == optimizer.param_groups[0]["lr"]
        seen.add(factor)
    assert len(seen) > 2


def test_plateau_goes_on_from_round_to_round(tmp_path: Path) -> None:
    """Each client keeps its own factor, a power of 0.1, in its store (`test_resume` cuts such a run off)."""
    settings = ("local.schedule=plateau", "local.schedule_patience=0", "local.schedule_factor=0.1", "local.lr=0.3")
    run_inline(small("fedavg", *settings), tmp_path)
    kept = [read_arrays(p) for p in (tmp_path / "state").rglob("round-00000003.safetensors")]
    assert len(kept) == 8
    factors = {float(k[f"loop@{PLATEAU}"][2]) for k in kept}
    assert factors <= {1.0, 0.1, 0.1 * 0.1} and len(factors) > 1


@pytest.mark.parametrize("patience", [1, 2, 20])
def test_early_stopping_keeps_the_best_epoch(patience: int) -> None:
    """A round of e epochs is the beginning of one of more: so the validation loss after each, and where it stops."""
    settings = ("local.lr=1.5", "local.momentum=0.5", "local.batch_size=4")
    states, values = [], []
    for epochs in range(1, 9):
        experiment, task, model = opened(*settings, f"local.epochs={epochs}")
        own = task.client(0)
        steps = train(model, Training(own.train, 1, 0, experiment.local), task, experiment).steps // epochs
        states.append(state_of(model))
        values.append(validation_loss(model, own.validation, task))
    best, since, ends = 0, 0, 8
    for e in range(8):
        best, since = (e, 0) if values[e] < values[best] or e == 0 else (best, since + 1)
        if since >= patience:
            ends = e + 1
            break
    experiment, task, model = opened(*settings, "local.epochs=8", f"local.patience={patience}")
    done = train(model, Training(own.train, 1, 0, experiment.local, validation=own.validation), task, experiment)
    assert done.steps == ends * steps
    assert all(value.tobytes() == states[best][n].tobytes() for n, value in state_of(model).items())
    assert best < ends - 1  # else nothing was put back


def test_smoothing_spreads_a_share_of_each_label_over_all_classes() -> None:
    """(1 - s) CE + s mean_c(-log p_c), of the known labels; of tokens the mean over the known ones of each sample."""
    target, s = Target("t", "class", 3), 0.3
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([2, MISSING, 0, 1])
    log_p = torch.log_softmax(logits, 1)
    known = [0, 2, 3]
    expected = -sum((1 - s) * log_p[i, y[i]] + s * log_p[i].mean() for i in known) / 3
    assert torch.allclose(losses({"t": logits}, {"t": y}, [target], smoothing=s)["t"], torch.as_tensor(expected))
    tokens, truth = logits[None].movedim(-1, 1), y[None]
    assert torch.allclose(losses({"t": tokens}, {"t": truth}, [target], smoothing=s)["t"], torch.as_tensor(expected))
    value = Target("v", "value", 1)
    outputs, numbers = {"v": logits[:, 0]}, {"v": y.double()}
    assert losses(outputs, numbers, [value], smoothing=s) == losses(outputs, numbers, [value])


def test_smoothing_reaches_training() -> None:
    """The loss that training reports for its one full batch is the smoothed one of the start."""
    experiment, task, model = opened(
        "local.batch_size=0", "local.epochs=1", "local.label_smoothing=0.4", "task.learn=all"
    )
    model, data = model.double(), in_double(task.client(0).train)
    with torch.no_grad():
        expected = losses(model(data.x), data.y, task.targets, smoothing=0.4)
        plain = losses(model(data.x), data.y, task.targets)
    reported = train(model, Training(data, 1, 0, experiment.local), task, experiment).losses
    close(reported["digit"], float(expected["digit"]), 1000, dtype=np.float64)
    assert abs(reported["digit"] - float(plain["digit"])) > 1e-3
    close(reported["slant"], float(plain["slant"]), 1000, dtype=np.float64)


@pytest.mark.parametrize(("samples", "size"), [(17, 8), (9, 8), (7, 3), (16, 8), (5, 2), (1, 8), (3, 8)])
def test_a_last_batch_of_one_gets_another_sample_where_norms_need_two(samples: int, size: int) -> None:
    order = torch.arange(samples)
    batches = -(-samples // size)
    plain = [batch_at(order, i, size, at_least_two=False) for i in range(batches)]
    assert [b.tolist() for b in plain] == [list(range(i * size, min((i + 1) * size, samples))) for i in range(batches)]
    lent = [batch_at(order, i, size, at_least_two=True) for i in range(batches)]
    assert torch.equal(torch.cat(lent), order)
    assert samples == 1 or size == 2 or min(len(b) for b in lent) >= 2


def test_batch_normalisation_learns_where_one_sample_is_left_over() -> None:
    images = ("task.dataset=stars", "task.targets=points", "task.channels=rgb", "task.model=resnet18")
    experiment = small("fedavg", *images, "local.batch_size=8", "local.epochs=1")
    task = open_task(experiment)
    nine = task.client(0).train.take(torch.arange(9))
    assert train(task.new_model(), Training(nine, 1, 0, experiment.local), task, experiment).steps == 2
