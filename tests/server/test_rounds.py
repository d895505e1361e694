"""Whole runs: what they compute, held to hand calculation, to each other, and to what the engines promise."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.rounding import close, distance, floats, in_double, off
from helpers.runs import clients_answer, run_inline, run_with, small
from meadow.arrays.files import read_arrays
from meadow.arrays.named import Arrays, Named, arrays_sha256
from meadow.client.answers import train_client
from meadow.client.loop.training import Training, train
from meadow.config.cohort import draw_cohort
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest
from meadow.strategies.check import load
from meadow.strategies.roles import roles
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.losses import losses
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

ONE_STEP = ("run.rounds=1", "local.batch_size=0", "local.epochs=1")


def final_arrays(out: Path) -> Arrays:
    checkpoint, damaged = latest(out / "checkpoints")
    assert checkpoint is not None and not damaged
    return checkpoint.arrays


def sgd_by_hand(experiment: Experiment, client: int) -> Arrays:
    """A full-batch gradient step from the initial state in float64, written out: w <- w - lr * gradient of the mean loss."""
    task = open_task(experiment)
    model, data = task.new_model(), in_double(task.client(client).train)
    load_into(model, initial_state(experiment))
    model.double()
    loss = sum(losses(model(data.x), data.y, task.targets).values(), torch.zeros(()))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.sub_(experiment.local.lr * gradient)
    return state_of(model)


def one_step(found: Arrays, exact: Arrays, experiment: Experiment) -> None:
    """The end of a step in float32: to its roundings, which would show if it were a thousandth longer."""
    start = initial_state(experiment)
    moved = distance(exact, start)
    assert found.keys() == exact.keys()
    assert distance(found, exact) <= off(1, distance(start, Named(start) * 0), moved) < moved / 1000


@pytest.mark.parametrize("preset", ["fedavg", "federated-multitask"])
def test_one_client_full_batch_one_step_is_sgd(preset: str, tmp_path: Path) -> None:
    experiment = small(preset, *ONE_STEP, "partition.clients=1")
    run_inline(experiment, tmp_path / "a")
    one_step(final_arrays(tmp_path / "a"), sgd_by_hand(experiment, 0), experiment)
    pooled = small(preset, *ONE_STEP, "partition.clients=1", "run.placement=pooled")
    run_inline(pooled, tmp_path / "b")
    one_step(final_arrays(tmp_path / "b"), sgd_by_hand(experiment, 0), experiment)


def test_two_clients_average_by_their_samples(tmp_path: Path) -> None:
    experiment = small("fedavg", *ONE_STEP, "partition.clients=2", "partition.law=quantity", "run.seed=3")
    run_inline(experiment, tmp_path)
    n = [len(open_task(experiment).client(c).train) for c in (0, 1)]
    assert n[0] != n[1]
    first, second = (floats(sgd_by_hand(experiment, c)) for c in (0, 1))
    by_hand: Arrays = {k: (n[0] * first[k] + n[1] * second[k]) / (n[0] + n[1]) for k in first}
    one_step(final_arrays(tmp_path), by_hand, experiment)


def test_pooled_on_one_client_is_local_on_that_client(tmp_path: Path) -> None:
    local = run_inline(small("local", "partition.clients=1"), tmp_path / "local")
    run_inline(small("pooled", "partition.clients=1"), tmp_path / "pooled")
    state = read_arrays(sorted((tmp_path / "local" / "state").rglob("round-*.safetensors"))[-1])
    pooled = final_arrays(tmp_path / "pooled")
    assert state.keys() == pooled.keys()
    assert all(np.array_equal(state[k], pooled[k]) for k in state)
    assert (
        local["metrics"]["clients"]
        == json.loads((tmp_path / "pooled" / "summary.json").read_text())["metrics"]["clients"]
    )


def test_sharing_nothing_is_training_alone(tmp_path: Path) -> None:
    alone = run_inline(small("local"), tmp_path / "a")
    nothing_shared = run_inline(small("fedavg", "strategy.share=none"), tmp_path / "b")
    assert alone["personal_sha256"] == nothing_shared["personal_sha256"]
    assert alone["metrics"]["clients"] == nothing_shared["metrics"]["clients"]


def test_fedper_shares_no_head_and_every_clients_head_is_its_own(tmp_path: Path) -> None:
    summary = run_inline(small("fedper"), tmp_path)
    assert not any("heads" in name for name in final_arrays(tmp_path))
    heads = [read_arrays(p) for p in (tmp_path / "state").rglob("round-00000003.safetensors")]
    assert len(heads) == 8
    assert all(set(h) == {"heads.digit.weight", "heads.digit.bias"} for h in heads)
    assert len({arrays_sha256(h) for h in heads}) == 8
    assert summary["metrics"]["global"] == {}


def test_frozen_trunk_keeps_its_bits(tmp_path: Path) -> None:
    experiment = small("transfer")
    run_inline(experiment, tmp_path)
    start = initial_state(experiment)
    for state in (read_arrays(p) for p in (tmp_path / "state").rglob("round-*.safetensors")):
        assert all(name.startswith("heads.") for name in state)
    federated = small("federated-transfer", "strategy.share=all")
    run_inline(federated, tmp_path / "f")
    arrays = final_arrays(tmp_path / "f")
    assert all(np.array_equal(arrays[n], start[n]) for n in start if n.startswith("trunk."))
    assert not np.array_equal(arrays["heads.digit.weight"], start["heads.digit.weight"])


def test_sharing_the_trainable_is_sharing_all_when_the_rest_is_frozen(tmp_path: Path) -> None:
    everything = run_inline(small("federated-transfer", "strategy.share=all"), tmp_path / "a")
    part = run_inline(small("federated-transfer"), tmp_path / "b")
    assert everything["metrics"]["clients"] == part["metrics"]["clients"]
    assert everything["metrics"]["global"] == part["metrics"]["global"]
    assert part["cost"]["bytes_up"] < everything["cost"]["bytes_up"] / 5


def test_twice_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first = run_inline(small("fedper"), tmp_path / "a")
    again = run_inline(small("fedper"), tmp_path / "b")
    other = run_inline(small("fedper", "run.seed=1"), tmp_path / "c")
    for key in ("model_sha256", "personal_sha256", "split_sha256", "metrics"):
        assert first[key] == again[key]
        assert first[key] != other[key]


def test_cohorts_come_from_seed_and_round() -> None:
    experiment = small("fedavg", "partition.clients=20", "cohort.size=5")
    cohorts = [draw_cohort(experiment, r, [1] * 20) for r in range(1, 2001)]
    assert cohorts[:50] == [draw_cohort(experiment, r, [1] * 20) for r in range(1, 51)]
    assert all(len(set(c)) == 5 and c == sorted(c) for c in cohorts)
    counts = np.bincount(np.concatenate(cohorts), minlength=20)
    # Each client is in a cohort with probability 1/4: 500 of 2000, standard deviation 19.4; all within five of these.
    assert (np.abs(counts - 500) < 97).all()


def test_bytes_are_what_travels(tmp_path: Path) -> None:
    experiment = small("fedper")
    summary = run_inline(experiment, tmp_path)
    start = initial_state(experiment)
    size = sum(start[n].nbytes for n in roles(experiment, start).shared)
    assert summary["cost"]["bytes_up"] == summary["cost"]["bytes_down"] == 3 * 8 * size
    local = run_inline(small("local"), tmp_path / "l")
    assert local["cost"]["bytes_up"] == local["cost"]["bytes_down"] == 0


def test_never_sampled_clients_are_evaluated_and_counted(tmp_path: Path) -> None:
    summary = run_inline(small("fedper", "cohort.size=2", "run.rounds=2"), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    sampled = {c for r in records for c in r["cohort"]}
    assert summary["clients"] == {"total": 8, "never_sampled": 8 - len(sampled), "untrained_head": 8 - len(sampled)}
    assert 4 <= summary["clients"]["never_sampled"] <= 6
    rows = list(csv.DictReader((tmp_path / "clients.csv").open()))
    assert [int(r["client"]) for r in rows] == list(range(8))
    assert all(r["used.digit.accuracy"] for r in rows)
    assert {int(r["client"]) for r in rows if int(r["rounds"]) > 0} == sampled


@pytest.mark.parametrize("kind", [OSError, SystemExit])
def test_a_client_that_raises_costs_itself_only(
    kind: type[BaseException], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its text cannot act on the terminal that shows it."""

    def failing(node: Any, request: Any) -> Any:
        if request.client == 3:
            raise kind("the disk of client three is full\x1b[2J\x9b31m\r")
        return train_client(node, request)

    summary = run_with(clients_answer(failing), small("fedavg"), tmp_path)
    assert summary["status"] == "done"
    assert all(record.getMessage().replace("\n", "").isprintable() for record in caplog.records)
    for line in (tmp_path / "rounds.jsonl").read_text().splitlines():
        (failure,) = json.loads(line)["failed"]
        assert failure["client"] == 3
        assert failure["reason"].startswith("client 3: Traceback")
        assert "the disk of client three is full" in failure["reason"]
        assert failure["reason"].replace("\n", "").isprintable()
    rows = list(csv.DictReader((tmp_path / "clients.csv").open()))
    assert [int(r["rounds"]) for r in rows] == [3, 3, 3, 0, 3, 3, 3, 3]


