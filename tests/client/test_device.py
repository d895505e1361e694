"""The device is the model's: training, DP-SGD and evaluation take place where it is, and give there what they give here."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers.devices import AWAY, Away, elsewhere
from helpers.runs import small
from meadow.client.loop.training import Training, train
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.noise import Stream
from meadow.tasks.evaluation import device_of, evaluate, load_into, state_of
from meadow.tasks.numerics import placed
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

SOURCE = ("task.pretrained=source",)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sgd": ("fedavg", ()),
    "cnn": ("fedavg", ("task.model=cnn", "local.momentum=0.9")),
    "one target": ("fedavg", ("task.learn=first",)),
    **{name: ("fedavg", (f"local.optimizer={name}",)) for name in ("adagrad", "rmsprop", "adam", "adamw")},
    "clip": ("fedavg", ("local.clip_norm=0.1", "local.label_smoothing=0.1")),
    "lora": ("lora", ()),
    "adapters": ("adapters", ()),
    "fisher": ("fisher-mask", ()),
    "l2": ("l2-sp", ()),
    "ewc": ("ewc", ()),
    "kl": ("kl-anchor", ()),
    "distillation": ("distillation", ()),
    **{name: ("multitask", (f"local.balance={name}",)) for name in ("uncertainty", "dwa", "gradnorm", "pcgrad")},
}
PRIVATE = {"book": "fedavg", "hooks": "fedavg", "loop": "fedavg"}


def trained(
    preset: str, settings: tuple[str, ...], away: bool, mode: str = ""
) -> tuple[dict[str, Any], dict[str, float]]:
    """A client's state and scores after a round, trained here or elsewhere."""
    experiment = small(preset, "task.hidden=8", "local.epochs=1", *settings)
    task = open_task(experiment)
    model, own = task.new_model(), task.client(0)
    load_into(model, initial_state(experiment))
    permit = Permit(Mechanism(0.3, 1.0, 0.5, 4.0, 2), Stream(0), Stream(1), mode) if mode else None  # type: ignore[arg-type]
    if away:
        with elsewhere() as device:
            model = model.to(device)
            assert all(isinstance(p, Away) for p in model.parameters())
            train(
                model,
                Training(own.train, 1, 0, experiment.local, validation=own.validation, permit=permit),
                task,
                experiment,
            )
            scores = evaluate(model, own.test, task)
            assert device_of(model) == AWAY
            return state_of(model), scores
    train(
        model, Training(own.train, 1, 0, experiment.local, validation=own.validation, permit=permit), task, experiment
    )
    return state_of(model), evaluate(model, own.test, task)


def same(preset: str, settings: tuple[str, ...], mode: str = "") -> None:
    (there, scores), (here, expected) = (trained(preset, settings, away, mode) for away in (True, False))
    assert all(np.allclose(there[n], here[n], rtol=1e-4, atol=1e-6) for n in here)
    assert scores == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_loop_trains_where_the_model_is(case: str) -> None:
    same(*CASES[case])


@pytest.mark.parametrize("mode", ["book", "hooks", "loop"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_private_steps_are_taken_where_the_model_is(mode: str, model: str) -> None:
    """With the noise that a CPU would draw."""
    same("fedavg", (f"task.model={model}", "task.norm=group"), mode)


def test_the_device_that_is_none_refuses_what_a_gpu_would() -> None:
    with elsewhere() as device:
        there = torch.ones(3, device=device)
        assert torch.equal((there + 1).cpu(), torch.full((3,), 2.0))
        with pytest.raises(RuntimeError):
            there + torch.ones(3)
        with pytest.raises(RuntimeError):
            torch.arange(3)[None] * there


def test_on_a_cpu_nothing_is_moved_or_set() -> None:
    model = torch.nn.Linear(2, 2)
    before = torch.are_deterministic_algorithms_enabled()
    assert placed(model, "cpu", exact=True) is model
    assert torch.are_deterministic_algorithms_enabled() == before
