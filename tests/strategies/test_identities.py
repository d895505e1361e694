"""Algorithms that must coincide, parts that must keep their bits, and the faults of well-known code (float32, digits)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from helpers.rounding import OPERATIONS, close, distance, floats, run_off
from helpers.runs import Watching, run_inline, small
from meadow.arrays.files import read_arrays
from meadow.arrays.named import Arrays, of_kind
from meadow.client.context import LocalContext
from meadow.client.loop.training import Trained
from meadow.config.schema import Experiment
from meadow.experiments.audit.ledgers import observed
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest
from meadow.strategies.roles import norms, roles_of
from meadow.tasks.evaluation import state_of
from meadow.tasks.models.vision import torchvision
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

LIVELY = ("local.weight_decay=0.01", "local.momentum=0.9", "partition.clients=3", "run.rounds=2", "local.epochs=1")
NORMED = ("task.model=helpers.worlds:normed", "local.batch_size=0")


def arrays(out: Path) -> Arrays:
    checkpoint, _ = latest(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint.arrays


def stored(out: Path, client: int, round_: int) -> Arrays:
    (place,) = (out / "state").rglob(f"clients/{client}/round-{round_:08d}.safetensors")
    return read_arrays(place)


def equal(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not np.array_equal(a[n], b[n])] == []


def near(tmp_path: Path, experiment: Experiment) -> None:
    """The two runs end where they would in float64, to the roundings of their steps: a 500th of the way at most."""
    one, other = arrays(tmp_path / "one"), arrays(tmp_path / "other")
    assert one.keys() == other.keys()
    moved = distance(other, initial_state(experiment))
    assert distance(one, other) <= 2 * run_off(experiment) < moved / 500


def pair(tmp_path: Path, one: Experiment, other: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    return run_inline(one, tmp_path / "one"), run_inline(other, tmp_path / "other")


def test_fedprox_without_its_term_is_fedavg(tmp_path: Path) -> None:
    one, other = pair(
        tmp_path, small("fedavg", "strategy.name=fedprox", "strategy.mu=0", *LIVELY), small("fedavg", *LIVELY)
    )
    assert one["model_sha256"] == other["model_sha256"]


def test_fedprox_under_adam_is_not(tmp_path: Path) -> None:
    """The term is not lost by an optimiser that is not SGD."""
    adam = ("local.optimizer=adam", "local.lr=0.01", *LIVELY)
    one, other = pair(
        tmp_path, small("fedavg", "strategy.name=fedprox", "strategy.mu=1", *adam), small("fedavg", *adam)
    )
    assert one["model_sha256"] != other["model_sha256"]


def test_scaffold_of_everybody_and_one_step_is_fedavg(tmp_path: Path) -> None:
    once = ("local.steps=1", "local.batch_size=0", "local.momentum=0", "partition.clients=3", "run.rounds=4")
    pair(tmp_path, small("fedavg", "strategy.name=scaffold", *once), small("fedavg", "strategy.weights=equal", *once))
    near(tmp_path, small("fedavg", *once))


def test_fednova_of_equal_steps_is_fedavg(tmp_path: Path) -> None:
    steps = ("local.steps=3", "local.momentum=0.9", "partition.clients=3", "run.rounds=3", "partition.law=quantity")
    pair(tmp_path, small("fedavg", "strategy.name=fednova", *steps), small("fedavg", *steps))
    near(tmp_path, small("fedavg", *steps))


def test_fedsim_is_fedavg_over_a_part(tmp_path: Path) -> None:
    one, other = pair(tmp_path, small("fedper", "strategy.name=fedsim", *LIVELY), small("fedper", *LIVELY))
    assert [one[k] for k in ("model_sha256", "personal_sha256")] == [
        other[k] for k in ("model_sha256", "personal_sha256")
    ]


@pytest.mark.parametrize("algorithm", [("ditto", "strategy.pull=0"), ("apfl", "strategy.mix=1")])
def test_a_personal_model_that_looks_at_nothing_else_is_trained_alone(
    algorithm: tuple[str, str], tmp_path: Path
) -> None:
    """Ditto with lambda = 0, and APFL with its share fixed at 1, have the bits of training alone, round after round."""
    name, setting = algorithm
    one, other = pair(tmp_path, small("fedavg", f"strategy.name={name}", setting, *LIVELY), small("local", *LIVELY))
    for client in range(3):
        equal(of_kind("own", stored(tmp_path / "one", client, 2)), stored(tmp_path / "other", client, 2))
    assert one["metrics"]["clients"] == other["metrics"]["clients"]


@pytest.mark.parametrize("name", ["ditto", "apfl", "fedrod"])
def test_a_personal_model_beside_does_not_touch_what_is_shared(name: str, tmp_path: Path) -> None:
    one = run_inline(small("fedavg", f"strategy.name={name}", *LIVELY), tmp_path / "one")
    if name == "fedrod":  # whose generic model has its own loss: its other half must not change that
        (tmp_path / "other").mkdir()
        other = run_inline(
            small("fedavg", "strategy.name=fedrod", "evaluate.every=2", *LIVELY), tmp_path / "other" / "x"
        )
    else:
        other = run_inline(small("fedavg", *LIVELY), tmp_path / "other")
    assert one["model_sha256"] == other["model_sha256"]


def phases(experiment: Experiment, out: Path) -> list[tuple[Arrays, Arrays, int]]:
    """Of each training in a run: the model before and after it, and its steps."""
    before, seen = list[Arrays](), list[tuple[Arrays, Arrays, int]]()

    def begins(context: LocalContext) -> None:
        before.append(state_of(context.model))

    def ends(context: LocalContext, trained: Trained) -> None:
        seen.append((before[-1], state_of(context.model), trained.steps))

    with observed(experiment, out, Watching(begins, ends)):
        run_inline(experiment, out)
    return seen


@pytest.mark.parametrize("name", ["fedrep", "fedalt"])
def test_fedrep_keeps_the_half_that_does_not_learn(name: str, tmp_path: Path) -> None:
    """Head first, then body, each for its own epochs, under weight decay, momentum and norms with statistics."""
    settings = ("strategy.head_epochs=2", "strategy.body_epochs=3", "run.rounds=1")
    experiment = small("fedper", f"strategy.name={name}", *LIVELY, *NORMED, *settings)
    seen = phases(experiment, tmp_path)
    assert len(seen) == 2 * 3
    for client in range(3):
        (start, between, head_steps), (again, end, body_steps) = seen[2 * client : 2 * client + 2]
        equal(between, again)
        for state in start:
            changed = (not np.array_equal(start[state], between[state]), not np.array_equal(between[state], end[state]))
            assert changed == (state.startswith("heads."), not state.startswith("heads.")), state
        assert (head_steps, body_steps) == (2, 3)


@pytest.mark.parametrize("share", ["body", "all"])
def test_fedbabu_keeps_its_head(share: str, tmp_path: Path) -> None:
    experiment = small("fedavg", "strategy.name=fedbabu", f"strategy.share={share}", *LIVELY)
    start, seen = initial_state(experiment), run_inline(experiment, tmp_path)
    found = arrays(tmp_path)
    heads = {n for n in start if n.startswith("heads.")}
    assert not list((tmp_path / "state").rglob("round-*.safetensors"))  # nobody has a head of its own
    assert all(not np.array_equal(found[n], start[n]) for n in start.keys() - heads)
    assert seen["metrics"]["global"] != {}
    if share == "all":
        equal({n: found[n] for n in heads}, {n: start[n] for n in heads})


def test_fedbn_keeps_norms_by_type_and_their_statistics(tmp_path: Path) -> None:
    experiment = small("fedavg", "strategy.share=all-but-norms", *NORMED, *LIVELY)
    model = open_task(experiment).new_model()
    expected = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d)
        for key in module.state_dict()
    }
    assert any(name.endswith("running_var") for name in expected)
    run_inline(experiment, tmp_path)
    assert all(stored(tmp_path, c, 2).keys() == expected for c in range(3))
    assert arrays(tmp_path).keys() == model.state_dict().keys() - expected


def test_lg_fedavg_starts_from_a_model_that_fedavg_trained(tmp_path: Path) -> None:
    run_inline(small("fedavg", *LIVELY), tmp_path / "first")
    checkpoint = tmp_path / "first" / "checkpoints" / "round-00000002.safetensors"
    experiment = small("lg-fedavg", f"task.pretrained={checkpoint}", *LIVELY)
    trained, start = arrays(tmp_path / "first"), initial_state(experiment)
    equal(*({n: a[n] for n in trained if n.startswith("trunk.")} for a in (start, trained)))
    assert run_inline(experiment, tmp_path / "second")["status"] == "done"
    assert all(n.startswith("trunk.") for n in stored(tmp_path / "second", 0, 2))


def test_norms_are_told_by_type() -> None:
    """A ResNet's norm in a shortcut is called downsample.1."""
    found = norms(torchvision().models.resnet18(weights=None))
    assert "layer2.0.downsample.1.running_mean" in found and "bn1.weight" in found
    assert not any(name.endswith(("conv1.weight", "downsample.0.weight", "fc.weight")) for name in found)
    assert len(found) == 20 * 5