@pytest.mark.parametrize("preset", ["fedavg", "scaffold", "fedadam", "median", "fedper"])
@pytest.mark.parametrize("value", [np.nan, 3e38, 1e12, "stranger"])
def test_a_poisoned_update_costs_its_client_only(value: float | str, preset: str, tmp_path: Path) -> None:
    """The client sits in the middle of a block that its node would have added up: the others still count, bit by bit.

    A finite value may be as harmful as none: with 1e12 in the model, nobody's training stays finite.
    """
    experiment = small(preset, "local.steps=1")

    def without(node: Any, request: Any) -> Any:
        if request.client == 3:
            raise OSError("absent")
        return train_client(node, request)

    def poisoned(node: Any, request: Any) -> Any:
        reply = train_client(node, request)
        if request.client == 3:
            assert reply.arrays is not None
            if isinstance(value, str):
                reply.arrays[value] = np.zeros(2, np.float32)  # nobody asked for it
            else:
                reply.arrays = {k: np.full_like(v, value) for k, v in reply.arrays.items()}
        return reply

    expected = run_with(clients_answer(without), experiment, tmp_path / "without")
    summary = run_with(clients_answer(poisoned), experiment, tmp_path / "poisoned")
    assert summary["model_sha256"] == expected["model_sha256"]
    records = [json.loads(line) for line in (tmp_path / "poisoned" / "rounds.jsonl").read_text().splitlines()]
    assert [[f["client"] for f in record["failed"]] for record in records] == [[3]] * 3
    assert value != "stranger" or all(value in record["failed"][0]["reason"] for record in records)


