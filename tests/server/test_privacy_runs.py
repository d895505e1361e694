"""Runs under DP, whole: what is charged is what leaves, budgets hold, a replay is one release, and nothing else leaves."""

import csv
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import strategies as st
from torch import nn

from helpers.refusals import refused
from helpers.rounding import OPERATIONS, close, floats, in_double, same_function
from helpers.runs import RESUMED, Watching, clients_answer, recorded, run_inline, run_with, small
from meadow.arrays.files import read_arrays
from meadow.arrays.flower import from_record
from meadow.arrays.named import Arrays, Float64, arrays_sha256
from meadow.client.answers import train_client
from meadow.client.app import app
from meadow.client.context import LocalContext
from meadow.client.loop.training import Trained, Training, train
from meadow.client.node import Node
from meadow.client.release import Ledgers, charge
from meadow.config.algorithms import ALGORITHMS
from meadow.config.cohort import participations
from meadow.config.load import to_toml
from meadow.config.schema import RELEASES, Experiment
from meadow.experiments.audit.ledgers import observed
from meadow.experiments.plan import plan
from meadow.experiments.report import write_report
from meadow.privacy.accounting import client_guarantee, epsilon, local_guarantee
from meadow.privacy.dpsgd.mechanism import Mechanism, poisson
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.ledger import noise_seed, simulated_secret
from meadow.privacy.noise import Stream
from meadow.privacy.plan import forecasts
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest
from meadow.simulation.launch import Launch, engine
from meadow.strategies import algorithm
from meadow.strategies.check import fits
from meadow.strategies.protocol import Roles
from meadow.strategies.wire.packing import Answer, Request
from meadow.tasks.data import Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.losses import losses, sample_losses
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

EXAMPLE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.sample_rate=0.1", "local.steps=3")
LOCAL = ("privacy.unit=local", "privacy.noise_multiplier=4.0")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "cohort.sampling=poisson", "cohort.fraction=0.5")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def ledgers(out: Path) -> dict[int, list[dict[str, Any]]]:
    """Each client's entries, without the head."""
    found = {}
    for path in (out / "state" / "ledgers").rglob("client-*.ledger"):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        found[int(path.name.split("-")[1])] = entries[1:]
    return found


def final(out: Path) -> Arrays:
    checkpoint, _ = latest(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint.arrays


def column(out: Path, name: str) -> list[str]:
    return [row[name] for row in csv.DictReader((out / "clients.csv").open())]


# ---- example-level ----


def test_one_step_is_the_hand_clipped_noised_sum(tmp_path: Path) -> None:
    """One client, one round, one plain step: w - lr (sum of clipped gradients + noise) / denominator, with the noise and
    the sample that the ledger's entry gives under the client's secret."""
    experiment = small(
        "federated-multitask", *EXAMPLE, "partition.clients=1", "run.rounds=1", "local.steps=1", "local.momentum=0",
        "local.lr=0.5", "privacy.clip=0.3", "privacy.denominator=20",
    )  # fmt: skip
    run_inline(experiment, tmp_path)
    (entry,) = ledgers(tmp_path)[0]
    assert entry["parts"] == [[0.1, 1.0, 1]]
    secret = simulated_secret(0, 0)
    sampling, noise = (Stream(noise_seed(secret, entry["release"], purpose)) for purpose in ("sampling", "noise"))
    task = open_task(experiment)
    model, data = task.new_model(), task.client(0).train
    load_into(model, initial_state(experiment))
    index = poisson(len(data), 0.1, sampling)
    assert 5 < len(index) < len(data)
    model.double()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in index.tolist():
        one = in_double(data.take(torch.tensor([i])))
        parts = losses(model(one.x), one.y, task.targets)
        gradient = dict(zip(sums, torch.autograd.grad(sum(parts.values()), list(model.parameters())), strict=True))  # type: ignore[arg-type]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        for name, g in gradient.items():
            sums[name] += g * min(1.0, 0.3 / norm)
    result = final(tmp_path)
    sizes = [p.numel() for p in model.parameters()]
    pieces = torch.split(noise.normal(sum(sizes)), sizes)
    for (name, p), piece in zip(model.named_parameters(), pieces, strict=True):
        step = 0.5 * (sums[name] + 0.3 * piece.double().view(p.shape)) / 20
        # A clipped gradient's terms may be longer than itself, by some ten times (test_dpsgd.py, `naive`).
        terms = p.detach().abs().numpy() + step.abs().numpy() + 0.5 * 10 * 0.3 * len(index) / 20
        close(result[name], p.detach() - step, OPERATIONS, terms, name=name)


def test_calibrated_noise_spends_each_clients_budget_over_its_own_rounds(tmp_path: Path) -> None:
    experiment = small(
        "fedavg", *EXAMPLE, "privacy.noise_multiplier=0", "privacy.epsilon=2", "privacy.accountant=rdp",
        "cohort.size=3", "run.rounds=5", "local.steps=1",
    )  # fmt: skip
    summary = run_inline(experiment, tmp_path)
    times, found = participations(experiment), ledgers(tmp_path)
    assert len(set(times)) > 2
    for client_, rounds in enumerate(times):
        entries = found.get(client_, [])
        assert len(entries) == rounds == sum(client_ in record["cohort"] for record in lines(tmp_path))
        if rounds:
            spent = epsilon([tuple(part) for entry in entries for part in entry["parts"]], 1e-5, "rdp")
            assert 0.995 * 2 <= spent <= 2
            assert float(column(tmp_path, "epsilon")[client_]) == pytest.approx(spent, rel=1e-9)
    assert 0.995 * 2 <= summary["privacy"]["epsilon"]["median"] <= summary["privacy"]["epsilon"]["max"] <= 2
    assert lines(tmp_path)[-1]["epsilon"] == summary["privacy"]["epsilon"]


@pytest.fixture(scope="module")
def ray_launch() -> Iterator[Launch]:
    with engine("ray", 2) as launch:
        yield launch


@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL, CLIENT], ids=["example", "local", "client"])
def test_ray_and_a_second_run_give_the_same_bits_and_no_two_seeds_do(
    settings: tuple[str, ...], tmp_path: Path, ray_launch: Launch
) -> None:
    experiment = small("fedper", *settings)
    first = run_inline(experiment, tmp_path / "a")
    on_ray = ray_launch(experiment, tmp_path / "b")
    other = run_inline(small("fedper", *settings, "run.seed=1"), tmp_path / "c")
    for key in ("model_sha256", "metrics", "privacy"):
        assert on_ray[key] == first[key]
    states = [sorted((tmp_path / name / "state").rglob("round-*.safetensors")) for name in ("a", "b")]
    assert [p.read_bytes() for p in states[0]] == [p.read_bytes() for p in states[1]]
    assert other["model_sha256"] != first["model_sha256"]
    assert (
        first["privacy"]["noise"].startswith("from the experiment's seed") and "not secret" in first["privacy"]["noise"]
    )


