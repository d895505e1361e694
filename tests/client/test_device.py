"""The device is the model's: training, DP-SGD and evaluation take place where it is, and give there what they give here."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.devices import AWAY, Away, elsewhere
from helpers.rounding import distance, off
from helpers.runs import small
from meadow.arrays.named import Named, flat
from meadow.client.context import LocalContext
from meadow.client.loop.training import Training, train
from meadow.client.trainers.choose import trainers_of
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.noise import Stream
from meadow.strategies import algorithm
from meadow.strategies.roles import roles_of
from meadow.tasks.evaluation import device_of, evaluate, load_into, state_of
from meadow.tasks.features import View
from meadow.tasks.numerics import placed
from meadow.tasks.readers.domains import source_samples
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
ADAPTED = ("adapt.dataset=digits", "local.batch_size=8", "local.steps=3")
CASES |= {
    f"{method} adaptation": ("fedavg", (f"adapt.method={method}", *more, *ADAPTED))
    for method, *more in (
        ("coral",), ("deep-coral",), ("mmd",), ("dann",), ("match",), ("augment", "adapt.labels=both"), ("source-only",)
    )
}  # fmt: skip
TEXTS = ("task.dataset=helpers.objects:texts", "task.targets=digit", "partition.law=iid", "partition.clients=2")
RECURRENT = {
    "bilstm": (*TEXTS, "task.model=bilstm"),
    "charlstm": ("task.dataset=helpers.objects:characters", *TEXTS[1:], "task.model=charlstm"),
    "a user's": ("task.model=helpers.objects:rows", "task.learn=first"),
}
ALGORITHMS = {
    "apfl": ("strategy.mix_lr=0.1",),
    **dict.fromkeys(("moon", "fedrod", "ditto", "pfedme", "perfedavg", "fedprox", "feddyn"), ()),
    "fedrep": ("strategy.share=body",),
}


def trained(
    preset: str, settings: tuple[str, ...], away: bool, mode: str = ""
) -> tuple[dict[str, Any], dict[str, float], int]:
    """A client's state, scores and steps after a round, trained here or elsewhere."""
    experiment = small(preset, "task.hidden=8", "local.epochs=1", *settings)
    task = open_task(experiment)
    model, own = task.new_model(), task.client(0)
    load_into(model, initial_state(experiment))
    permit = Permit(Mechanism(0.3, 1.0, 0.5, 4.0, 2), Stream(0), Stream(1), mode) if mode else None  # type: ignore[arg-type]
    source = source_samples(experiment, 0) if experiment.adapt.dataset else None
    training = Training(own.train, 1, 0, experiment.local, validation=own.validation, source=source, permit=permit)
    if away:
        with elsewhere() as device:
            model = model.to(device)
            assert all(isinstance(p, Away) for p in model.parameters())
            done = train(model, training, task, experiment)
            scores = evaluate(model, own.test, task)
            assert device_of(model) == AWAY
            return state_of(model), scores, done.steps
    done = train(model, training, task, experiment)
    return state_of(model), evaluate(model, own.test, task), done.steps


def same(preset: str, settings: tuple[str, ...], mode: str = "") -> None:
    (there, scores, _), (here, expected, _) = (trained(preset, settings, away, mode) for away in (True, False))
    assert [n for n in here if not np.array_equal(there[n], here[n])] == []
    assert scores == expected


@pytest.mark.parametrize("case", CASES)
def test_the_loop_trains_where_the_model_is(case: str) -> None:
    same(*CASES[case])


@pytest.mark.parametrize("mode", ["book", "hooks", "loop"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_private_steps_are_taken_where_the_model_is(mode: str, model: str) -> None:
    """With the noise that a CPU would draw."""
    same("fedavg", (f"task.model={model}", "task.norm=group"), mode)


@pytest.mark.parametrize("mode", ["", "hooks", "loop"])
@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_networks_learn_where_they_are(case: str, mode: str) -> None:
    """Here oneDNN's LSTM learns, and there torch's: each is off by the roundings of its steps."""
    (there, *_), (here, _, steps) = (trained("fedavg", RECURRENT[case], away, mode) for away in (True, False))
    start = initial_state(small("fedavg", "task.hidden=8", *RECURRENT[case]))
    moved, length = distance(here, start), distance(start, Named(start) * 0)
    assert distance(there, here) <= 2 * off(steps, length, moved) < moved / 100


def taken_part(name: str, away: bool) -> dict[str, Any]:
    """What a client sends, keeps and uses after two rounds of an algorithm, here or elsewhere."""
    experiment = small(
        "fedavg", f"strategy.name={name}", *ALGORITHMS[name], "task.hidden=8", "local.epochs=1", "engine.trainer=loop"
    )
    task = open_task(experiment)
    model, own, start = task.new_model(), task.client(0), initial_state(experiment)
    roles, client = roles_of(experiment, model), algorithm(name).client
    with elsewhere() if away else nullcontext(device_of(model)) as device:
        model = model.to(device)
        trainers = trainers_of(experiment, View(model, task))
        received = {n: start[n] for n in roles.shared}
        at = LocalContext(
            experiment, task, roles, model, model, trainers, own.train, 1, 0, received, {}, {}, lambda: start, {}
        )
        for round_ in (1, 2):
            at = replace(at, round=round_)
            at.load(at.start())
            result = client.train(at)
            personal = {n: result.model[n] for n in roles.personal}
            received = {n: result.model[n] for n in roles.shared}
            at = replace(
                at,
                received=received,
                memory={kind: dict(kept) for kind, kept in result.memory.items()},
                personal=personal,
            )
        assert device_of(model) == device
        return result.model | client.used(at) | flat(result.memory)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # this device's tensors are copied
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_take_part_where_the_model_is(name: str) -> None:
    """With models of their own beside it, other terms and other steps."""
    there, here = taken_part(name, True), taken_part(name, False)
    assert there.keys() == here.keys()
    for array in here:
        assert np.array_equal(there[array], here[array]), array


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