def test_a_next_model_that_nobody_can_compute_with_is_void(tmp_path: Path) -> None:
    """It is not sent to the clients, whose failures would be told in its place."""
    summary = run_inline(small("fedadam", "strategy.server_lr=1e30"), tmp_path / "run")
    assert (summary["status"], summary["rounds"]) == ("stopped", 0) and "next model" in summary["reason"]


def test_training_depends_on_round_and_client_and_on_nothing_else() -> None:
    experiment = small("fedavg")
    task = open_task(experiment)
    data = task.client(0).train

    def trained(round_: int, pid: int) -> str:
        model = task.new_model()
        load_into(model, initial_state(experiment))
        train(model, Training(data, round_, pid, experiment.local), task, experiment)
        return arrays_sha256(state_of(model))

    assert trained(1, 0) == trained(1, 0)
    assert len({trained(1, 0), trained(2, 0), trained(1, 1)}) == 3


def test_the_trunk_learns_at_its_own_rate(tmp_path: Path) -> None:
    """One full-batch step without momentum: the trunk moves by the factor times what it moves without one, to the roundings
    of rate times gradient and of the sum, in both runs: the gradient has the same bits."""
    start = floats(initial_state(small("fedavg", "partition.clients=1")))
    moved = []
    for factor in (1.0, 0.25):
        experiment = small("fedavg", *ONE_STEP, "partition.clients=1", f"local.trunk_lr_factor={factor}")
        run_inline(experiment, tmp_path / str(factor))
        moved.append({n: v - start[n] for n, v in floats(final_arrays(tmp_path / str(factor))).items()})
    for name, step in moved[0].items():
        factor = 0.25 if name.startswith("trunk.") else 1.0
        close(moved[1][name], factor * step, 4, terms=np.abs(start[name]) + np.abs(step), name=name)


def test_what_a_client_says_of_itself_ends_nothing(tmp_path: Path) -> None:
    """Metrics that are missing, not finite or of another kind are left out; the model is the same without them."""
    nonsense: list[dict[str, Any]] = [{"loss/digit": math.nan}, {"loss/digit": [1.0, 2.0]}, {"steps": math.inf}]

    def boasting(node: Any, request: Any) -> Any:
        reply = train_client(node, request)
        if request.client < 3:
            assert reply.values is not None
            reply.values["metrics"] = {**reply.metrics, **nonsense[request.client]}
            reply.values["evaluation"] = {"digit/accuracy": math.inf, "digit/loss": [1.0]}
        return reply

    expected = run_inline(small("fedavg"), tmp_path / "honest")
    summary = run_with(clients_answer(boasting), small("fedavg"), tmp_path / "boasting")
    assert summary["model_sha256"] == expected["model_sha256"]
    record = json.loads((tmp_path / "boasting" / "rounds.jsonl").read_text().splitlines()[0])
    assert math.isfinite(record["train"]["digit"]["loss"])
    assert 0 <= record["clients"]["digit"]["accuracy"]["mean"] <= 1


def test_too_few_good_replies_stop_the_run(tmp_path: Path) -> None:
    def failing(node: Any, request: Any) -> Any:
        raise OSError("no disk")

    summary = run_with(clients_answer(failing), small("fedavg"), tmp_path)
    assert summary["status"] == "stopped"
    assert "cohort.quorum = 1" in summary["reason"] and "no disk" in summary["reason"]


def test_an_impossible_split_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"partition\.clients"):
        run_inline(load("fedavg", ["partition.clients=2000"]), tmp_path / "x")
    with pytest.raises(UserError, match="size"):
        run_inline(load("fedavg", ["task.targets=size"]), tmp_path / "x")


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    run_inline(small("fedavg"), tmp_path)
    with pytest.raises(UserError, match="exists"):
        run_inline(small("fedavg"), tmp_path)
    with pytest.raises(UserError, match=r"run\.seed = 5"):
        run_inline(small("fedavg", "run.seed=5"), tmp_path, resume=True)


def test_fine_tuned_models_are_scored_beside(tmp_path: Path) -> None:
    run_inline(small("fedavg", "evaluate.fine_tune_epochs=2"), tmp_path)
    row = next(csv.DictReader((tmp_path / "clients.csv").open()))
    assert {"used.digit.accuracy", "finetuned.digit.accuracy"} <= row.keys()