@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL], ids=["example", "local"])
def test_no_training_begins_before_its_entry_is_on_disk(settings: tuple[str, ...], tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    def begins(context: LocalContext) -> None:
        seen.append((context.round, context.client, len(ledgers(tmp_path)[context.client])))

    experiment = small("fedavg", *settings)
    with observed(experiment, tmp_path, Watching(begins)):
        run_inline(experiment, tmp_path)
    assert seen == [(r, c, r) for r in (1, 2, 3) for c in range(8)]


@pytest.mark.parametrize("lost", ["all", "the last"])
@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL, CLIENT], ids=["example", "local", "client"])
def test_a_replay_after_lost_checkpoints_is_the_same_release_and_costs_nothing(
    settings: tuple[str, ...], lost: str, tmp_path: Path
) -> None:
    experiment = small("fedper", *settings)
    expected = run_inline(experiment, tmp_path)
    before = ledgers(tmp_path)
    (tmp_path / "summary.json").unlink()
    for path in (tmp_path / "checkpoints").glob("*" if lost == "all" else "*3.*"):
        path.unlink()
    again = run_inline(experiment, tmp_path, resume=True)
    assert [again[k] for k in RESUMED] == [expected[k] for k in RESUMED]
    assert again["privacy"] == expected["privacy"]
    assert ledgers(tmp_path) == before
    assert {len(entries) for entries in before.values()} == (set() if settings == CLIENT else {3})


def test_other_inputs_are_another_release_with_other_noise(tmp_path: Path) -> None:
    """The server goes back to round 2 and sends another model for it: that is charged, and its noise is not used again."""
    experiment = small("fedavg", *EXAMPLE, "partition.clients=2")
    run_inline(experiment, tmp_path)
    for path in [tmp_path / "summary.json", *(tmp_path / "checkpoints").glob("*")]:
        path.unlink()

    def others(node: Node, request: Request) -> Answer:
        moved = request.config["round"] > 1
        return train_client(node, replace(request, arrays={n: v + moved for n, v in request.arrays.items()}))

    summary = run_with(clients_answer(others), experiment, tmp_path, resume=True)
    releases = {number: [entry["release"] for entry in entries] for number, entries in ledgers(tmp_path).items()}
    assert {number: len(set(each)) for number, each in releases.items()} == {0: 5, 1: 5}
    assert len(releases[0]) == len(releases[1]) == 5  # of the noise of each the seed is a function of the release
    assert summary["privacy"]["epsilon"]["max"] == pytest.approx(epsilon([(0.1, 1.0, 5 * 3)], 1e-5))


def test_a_client_whose_next_release_would_pass_its_budget_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    budgets = tmp_path / "budgets.csv"
    costs = [epsilon([(0.1, 1.0, 3 * rounds)], 1e-5) for rounds in (1, 2, 3, 4)]
    given = [costs[0] * 0.99, costs[0], costs[1] * 1.01, costs[3] * 1.01]  # 0, 1, 2 and 4 rounds
    budgets.write_text("client,epsilon\n" + "".join(f"{c},{e!r}\n" for c, e in enumerate(given)))
    experiment = small("fedavg", *EXAMPLE, f"privacy.budgets=file {budgets}", "partition.clients=4", "run.rounds=4")
    summary = run_inline(experiment, tmp_path / "run")
    assert (summary["status"], summary["rounds"]) == ("done", 4)
    records = lines(tmp_path / "run")
    assert [record["cohort"] for record in records] == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]
    assert [[f["client"] for f in record["failed"]] for record in records] == [[0], [1], [2], []]
    assert "budget" in records[0]["failed"][0]["reason"] and "pld" in records[0]["failed"][0]["reason"]
    assert {c: len(e) for c, e in ledgers(tmp_path / "run").items()} == {0: 0, 1: 1, 2: 2, 3: 4}
    assert summary["privacy"]["exhausted"] == 3
    spent = [float(e) for e in column(tmp_path / "run", "epsilon")]
    assert all(e <= budget for e, budget in zip(spent, given, strict=True))
    assert spent == [0.0, *(pytest.approx(costs[i]) for i in (0, 1, 3))]


def test_an_exhausted_budget_stops_the_run_where_it_shall(tmp_path: Path) -> None:
    cost = epsilon([(0.1, 1.0, 6)], 1e-5)
    for rule, how in (("stop", "of 8 clients"), ("leave", "of every client")):
        experiment = small("fedavg", *EXAMPLE, f"privacy.epsilon={cost * 1.001}", f"privacy.on_exhausted={rule}")
        summary = run_inline(experiment, tmp_path / rule)
        assert (summary["status"], summary["rounds"]) == ("stopped", 2)
        assert "budget" in summary["reason"] and how in summary["reason"]
        assert all(len(entries) == 2 for entries in ledgers(tmp_path / rule).values())
        again = run_inline(experiment, tmp_path / rule, resume=True)  # there is no way round it
        assert (again["status"], again["rounds"]) == ("stopped", 2)
        assert again["privacy"]["epsilon"]["max"] <= cost * 1.001


def test_what_was_spent_before_counts_in_calibration_and_in_epsilon(tmp_path: Path) -> None:
    """Two runs over one state: the second one's noise is such that both together cost the budget, not more."""
    two = (*EXAMPLE, "partition.clients=2", "privacy.accountant=rdp")
    run_inline(small("fedavg", *two), tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "state", tmp_path / "b" / ".state")
    second = small("fedavg", *two, "privacy.noise_multiplier=0", "privacy.epsilon=4")
    both = run_with(on_node(state=str(tmp_path / "b" / ".state")), second, tmp_path / "b")
    assert epsilon([(0.1, 1.0, 9)], 1e-5, "rdp") < 3.5
    assert 0.995 * 4 <= both["privacy"]["epsilon"]["max"] <= 4


def on_node(**settings: str | bool) -> Callable[[Message, Context], Message]:
    """The ClientApp on a node with other settings."""

    def answered(message: Message, context: Context) -> Message:
        context.node_config.update(settings)
        return app(message, context)

    return answered


@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL, CLIENT], ids=["example", "local", "client"])
def test_in_a_deployment_the_noise_is_in_no_file_that_others_have(settings: tuple[str, ...], tmp_path: Path) -> None:
    experiment = small("fedavg", *settings, "partition.clients=4", "run.rounds=2")
    simulated = run_inline(experiment, tmp_path / "a")
    deployed = [run_with(on_node(simulated=False), experiment, tmp_path / name) for name in ("b", "c")]
    assert len({run["model_sha256"] for run in (simulated, *deployed)}) == 3
    assert deployed[0]["privacy"]["noise"] == "from secrets that are in no experiment file"
    assert deployed[0]["privacy"]["epsilon"] == simulated["privacy"]["epsilon"]