def test_fedbn_without_norms_says_that_it_would_be_fedavg(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="FedAvg"):
        run_inline(small("fedavg", "strategy.share=all-but-norms"), tmp_path)


def test_no_clients_statistics_reach_another(tmp_path: Path) -> None:
    """Client 1 after client 0 in one process has the norms that it has alone."""
    for name, who in (("both", "0 1"), ("alone", "1")):
        (tmp_path / name).write_text(who + "\n")
        schedule = ("cohort.sampling=schedule", f"cohort.schedule={tmp_path / name}", "run.rounds=1")
        run_inline(
            small("fedavg", "strategy.share=all-but-norms", *NORMED, *LIVELY, *schedule), tmp_path / f"run-{name}"
        )
    equal(stored(tmp_path / "run-both", 1, 1), stored(tmp_path / "run-alone", 1, 1))


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "feddyn", "fednova"])
def test_running_statistics_take_the_plain_mean(name: str, tmp_path: Path) -> None:
    """After one round, whose local training is that of FedAvg: no server rate, no optimiser, no shift."""
    once = (*NORMED, *LIVELY, "run.rounds=1", "strategy.weights=equal", "local.steps=2")
    rate = "strategy.server_lr=0.1" if name != "feddyn" else "strategy.alpha=1e-9"
    pair(tmp_path, small("fedavg", f"strategy.name={name}", rate, *once), small("fedavg", *once))
    found, plain = arrays(tmp_path / "one"), arrays(tmp_path / "other")
    buffers = roles_of(small("fedavg", *once), open_task(small("fedavg", *once)).new_model()).buffers
    assert any(n.endswith("running_var") for n in buffers)
    for n in buffers:
        close(found[n], plain[n], OPERATIONS, float(np.abs(plain[n]).max()), name=n)
    assert not np.array_equal(found["heads.digit.weight"], plain["heads.digit.weight"]) or name == "feddyn"
    optimised = read_arrays(tmp_path / "one" / "checkpoints" / "round-00000001.safetensors")
    assert not any(f"@{n}" in key for n in buffers for key in optimised)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "feddyn", "fednova", "median", "krum"])
