"""Who trains: what a run, its records and a plan say of it, against the calls that were really made; and what takes over
where a trainer fails."""

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch

from helpers.runs import run_inline, small
from meadow.arrays.named import Arrays
from meadow.client.loop.training import Training, train
from meadow.client.trainers.choose import Loop, Trainers, trainers_of
from meadow.client.trainers.direct import Direct
from meadow.client.trainers.fused import Fused
from meadow.client.trainers.kernel import KernelTrainer, Member, Result
from meadow.config.schema import Experiment
from meadow.experiments.api import check_run
from meadow.experiments.plan import plan
from meadow.runtime.errors import UserError
from meadow.strategies.wire.packing import NodeReply, pack_replies, unpack_replies
from meadow.strategies.wire.trainings import UNDISCLOSED, Trainings
from meadow.tasks.evaluation import state_of
from meadow.tasks.features import View
from meadow.tasks.task import open_task

ENTRIES: dict[CodeType, str] = {
    train.__code__: "loop",
    Direct._train_one.__code__: "direct",
    Fused._train_one.__code__: "fused",
}
"""Where each trainer trains one client."""


@contextmanager
def calls() -> Iterator[Counter[str]]:
    """Counts the trainings that are really done in this thread, as Python's profiler sees them."""
    seen = Counter[str]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in ENTRIES:
            seen[ENTRIES[frame.f_code]] += 1

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


ONE = ("task.learn=first", "evaluate.fine_tune_epochs=0")


@pytest.mark.parametrize(
    ("preset", "settings", "expected", "hook"),
    [
        ("fedavg", (), {"direct": 24}, ""),
        ("fedavg", ("engine.exact=false",), {"fused": 24}, ""),
        ("fedavg", ("engine.trainer=loop",), {"loop": 24}, ""),
        ("fedavg", ("cohort.max_norm=1e6",), {"direct": 24}, ""),
        ("fedprox", (), {"loop": 24}, "gradient"),
        ("scaffold", (), {"loop": 24}, "gradient"),
        ("feddyn", (), {"loop": 24}, "gradient"),
        ("moon", (), {"direct": 8, "loop": 16}, "loss"),  # in a client's first round it has no term
        ("ditto", (), {"direct": 24, "loop": 24}, "gradient"),
        ("fedavg", ("partition.holds=digit 0-3,slant 4-7",), {"direct": 12, "loop": 12}, "labels"),
    ],
)
def test_a_run_counts_who_trained(
    preset: str, settings: tuple[str, ...], expected: dict[str, int], hook: str, tmp_path: Path
) -> None:
    """8 clients, 3 rounds. The profiler, the summary, the records and the plan agree."""
    experiment = small(preset, *ONE, *settings)
    with calls() as seen:
        summary = run_inline(experiment, tmp_path / "run")
    engine = summary["engine"]
    assert seen == engine["training"] == expected
    reasons = engine["passed_over"].get("direct", {})
    assert sum(reasons.values()) == (expected.get("loop", 0) if experiment.engine.trainer == "auto" else 0)
    assert not hook or all(hook in reason for reason in reasons)
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert Trainings.total(records).as_json() == {key: engine[key] for key in ("training", "passed_over")}
    forecast = plan(experiment)["training"]
    assert {kind["trainer"] for kind in forecast} == expected.keys()
    passed_over = {(kind["trainer"], name, why) for kind in forecast for name, why in kind["passed_over"].items()}
    assert {(name, why) for _, name, why in passed_over} == {
        (n, why) for n, some in engine["passed_over"].items() for why in some
    }