@pytest.mark.parametrize("damage", ["truncated", "edited", "missing", "restored"])
def test_a_client_whose_ledger_is_damaged_does_not_train_and_the_others_go_on(damage: str, tmp_path: Path) -> None:
    experiment = small("fedavg", *EXAMPLE, "partition.clients=3")
    run_inline(experiment, tmp_path)
    (tmp_path / "summary.json").unlink()
    for path in (tmp_path / "checkpoints").glob("*3.*"):
        path.unlink()  # the server goes back to round 2, after which each client had two releases
    (path,) = (tmp_path / "state" / "ledgers").rglob("client-1-*.ledger")
    written = path.read_text().splitlines(keepends=True)
    if damage == "missing":
        path.unlink()
    elif damage == "edited":
        path.write_text("".join(written).replace("[0.1,1.0,3]", "[0.1,9.0,3]", 1))
    elif damage == "truncated":
        path.write_text("".join(written)[:-400])
    path.write_text("".join(written[:2])) if damage == "restored" else None
    if damage == "truncated":
        path.write_text("".join(written[:2]) + written[2][:50])
    summary = run_inline(experiment, tmp_path, resume=True)
    assert summary["status"] == "done"
    (failure,) = lines(tmp_path)[-1]["failed"]
    assert failure["client"] == 1
    assert failure["reason"] and "Traceback" not in failure["reason"]


# ---- what leaves ----


def records(replies: list[Message]) -> dict[str, dict[str, Any]]:
    """All metric and config records of clients in the replies, by kind; the values of equal keys in a list."""
    found: dict[str, dict[str, Any]] = {}
    for reply in replies:
        parts: list[tuple[str, MetricRecord | ConfigRecord]] = [
            *reply.content.metric_records.items(),
            *reply.content.config_records.items(),
        ]
        for name, record in parts:
            kind = name.partition(".")[2] or name
            for key, value in record.items():
                found.setdefault(kind, {}).setdefault(key, []).append(value)
    return found


def declared_sizes(left: dict[str, dict[str, Any]]) -> set[int]:
    """The sizes of clients in what came to the roll call: int64, as bytes."""
    return {size for sizes in left["roll"]["sizes"] for size in np.frombuffer(sizes, "<i8").tolist()}


@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL, CLIENT], ids=["example", "local", "client"])
def test_by_default_nothing_leaves_but_arrays_and_public_constants(settings: tuple[str, ...], tmp_path: Path) -> None:
    experiment = small("multitask", "run.placement=federated", *settings, "partition.law=quantity")
    replies = list[Message]()
    summary = run_with(recorded(replies), experiment, tmp_path)
    left = records(replies)
    assert declared_sizes(left) == {1}
    metrics = {key: set(values) for key, values in left["metrics"].items()}
    steps = {3} if settings == EXAMPLE else {0}
    assert metrics == {"num-examples": {1}, "num-examples/digit": {1}, "num-examples/slant": {1}, "steps": steps}
    assert left["identity"] == {"personal": [""] * 8, "trained": [False] * 8}
    kinds = set(left) - {"weights"}  # of a block's sum: how many clients are in it
    ledger = {"ledger"} if settings != CLIENT else set()
    assert kinds == {"roll", "metrics", "identity", "pack"} | ledger
    assert set(left.get("ledger", {})) == (
        set(left["ledger"]) & {"entries", "sha256", "epsilon", "secret"} if ledger else set()
    )
    assert summary["metrics"]["clients"] == {}
    assert all(record["train"] == {} and record["clients"] == {} for record in lines(tmp_path))
    split = json.loads((tmp_path / "split.json").read_text())
    assert not {"sizes", "labels", "left_out"} & split.keys()
    for name in ("train_samples", "validation_samples", "test_samples"):
        assert set(column(tmp_path, name)) == {""}
    unprotected = [r["what"] for r in summary["privacy"]["releases"] if r["mechanism"] == "not protected"]
    assert unprotected == (['model arrays (share = "all"), to the server'] if settings == CLIENT else [])


@pytest.mark.parametrize("switch", RELEASES)
def test_each_switch_lets_out_what_it_says_and_nothing_else(switch: str, tmp_path: Path) -> None:
    experiment = small("fedper", *EXAMPLE, f"privacy.release={switch}", "partition.clients=3", "partition.law=quantity")
    replies = list[Message]()
    summary = run_with(recorded(replies), experiment, tmp_path)
    left, split = records(replies), json.loads((tmp_path / "split.json").read_text())
    out = {
        "samples": declared_sizes(left) != {1} and set(left["metrics"]["num-examples"]) != {1},
        "loss": "loss/digit" in left["metrics"],
        "metrics": "evaluation" in left,
        "labels": "labels" in split and column(tmp_path, "train_samples")[0] != "",
        "hashes": set(left["identity"]["personal"]) != {""},
        "errors": switch == "errors",  # the next test
    }
    assert {name for name, is_out in out.items() if is_out} == {switch}
    red = [r["what"] for r in summary["privacy"]["releases"] if r["mechanism"] == "not protected"]
    assert red and all(r["mechanism"] != "not protected" or r["what"] in red for r in summary["privacy"]["releases"])


def test_an_errors_text_stays_with_the_client(tmp_path: Path) -> None:
    def failing(context: LocalContext) -> None:
        raise ValueError("the patient in row 7 has no label")

    for release, leaves in (("", False), ("errors", True)):
        experiment, out = small("fedavg", *EXAMPLE, f"privacy.release={release}"), tmp_path / (release or "none")
        with observed(experiment, out, Watching(failing)):
            reason = run_inline(experiment, out)["reason"]
        assert ("row 7" in reason) == leaves and "ValueError" in reason


def test_a_model_or_a_weight_that_breaks_the_promise_is_refused_before_the_run() -> None:
    from meadow.server.privacy import protection

    names = ("trunk.0.weight", "trunk.0.bias", "trunk.1.weight", "trunk.1.bias", "trunk.1.running_mean", "heads.0.bias")
    everything = Roles(names, names, (), ())

    def made() -> nn.Module:
        return nn.ModuleDict(
            {"trunk": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "heads": nn.Sequential(nn.Linear(4, 2))}
        )

    task = replace(open_task(small("fedavg")), targets=())
    object.__setattr__(task, "new_model", made)
    with pytest.raises(UserError, match=r'"trunk.1".*task.norm = "group"'):
        protection(small("fedavg", *EXAMPLE), task, everything)
    for settings in (LOCAL, CLIENT):
        with pytest.raises(UserError, match=r'"trunk.1.running_mean".*task.norm = "group"'):
            protection(small("fedavg", *settings), task, everything)
    for settings in (EXAMPLE, LOCAL, CLIENT):  # frozen, it stays in eval() and does not travel
        protection(small("fedavg", *settings), task, Roles(names[5:], names[5:], (), names[:5]))
    balanced = replace(task, targets=(Target("kind", "class", 3, balanced=True),))
    with refused("task.kinds"):
        protection(small("fedavg", *EXAMPLE), balanced, Roles(names[5:], names[5:], (), names[:5]))