def test_heads_are_averaged_over_those_who_trained_them(name: str, tmp_path: Path) -> None:
    """Clients 0 and 1 hold one target, client 2 the other: its head is client 2's alone, to rounding."""
    holds = ("partition.holds=digit 0-1,slant 2", "task.learn=all", "run.rounds=1", "cohort.quorum=3")
    experiment = small("federated-multitask", f"strategy.name={name}", "strategy.alpha=1e-9", *LIVELY, *holds)
    run_inline(experiment, tmp_path / "one")
    (tmp_path / "two").write_text("2\n")
    alone = ("cohort.sampling=schedule", f"cohort.schedule={tmp_path / 'two'}", "cohort.quorum=1")
    run_inline(small("federated-multitask", *LIVELY, *holds, *alone), tmp_path / "other")
    found, own = arrays(tmp_path / "one"), floats(arrays(tmp_path / "other"))
    start = floats(initial_state(experiment))
    scale = 2.0 if name == "feddyn" else 1.0  # theta - h / alpha = theta + (theta - x) where all holders take part
    for n in ("heads.slant.weight", "heads.slant.bias"):
        expected = start[n] + scale * (own[n] - start[n])
        close(found[n], expected, OPERATIONS, np.abs(start[n]) + 2 * np.abs(own[n] - start[n]), name=n)
        assert np.abs(expected - start[n]).max() > 1e-3


def test_refusals_and_weights_are_in_the_records(tmp_path: Path) -> None:
    run_inline(small("fedavg", "cohort.max_norm=1e-6", "cohort.quorum=0", *LIVELY), tmp_path)
    for line in (tmp_path / "rounds.jsonl").read_text().splitlines():
        failed = json.loads(line)["failed"]
        assert [f["client"] for f in failed] == [0, 1, 2]
        assert all("more than cohort.max_norm = 1e-06" in f["reason"] for f in failed)
    equal(arrays(tmp_path), initial_state(small("fedavg", *LIVELY)))