def test_a_resumed_run_counts_the_whole_run(tmp_path: Path) -> None:
    experiment = small("fedprox", *ONE)
    whole = run_inline(experiment, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept
    assert run_inline(experiment, tmp_path / "run", resume=True)["engine"] == whole["engine"]


def test_counts_travel_with_a_reply() -> None:
    reply = NodeReply([])
    reply.trainings.add("direct", (("fused", 'a "reason"'),), 3)
    reply.trainings.add("loop", (("fused", 'a "reason"'), ("direct", "another")))
    found = unpack_replies(pack_replies(reply)).trainings
    assert found == reply.trainings
    assert found.counts == {"direct": 3, "loop": 1}
    assert found.passed_over == {"fused": {'a "reason"': 4}, "direct": {"another": 1}}
    for wrong in ({"training": {"loop": -1}}, {"training": {"loop": True}}, {"passed_over": {"direct": 1}}):
        with pytest.raises(ValueError):
            Trainings.from_json(wrong)


def test_private_labels_are_not_told_by_who_trained(tmp_path: Path) -> None:
    """Under local DP a client with missing labels trains by the loop; who did stays with the node."""
    private = ("privacy.unit=local", "privacy.noise_multiplier=0.5", "partition.holds=digit 0-3,slant 4-7")
    with calls() as seen:
        engine = run_inline(small("fedavg", *ONE, *private), tmp_path / "run")["engine"]
    assert seen == {"direct": 12, "loop": 12}
    assert (engine["training"], engine["passed_over"]) == ({UNDISCLOSED: 24}, {})


class Failing(Direct):
    """Fails for client 1."""

    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Result:
        if any(member.client == 1 for block in blocks for member in block):
            raise RuntimeError("a kernel that fails")
        return super().train(start, blocks, rates, weights)


def parts(experiment: Experiment) -> tuple[Trainers, View]:
    task = open_task(experiment)
    seen = View(task.new_model(), task)
    return trainers_of(experiment, seen), seen


def test_where_a_trainer_fails_the_loop_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    """To the loop's bits, from where the client began; logged once with the reason. A forced trainer's error is raised."""
    experiment = small("fedavg", *ONE)
    trainers, seen = parts(experiment)
    failing = KernelTrainer(Failing, experiment, seen.task, trainers.job.network)
    trainers.available = [failing, trainers.loop]
    start = state_of(seen.model)
    found: list[dict[str, Any]] = []
    with caplog.at_level(logging.WARNING):
        for client in (1, 0, 1):
            seen.model.load_state_dict({n: torch.from_numpy(v) for n, v in start.items()})
            training = Training(seen.task.client(client).train, 1, client, experiment.local)
            trainers.train(seen.model, training)
            found.append(state_of(seen.model))
    assert trainers.trainings.counts == {"loop": 2, "direct": 1}
    assert [(r.levelno, "a kernel that fails" in r.getMessage()) for r in caplog.records] == [(logging.WARNING, True)]
    seen.model.load_state_dict({n: torch.from_numpy(v) for n, v in start.items()})
    Loop(experiment, seen.task).train(seen.model, training)
    by_loop = state_of(seen.model)
    assert all(np.array_equal(found[0][n], by_loop[n]) and np.array_equal(found[2][n], by_loop[n]) for n in by_loop)
    trainers.available = [failing]
    with pytest.raises(RuntimeError):
        trainers.train(seen.model, training)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("engine.trainer=direct", "local.optimizer=adam"), "local.optimizer"),
        (("engine.trainer=fused", "strategy.name=fedprox"), "fedprox"),
        (("engine.trainer=direct", "task.learn=all"), "one target"),
        (
            ("engine.trainer=stacked", "privacy.unit=example", "privacy.noise_multiplier=1", "privacy.sample_rate=0.1"),
            "privacy.unit",
        ),
        (("engine.trainer=direct", "partition.holds=digit 0-3,slant 4-7"), "labels"),
    ],
)
def test_a_forced_trainer_that_cannot_is_refused_with_the_reason(settings: tuple[str, ...], why: str) -> None:
    experiment = small("fedavg", *ONE, *settings)
    for refuse in (check_run, plan):
        with pytest.raises(UserError, match=why):
            refuse(experiment)


def test_each_trainer_can_be_forced(tmp_path: Path) -> None:
    """On a CPU, with engine.exact as it is."""
    for name in ("loop", "direct", "fused", "stacked"):
        engine = run_inline(small("fedavg", *ONE, f"engine.trainer={name}"), tmp_path / name)["engine"]
        assert (engine["training"], engine["passed_over"]) == ({name: 24}, {})