OBSERVED: dict[str, Callable[[dict[str, Any], dict[str, Any], list[dict[str, str]]], bool]] = {
    "model arrays": lambda left, split, rows: any("@" not in name for name in left.get("arrays", ())),
    "control variates": lambda left, split, rows: any("@" in name for name in left.get("arrays", ())),
    "number of training samples": lambda left, split, rows: (
        set(left.get("metrics", {}).get("num-examples", [1])) != {1} or declared_sizes(left) != {1}
    ),
    "training loss": lambda left, split, rows: any(key.startswith("loss/") for key in left.get("metrics", ())),
    "metrics on the test part": lambda left, split, rows: bool(left.get("evaluation")),
    "metrics on the validation part": lambda left, split, rows: (
        bool(left.get("validation")) or any(key.startswith("validation") for key in left.get("evaluation", ()))
    ),
    "confusion counts": lambda left, split, rows: "confusion" in left,
    "label counts": lambda left, split, rows: (
        bool({"sizes", "labels", "left_out"} & split.keys()) or any(row["train_samples"] for row in rows)
    ),
    "text of errors": lambda left, split, rows: any(
        "Traceback" in why for why in left.get("error", {}).get("reason", ())
    ),
    "SHA-256 of the personal arrays": lambda left, split, rows: any(left.get("identity", {}).get("personal", ())),
}
"""What can be seen to leave, by the beginning of its declaration: in the replies, split.json and clients.csv."""

KNOWN = {
    "roll": {"clients", "sizes", "simulated", "code", "data", "split", "versions", "keeps"},
    "ledger": {"entries", "sha256", "epsilon", "secret"},
    "identity": {"personal", "trained"},
    "pack": {"clients", "summed", "kept", "lost", "times", "trainings"},
    "error": {"reason"},
}


@st.composite
def files(draw: st.DrawFn) -> list[str]:
    """Overrides over every axis that decides what leaves."""
    unit = draw(st.sampled_from(["none", "example", "example", "client", "local"]))
    fit = [name for name in ALGORITHMS if unit == "none" or fits(unit, algorithm(name))]
    settings_ = {
        "none": [], "example": ["privacy.sample_rate=0.2", "local.steps=2"], "client": [], "local": [],
    }[unit]  # fmt: skip
    settings_ = settings_ + ([] if unit == "none" else ["privacy.noise_multiplier=1", "privacy.accountant=rdp"])
    axes = {
        "privacy.release": st.lists(st.sampled_from(RELEASES), unique=True).map(",".join),
        "run.placement": st.sampled_from([*["federated"] * 6, "local", "pooled"]),
        "strategy.name": st.sampled_from([*fit, *fit, *ALGORITHMS]),
        "strategy.share": st.sampled_from(["all", "none", "body", "head", "trainable"]),
        "local.trainable": st.sampled_from(["all", "head", "last:1", "gradual", "lora", "adapters", "fisher"]),
        "local.momentum": st.sampled_from([0, 0.9]),
        "local.patience": st.sampled_from([*[0] * 9, 1]),
        "local.fisher_on": st.sampled_from(["source", "local"]),
        "cohort.sampling": st.sampled_from([*["fixed", "poisson"] * 4, "size"]),
        "cohort.fraction": st.sampled_from([0.5, 1.0]),
        "evaluate.on": st.sampled_from(["global", "clients", "global,clients"]),
        "evaluate.fine_tune_epochs": st.sampled_from([0, 0, 1]),
        "task.learn": st.sampled_from(["first", "all"]),
        "task.kinds": st.sampled_from([*[""] * 9, "class balanced,value"]),
        "task.public": st.sampled_from([*[""] * 9, "train"]),
        "task.pretrained": st.sampled_from(["", "source"]),
    }
    return [f"privacy.unit={unit}", *settings_, *(f"{key}={draw(values)}" for key, values in axes.items())]


@hypothesis.settings(
    max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(overrides=files())
def test_no_accepted_file_releases_what_it_does_not_declare(
    overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        experiment = small(
            "fedavg", *overrides, "run.rounds=2", "partition.clients=4", "partition.law=quantity",
            "task.hidden=8",
        )  # fmt: skip
    except UserError:
        return  # refused
    found, out = list[Message](), tmp_path_factory.mktemp("file") / "run"
    try:
        summary = run_with(recorded(found), experiment, out)
    except UserError:
        return
    left = records(found)
    for reply in found:
        for name, record in reply.content.array_records.items():
            left.setdefault("arrays", {}).update(dict.fromkeys(record, name))
    split = json.loads((out / "split.json").read_text())
    rows = list(csv.DictReader((out / "clients.csv").open())) if (out / "clients.csv").exists() else []
    declared = [entry["what"] for entry in summary["privacy"]["releases"]]
    pooled = experiment.run.placement == "pooled"
    if pooled and experiment.privacy.unit == "none":
        assert declared == ["all training data, into one place"]
        return
    for beginning, seen in OBSERVED.items():
        if pooled and beginning == "model arrays":
            continue  # "the trained model, out of that place"
        if seen(left, split, rows):
            assert any(what.startswith(beginning) for what in declared), (beginning, overrides)
    assert experiment.privacy.unit == "none" or "times" not in left["pack"]
    for kind, keys in KNOWN.items():
        assert set(left.get(kind, ())) <= keys | ({"exhausted"} if kind == "ledger" else set())
    assert {key.partition("/")[0] for key in left.get("metrics", ())} <= {"num-examples", "steps", "loss"}
    assert set(left) <= {*KNOWN, "metrics", "evaluation", "validation", "confusion", "arrays", "weights"}
    if experiment.privacy.unit in ("example", "local"):
        trained_ = sum(len(entries) for entries in ledgers(out).values())
        assert trained_ >= sum(len(set(r["cohort"])) - len(r["failed"]) for r in lines(out))


# ---- the training loop ----


def test_a_samples_loss_depends_on_it_alone_and_their_mean_is_the_loss() -> None:
    task = open_task(small("multitask"))
    data, model = in_double(task.client(0).train), task.new_model().double()
    each = sample_losses(model(data.x), data.y, task.targets)
    whole = losses(model(data.x), data.y, task.targets)
    for name, values in each.items():
        same_function(values.mean(), whole[name])
        alone = [
            sample_losses(model(data.x[[i]]), data.take(torch.tensor([i])).y, task.targets)[name] for i in range(9)
        ]
        same_function(torch.cat(alone), values[:9])


def permit(steps: int = 1) -> Permit:
    return Permit(Mechanism(0.2, 1.0, 1.0, 16.0, steps), Stream(1), Stream(2))


def test_a_proximal_term_acts_after_clip_and_noise() -> None:
    """mu (w - v) with mu = 10 and w - v = 1: the result is exactly the private step minus lr mu."""
    experiment = small("fedavg", *EXAMPLE, "local.momentum=0", "local.lr=0.01")
    task = open_task(experiment)
    model, data = task.new_model(), task.client(0).train

    def away(parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad += 10.0

    results = []
    for correct in (None, away):
        load_into(model, initial_state(experiment))
        train(model, Training(data, 1, 0, experiment.local, correct=correct, permit=permit()), task, experiment)
        results.append(floats(state_of(model)))
    for name, value in results[0].items():
        # Both steps have the same bits but for the sum of gradient and term, its product with lr, and the last sum.
        close(results[1][name], value - 0.1, 8, terms=np.abs(value) + 0.1, name=name)


NOISE_ALONE = (
    *EXAMPLE, "privacy.clip=1e-7", "privacy.noise_multiplier=1e5", "privacy.denominator=1", "privacy.accountant=rdp",
    "local.momentum=0", "local.lr=0.5", "partition.clients=2",
)  # fmt: skip
"""Gradients that vanish in their noise, which has deviation 0.01: what a private step does beside it is plain to see."""


def noises(experiment: Experiment, out: Path, client: int, round_: int) -> list[dict[str, Float64]]:
    """By how much the noise of each step of a client's release moved its model: it is by the ledger's entry, under the
    client's secret, and the learning rate of NOISE_ALONE is 0.5."""
    (entry,) = (each for each in ledgers(out)[client] if each["round"] == round_)
    stream = Stream(noise_seed(simulated_secret(experiment.run.seed, client), entry["release"]))
    parameters = dict(open_task(experiment).new_model().named_parameters())
    sizes = [p.numel() for p in parameters.values()]
    found = []
    for _ in range(experiment.local.steps):
        pieces = torch.split(0.5 * 1e-7 * 1e5 * stream.normal(sum(sizes)), sizes)
        found.append(
            {n: v.view(p.shape).double().numpy() for (n, p), v in zip(parameters.items(), pieces, strict=True)}
        )
    return found


@pytest.mark.parametrize("pull", ["strategy.name=fedprox strategy.mu", "anchor.to=received anchor.l2"])
def test_proximal_and_penalty_terms_of_a_whole_run_act_after_clip_and_noise(pull: str, tmp_path: Path) -> None:
    """With noise alone w1 = w0 - lr n1; a pull of strength mu, which no clip cuts, makes of it
    w2 = w1 - lr n2 - lr mu (w1 - w0)."""
    name, _, key = pull.rpartition(" ")
    settings = ("run.rounds=1", "partition.clients=1", *name.split(), f"{key}=0.8", "local.steps=2")
    experiment = small("fedavg", *NOISE_ALONE, *settings)
    run_inline(experiment, tmp_path)
    first, second = noises(experiment, tmp_path, 0, 1)
    start, found = floats(initial_state(experiment)), floats(final(tmp_path))
    for array, value in found.items():
        expected = start[array] - first[array] - second[array] + 0.5 * 0.8 * first[array]
        without = start[array] - first[array] - second[array]
        assert np.abs(value - expected).max() <= 2e-6 < np.abs(value - without).max(), array


def test_scaffolds_correction_acts_after_clip_and_noise(tmp_path: Path) -> None:
    """Of one client a round, with a step of noise alone, c is half of client a's first noise n, c_a all of it: so the second
    round moves by lr n / 2 less, if the client is another one, or more, if it is a again, than without."""
    plain = (*NOISE_ALONE, "cohort.size=1", "local.steps=1", "strategy.weights=equal", "strategy.name=scaffold")
    signs = set()
    for seed in range(4):
        experiment, out = small("fedavg", *plain, f"run.seed={seed}", "run.rounds=2"), tmp_path / str(seed)
        run_inline(experiment, out)
        first, second = (record["cohort"][0] for record in lines(out))
        sign = 1 if first == second else -1
        signs.add(sign)
        (n1,), (n2,) = noises(experiment, out, first, 1), noises(experiment, out, second, 2)
        start = floats(initial_state(experiment))
        for array, value in floats(final(out)).items():
            expected = start[array] - n1[array] - n2[array] + sign * n1[array] / 2
            assert np.abs(value - expected).max() <= 2e-6 < np.abs(n1[array]).max() / 10
    assert signs == {1, -1}


def test_a_term_over_the_batch_and_more_steps_than_were_charged_are_refused() -> None:
    experiment = small("fedavg", *EXAMPLE)
    task = open_task(experiment)
    model, data = task.new_model(), task.client(0).train
    with refused("strategy.name", 'privacy.unit = "example"'):
        training = Training(data, 1, 0, experiment.local, term=lambda *_: torch.zeros(()), permit=permit())
        train(model, training, task, experiment)
    once = permit(2)
    assert train(model, Training(data, 1, 0, experiment.local, permit=once), task, experiment).steps == 2
    with refused('privacy.unit = "example"', 2):
        train(model, Training(data, 1, 0, experiment.local, permit=once), task, experiment)


# ---- a crash ----

QUICK = ("task.hidden=8", "evaluate.on=clients", "evaluate.every=9")


@pytest.mark.parametrize(
    ("unit", "rounds_paid", "clients"), [("example", 2, 2), ("example", 1, 3), ("local", 2, 2), ("local", 1, 3)]
)
def test_killed_at_any_write_the_ledger_is_never_below_the_truth_and_the_bits_are_the_same(
    unit: str, rounds_paid: int, clients: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGKILL before, in the middle of and after each write and sync of a ledger, and at each other write of a run;
    with a budget for all rounds, and for the first alone."""
    parts = {"example": (0.1, 1.0, 3 * rounds_paid), "local": (1.0, 2.0, rounds_paid)}[unit]
    budget = 1.001 * epsilon([parts], 1e-5, "rdp")
    experiment = small(
        "fedper",
        *{"example": EXAMPLE, "local": LOCAL}[unit],
        f"partition.clients={clients}",
        *QUICK,
        "run.rounds=2",
        "privacy.accountant=rdp",
        f"privacy.epsilon={budget}",
    )
    expected = run_inline(experiment, tmp_path / "whole")
    with monkeypatch.context() as patch:
        points = faults(patch, 0)
        trained = run_noting(experiment, tmp_path / "count", tmp_path / "truth")
    assert points[0] >= 20 and len(trained) == clients * rounds_paid
    assert expected["status"] == ("done" if rounds_paid == 2 else "stopped")
    for number in range(1, points[0] + 1):
        out, truth = tmp_path / str(number), tmp_path / f"truth of {number}"
        assert killed(experiment, out, number, truth) == signal.SIGKILL, number
        recorded = set()
        for path in out.rglob("client-*.ledger"):
            whole = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            recorded |= {(whole[0]["client"], entry["round"]) for entry in whole[1:]}
        assert noted(truth) <= recorded, number  # nobody trained who is not written down
        resumed = run_inline(experiment, out, resume=True)
        assert [resumed[k] for k in RESUMED] == [expected[k] for k in RESUMED], number
        assert resumed["privacy"] == expected["privacy"]
        assert ledgers(out) == ledgers(tmp_path / "whole")  # each charged once, and never past the budget
        assert all(entry["epsilon"] <= budget for entries in ledgers(out).values() for entry in entries)


@pytest.mark.parametrize("rounds_paid", [5, 3])
def test_killed_at_any_write_whole_clients_get_the_same_model_and_no_round_beyond_the_budget(
    rounds_paid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With client-level DP the server accounts, by rounds: a real SIGKILL at each write of a run, and in each round between
    the noise and all that follows it."""
    budget = 1.001 * client_guarantee([(0.5, 1.0, rounds_paid)], 1e-5, "rdp").epsilon
    experiment = small(
        "fedper", *CLIENT, *QUICK, "partition.clients=4", "run.rounds=5", "privacy.accountant=rdp",
        f"privacy.epsilon={budget}",
    )  # fmt: skip
    expected = run_inline(experiment, tmp_path / "whole")
    assert (expected["status"], expected["rounds"]) == ("done" if rounds_paid == 5 else "stopped", rounds_paid)
    with monkeypatch.context() as patch:
        points = faults(patch, 0)
        run_inline(experiment, tmp_path / "count")
    made = releases_of(tmp_path / "count")
    assert points[0] >= 20 and len(set(made)) == len(made) == rounds_paid
    for number in range(1, points[0] + 1):
        out = tmp_path / str(number)
        assert killed(experiment, out, number, tmp_path / f"truth of {number}") == signal.SIGKILL, number
        resumed = run_inline(experiment, out, resume=True)
        assert [resumed[k] for k in RESUMED] == [expected[k] for k in RESUMED], number
        assert resumed["privacy"] == expected["privacy"]
        # What was combined before the kill is combined again with the same noise, or not at all: no release beyond those.
        assert releases_of(out) == made, number


def releases_of(out: Path) -> list[str]:
    """The releases of whole clients that the server has written down: each by a hash of what its noise is added to."""
    found: list[str] = json.loads((out / "releases.json").read_text())
    return found


def killed(experiment: Experiment, out: Path, number: int, truth: Path) -> int:
    """Run it in a process of its own that ends by SIGKILL at the given fault point; the signal that it ended by."""
    child = os.fork()
    if child == 0:
        try:
            faults(pytest.MonkeyPatch(), number)
            run_noting(experiment, out, truth)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status)


def run_noting(experiment: Experiment, out: Path, truth: Path) -> set[tuple[int, int]]:
    """Run it, and note in the file `truth` who begins to train in which round, as `noted` returns it."""

    def begins(context: LocalContext) -> None:
        with truth.open("a") as file:
            file.write(f"{context.client} {context.round}\n")

    with observed(experiment, out, Watching(begins)):
        run_inline(experiment, out)
    return noted(truth)


def noted(truth: Path) -> set[tuple[int, int]]:
    """(client, round) of each training that was begun, also by a process that was killed after it."""
    lines_ = truth.read_text().splitlines() if truth.exists() else []
    return {(int(client), int(round_)) for client, round_ in (line.split() for line in lines_)}


def faults(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Die by SIGKILL at the given point (0: never); the number of points passed.

    The points: before, in the middle of and after each write of a ledger, after each sync of a ledger and of the rounds'
    records, and before each other file gets its name.
    """
    count, honest = [0], (os.write, os.fsync, os.replace)

    def point(last: Callable[[], object] = lambda: None) -> None:
        count[0] += 1
        if 0 < number <= count[0]:
            last()
            os.kill(os.getpid(), signal.SIGKILL)

    def name(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    def write(descriptor: int, content: bytes) -> int:
        if not name(descriptor).endswith(".ledger"):
            return honest[0](descriptor, content)
        point()
        point(lambda: honest[0](descriptor, content[: len(content) // 2]))
        written = honest[0](descriptor, content)
        point()
        return written

    def sync(descriptor: int) -> None:
        honest[1](descriptor)
        if name(descriptor).endswith((".ledger", "rounds.jsonl")):
            point()

    def replace_(source: Path, target: Path) -> None:
        point()
        honest[2](source, target)

    for what, by in (("write", write), ("fsync", sync), ("replace", replace_)):
        monkeypatch.setattr(os, what, by)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL, CLIENT], ids=["example", "local", "client"])
def test_killed_at_random_moments_epsilon_is_never_below_the_rounds_that_were_made(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    """The command in a real process, a SIGKILL whenever it falls, until the run gets through."""
    experiment = small("fedper", *settings, "run.rounds=60", "privacy.accountant=rdp")
    expected = run_inline(experiment, tmp_path / "whole")
    out, file = tmp_path / "run", tmp_path / "e.toml"
    file.write_text(to_toml(experiment))
    command = [sys.executable, "-m", "meadow", "run", str(file), "--quiet", "--resume", "--out", str(out)]
    command += ["--engine", "inline"]
    moments, made = random.Random(6), 0
    for _ in range(5):
        process = subprocess.Popen(command)
        while process.poll() is None and len(lines(out) if (out / "rounds.jsonl").exists() else ()) <= made:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was at work, and did not come to its end
        records = [json.loads(text) for text in (out / "rounds.jsonl").read_text().splitlines(keepends=True)
                   if text.endswith("\n")]  # fmt: skip
        made = len(records)
        if settings != CLIENT:  # the server's noise is by the round, and its cost by the rounds that were begun
            for number, entries in ledgers(out).items():
                assert len(entries) >= sum(number in record["cohort"] for record in records)
    assert subprocess.run(command).returncode == 0
    resumed = run_inline(experiment, out, resume=True)
    assert [resumed[k] for k in RESUMED] == [expected[k] for k in RESUMED]
    assert resumed["privacy"] == expected["privacy"] and ledgers(out) == ledgers(tmp_path / "whole")


# ---- whole clients ----


def updates_of(replies: list[Message], sent: Arrays) -> list[Arrays]:
    """What the clients' updates of the first round were, by client."""
    found: dict[int, Arrays] = {}
    before = floats(sent)
    for reply in replies:
        for name, record in reply.content.array_records.items():
            if name.endswith(".arrays") and name.split(".")[0].isdecimal():
                found[int(name.split(".")[0])] = {n: v - before[n] for n, v in floats(from_record(record)).items()}
    return [found[c] for c in sorted(found)]


def norm(update: Mapping[str, npt.NDArray[np.generic]]) -> float:
    return math.sqrt(sum(float(np.square(v.astype(np.float64)).sum()) for v in update.values()))


def test_a_round_is_the_clipped_sum_and_one_noise_over_the_expected_cohort(tmp_path: Path) -> None:
    """A round moves the model by (sum(clip(update)) + z C N(0, 1)) / (q N), with the noise of the one release that the
    server has written down, under its secret; it is drawn array by array in the order of their names."""
    experiment = small(
        "fedavg", *CLIENT, "run.rounds=1", "run.seed=3", "privacy.clip=0.05", "privacy.noise_multiplier=0.5"
    )
    replies = list[Message]()
    run_with(recorded(replies), experiment, tmp_path)
    (inputs,) = releases_of(tmp_path)
    noise = np.random.Generator(np.random.Philox(noise_seed(simulated_secret(3, -1), inputs)))
    sent = {n: v for n, v in initial_state(experiment).items() if n in final(tmp_path)}
    start, updates = floats(sent), updates_of(replies, sent)
    assert len(updates) == len(lines(tmp_path)[0]["cohort"]) != 4
    total = {n: sum(u[n].astype(np.float64) * min(1.0, 0.05 / norm(u)) for u in updates) for n in start}
    for name, value in sorted(final(tmp_path).items()):
        moved = total[name] + noise.normal(0, 0.5 * 0.05, value.shape)
        close(value, start[name] + moved / 4, 1, name=name)  # a sum in float64, rounded once


def test_client_level_noise_has_its_deviation_and_epsilon_is_that_of_poisson_rounds(tmp_path: Path) -> None:
    """With a clip so small that updates vanish in it, a round moves every number by N(0, (z C / (q N))^2)."""
    experiment = small("fedavg", *CLIENT, "run.rounds=2", "privacy.clip=1e-3", "privacy.noise_multiplier=3")
    summary = run_inline(experiment, tmp_path)
    checkpoints = sorted((tmp_path / "checkpoints").glob("*.safetensors"))
    first, second = (floats(read_arrays(path)) for path in checkpoints)
    moves = np.concatenate([(second[n] - first[n]).ravel() for n in first]) / (3 * 1e-3 / 4)
    assert len(moves) > 2000
    # The sum of squares of n normals has mean n and deviation sqrt(2 n); the updates add at most (4 / 3)^2 or so.
    assert float(np.square(moves).sum()) == pytest.approx(len(moves), abs=5 * math.sqrt(2 * len(moves)) + 10)
    assert summary["privacy"]["epsilon"]["max"] == client_guarantee([(0.5, 3.0, 2)], 1e-5).epsilon
    assert summary["privacy"]["statement"] == str(client_guarantee([(0.5, 3.0, 2)], 1e-5))
    assert set(column(tmp_path, "epsilon")) == {str(summary["privacy"]["epsilon"]["max"])}


def test_an_empty_cohort_is_a_round_of_noise_and_costs_as_any_other(tmp_path: Path) -> None:
    experiment = small("fedavg", *CLIENT, "partition.clients=2", "cohort.fraction=0.5", "run.rounds=6")
    summary = run_inline(experiment, tmp_path)
    empty = [record["round"] for record in lines(tmp_path) if not record["cohort"]]
    assert empty and summary["status"] == "done"
    assert summary["privacy"]["epsilon"]["max"] == client_guarantee([(0.5, 1.0, 6)], 1e-5).epsilon
    hashes = {arrays_sha256(read_arrays(p)) for p in (tmp_path / "checkpoints").glob("*.safetensors")}
    assert len(hashes) == 3


def test_a_fixed_cohort_is_accounted_as_one(tmp_path: Path) -> None:
    poisson_, fixed = (
        run_inline(small("fedavg", *CLIENT, f"cohort.sampling={how}"), tmp_path / how) for how in ("poisson", "fixed")
    )
    assert fixed["privacy"]["epsilon"]["max"] > poisson_["privacy"]["epsilon"]["max"]
    assert "replace one" in fixed["privacy"]["adjacency"] and fixed["privacy"]["accountant"] == "rdp"


def test_a_client_level_budget_ends_the_run_before_it_is_passed(tmp_path: Path) -> None:
    spent = client_guarantee([(0.5, 1.0, 2)], 1e-5).epsilon
    summary = run_inline(small("fedavg", *CLIENT, f"privacy.epsilon={spent * 1.001}"), tmp_path)
    assert (summary["status"], summary["rounds"]) == ("stopped", 2)
    assert "budget of every client is spent" in summary["reason"]
    assert summary["privacy"]["epsilon"]["max"] == spent


@pytest.mark.parametrize("rounds_paid", [4, 3])
def test_a_round_of_whole_clients_made_again_with_other_replies_is_another_release(
    rounds_paid: int, tmp_path: Path
) -> None:
    """The last of three rounds is made again after a crash, and the replies are others: four releases, of other noise,
    if the budget has room for four."""
    budget = 1.001 * client_guarantee([(0.5, 1.0, rounds_paid)], 1e-5).epsilon
    experiment = small("fedavg", *CLIENT, f"privacy.epsilon={budget}")
    run_inline(experiment, tmp_path)
    for path in [tmp_path / "summary.json", *(tmp_path / "checkpoints").glob("*3.*")]:
        path.unlink()

    def others(node: Node, request: Request) -> Answer:
        found = train_client(node, request)
        return replace(found, arrays={n: (v + 0.01).astype(np.float32) for n, v in floats(found.arrays or {}).items()})

    again = run_with(clients_answer(others), experiment, tmp_path, resume=True)
    made = releases_of(tmp_path)
    assert len(set(made)) == len(made) == rounds_paid
    assert (again["status"], again["rounds"]) == (("done", 3) if rounds_paid == 4 else ("stopped", 2))
    assert again["privacy"]["epsilon"]["max"] == client_guarantee([(0.5, 1.0, rounds_paid)], 1e-5).epsilon


ADAPTIVE = ("privacy.adaptive_clip=true", "privacy.clip_count_noise=0.8", "cohort.fraction=0.5", "partition.clients=16")


def test_the_adaptive_clip_grows_where_updates_are_longer_and_is_kept_in_checkpoints(tmp_path: Path) -> None:
    experiment = small("fedavg", *CLIENT, *ADAPTIVE, "privacy.clip=1e-4", "run.rounds=4", "privacy.clip_rate=0.5")
    whole = run_inline(experiment, tmp_path)
    state = [json.loads(p.read_text())["privacy"] for p in sorted((tmp_path / "checkpoints").glob("*.json"))]
    bounds = [s["bound"] for s in state]
    # None is within: of n replies each counts -1/2, over the expected 8, so that the factor is exp(0.5 n / 16), and the
    # noise on the count moves its logarithm by 0.5 * 0.8 / 8.
    for record, (before, after) in zip(lines(tmp_path)[2:], itertools.pairwise(bounds), strict=True):
        assert math.log(after / before) == pytest.approx(0.5 * len(record["cohort"]) / 16, abs=4 * 0.05)
    assert whole["privacy"]["epsilon"]["max"] == client_guarantee([(0.5, 1.0, 4)], 1e-5).epsilon
    for path in [tmp_path / "summary.json", *(tmp_path / "checkpoints").glob("*4.*")]:
        path.unlink()
    resumed = run_inline(experiment, tmp_path, resume=True)
    assert resumed["model_sha256"] == whole["model_sha256"]


def test_a_cohort_too_small_for_the_counts_noise_is_refused(tmp_path: Path) -> None:
    with refused("clip_count_noise"):
        run_inline(small("fedavg", *CLIENT, *ADAPTIVE, "partition.clients=6"), tmp_path)


# ---- local DP ----


def test_a_noised_update_is_what_the_ledgers_entry_gives(tmp_path: Path) -> None:
    """received + clip(update) + z C N(0, 1), with the noise of the entry under the client's secret; the server takes the
    plain mean."""
    bare: dict[int, Arrays] = {}

    def ends(context: LocalContext, trained: Trained) -> None:
        bare[context.client] = state_of(context.whole)

    experiment = small(
        "fedavg", *LOCAL, "run.rounds=1", "privacy.clip=0.2", "partition.clients=3", "partition.law=quantity"
    )
    with observed(experiment, tmp_path, Watching(ends=ends)):
        summary = run_inline(experiment, tmp_path)
    start, mean = floats(initial_state(experiment)), final(tmp_path)
    noised = []
    for number, entries in sorted(ledgers(tmp_path).items()):
        assert entries[0]["parts"] == [[1.0, 2.0, 1]] and entries[0]["unit"] == "local"
        update = {n: v - start[n] for n, v in floats(bare[number]).items()}
        scale = min(1.0, 0.2 / norm(update))
        generator = np.random.Generator(
            np.random.Philox(noise_seed(simulated_secret(0, number), entries[0]["release"]))
        )
        noised.append({n: start[n] + u * scale + generator.normal(0, 0.8, u.shape) for n, u in sorted(update.items())})
    for name, value in mean.items():
        # Each noised update leaves in float32, and so does their mean.
        terms = np.mean([np.abs(one[name]) for one in noised], axis=0)
        close(value, np.mean([one[name] for one in noised], axis=0), 4, terms, name=name)
    assert summary["privacy"]["statement"] == str(local_guarantee([(4.0, 1)], 1e-5))


def test_local_noise_is_calibrated_over_the_rounds_that_a_client_takes_part_in(tmp_path: Path) -> None:
    settings = ("privacy.unit=local", "privacy.epsilon=8", "privacy.accountant=rdp", "cohort.size=4", "run.rounds=4")
    experiment = small("fedavg", *settings)
    summary = run_inline(experiment, tmp_path)
    assert 0.995 * 8 <= summary["privacy"]["epsilon"]["median"] <= summary["privacy"]["epsilon"]["max"] <= 8


# ---- plan and report ----


@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL, CLIENT], ids=["example", "local", "client"])
def test_the_plan_forecasts_what_the_run_spends(settings: tuple[str, ...], tmp_path: Path) -> None:
    experiment = small("fedavg", *settings, *(() if settings == CLIENT else ("cohort.size=3",)))
    summary = run_inline(experiment, tmp_path)
    spent = [float(text) for text in column(tmp_path, "epsilon") if text]
    assert sorted(e for _, e, _ in forecasts(experiment) if e > 0) == pytest.approx(sorted(spent))
    assert plan(experiment)["privacy"]["epsilon"] == summary["privacy"]["statement"]
    half = small("fedavg", *settings, "cohort.sampling=fixed", "cohort.fraction=1", f"privacy.epsilon={max(spent) / 2}")
    stopped = run_inline(half, tmp_path / "half")
    noise, epsilon_, early = forecasts(half)[0]
    assert early and stopped["status"] == "stopped"
    assert (stopped["privacy"]["epsilon"]["max"] or 0.0) == pytest.approx(epsilon_) and noise > 0


def test_the_report_shows_what_is_not_protected_in_red(tmp_path: Path) -> None:
    for release in ("", "loss"):
        out = tmp_path / (release or "none")
        run_inline(small("fedper", *EXAMPLE, f"privacy.release={release}"), out)
        page = write_report([out], out / "report.html").read_text()
        red = [row.split("</td>")[0] for row in page.split('<tr class="bare"><td>')[1:]]
        assert red == (["training loss"] if release else [])
        assert "(unit: one example of a client; adjacency: add or remove one; accountant: pld)" in page
        assert "DP-SGD (Poisson rate 0.1, gradients clipped to 1, Gaussian noise)" in page


def test_another_share_of_the_steps_is_another_release(tmp_path: Path) -> None:
    """The server decides how much work it asks for; the noise of one answer never covers another update."""
    experiment = small("fedavg", *LOCAL, "partition.clients=4")
    task = open_task(experiment)
    keeper = Ledgers(experiment, tmp_path, task.dataset.sha256, task.split.sha256, simulated=True)
    start = initial_state(experiment)
    releases = [charge(keeper, RecordDict(), 1, 0, start, work) for work in (1.0, 0.5, 1.0)]
    entries = [release.charged.mark.entries for release in releases]
    assert releases[0].noise_seed == releases[2].noise_seed != releases[1].noise_seed
    assert max(entries) == 2


@pytest.mark.parametrize("settings", [("local.steps=5",), ("local.steps=40", "local.patience=1", "local.lr=0.5")])
def test_steps_are_told_only_where_they_are_public(tmp_path: Path, settings: tuple[str, ...]) -> None:
    run_inline(small("fedavg", *LOCAL, *settings, "run.rounds=1", "partition.clients=4"), tmp_path)
    record = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert record["steps"] == 0


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (("privacy.budgets=choice 1 2",), "privacy.budgets"),
        (("cohort.sampling=poisson", "cohort.fraction=0.5", "cohort.quorum=2"), "cohort.quorum = 2"),
        (("strategy.weights=samples",), "strategy.weights"),
    ],
)
def test_whole_clients_have_one_budget_one_weight_and_no_quorum(settings: tuple[str, ...], names: str) -> None:
    with pytest.raises(UserError, match=names):
        small("fedavg", "privacy.unit=client", "privacy.noise_multiplier=1", *settings)


def test_a_run_ends_when_all_who_train_have_spent_their_budget(tmp_path: Path) -> None:
    """The unseen client has no budget, so it is not waited for."""
    local = ("privacy.unit=local", "privacy.budgets=choice 8", "privacy.noise_multiplier=1", "privacy.accountant=rdp")
    summary = run_inline(small("fedavg", *local, "evaluate.unseen=0.25", "partition.clients=4"), tmp_path)
    assert summary["status"] == "stopped" and "every client is spent" in summary["reason"]
