"""The poison table: under every strategy the run ends, and has the bits of the run without those who poison it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import clients_answer, run_with, small
from meadow.arrays.named import Arrays
from meadow.client.answers import train_client
from meadow.config.algorithms import ALGORITHMS
from meadow.server.admission import admit
from meadow.server.checkpoints import latest
from meadow.strategies.wire.packing import Answer

HONEST = 4

Poison = Callable[[Answer], None]

NAME = "trunk.linear2.bias"


def arrays_by(change: Callable[[Arrays], Arrays | None]) -> Poison:
    """A poison of the arrays: `change` gets a copy of them, and may return others."""

    def poison(reply: Answer) -> None:
        arrays = {name: value.copy() for name, value in (reply.arrays or {}).items()}
        found = change(arrays)
        reply.arrays = arrays if found is None else found

    return poison


def metric(key: str, value: Any) -> Poison:
    def poison(reply: Answer) -> None:
        reply.values = (reply.values or {}) | {"metrics": {**reply.metrics, key: value}}

    return poison


def without(reply: Answer, what: str) -> None:
    """Let what a client says of a kind be missing."""
    reply.values = {kind: values for kind, values in (reply.values or {}).items() if kind != what}


POISONS: dict[str, Poison] = {
    "nan": arrays_by(lambda a: a[NAME].fill(np.nan)),
    "infinite": arrays_by(lambda a: a[NAME].fill(np.inf)),
    "wrong shape": arrays_by(lambda a: a | {NAME: np.zeros((1, 4), np.float32)}),
    "scalar": arrays_by(lambda a: a | {NAME: np.zeros((), np.float32)}),
    "missing key": arrays_by(lambda a: {n: v for n, v in a.items() if n != NAME}),
    "nothing": arrays_by(lambda a: {}),
    "extra key": arrays_by(lambda a: a | {"trunk.9.bias": np.zeros(4, np.float32)}),
    "extra beside": arrays_by(lambda a: a | {f"z@{NAME}": np.zeros(4, np.float32)}),
    "complex": arrays_by(lambda a: a | {NAME: np.zeros(4, np.complex64)}),
    "text": arrays_by(lambda a: a | {NAME: np.array(["one"] * 4)}),
    "far": arrays_by(lambda a: a[NAME].fill(1e30)),
    "no record": lambda reply: setattr(reply, "arrays", None),
    "no metrics": lambda reply: without(reply, "metrics"),
    "metrics of text": metric("num-examples", "many"),
    "weight -1": metric("num-examples", -1),
    "weight nan": metric("num-examples", math.nan),
    "weight 1e12": metric("num-examples", 1e12),
    "weight 0": metric("num-examples", 0),
    "weight of a head": metric("num-examples/digit", math.nan),
}
STEPS = {f"steps {value}": metric("steps", value) for value in (0, -3, 10**9, math.nan, 1.5)}
"""Poisons for those who divide by a client's steps."""


def poisoned_runs(name: str, poisons: dict[str, Poison], out: Path) -> None:
    share = "body" if name in ("fedalt", "fedrep") else "all"
    clients = HONEST + len(poisons)
    experiment = small(
        "fedavg", f"strategy.name={name}", f"strategy.share={share}", f"partition.clients={clients}", "run.rounds=2",
        "task.hidden=4", "partition.law=iid", "partition.min_size=3", "local.steps=1", "evaluate.on=global",
        "evaluate.every=2", "cohort.max_norm=1e6",
    )  # fmt: skip
    kinds = dict(enumerate(poisons.values(), start=1))  # client 0 is honest, and so are the last ones

    def absent(node: Any, request: Any) -> Any:
        if request.client in kinds:
            raise OSError("absent")
        return train_client(node, request)

    def poisoned(node: Any, request: Any) -> Any:
        reply = train_client(node, request)
        if request.client in kinds:
            kinds[request.client](reply)
        return reply

    expected = run_with(clients_answer(absent), experiment, out / "without")
    summary = run_with(clients_answer(poisoned), experiment, out / "poisoned")
    assert expected["status"] == summary["status"] == "done"
    for line in (out / "poisoned" / "rounds.jsonl").read_text().splitlines():
        refused = {f["client"]: f["reason"] for f in json.loads(line)["failed"]}
        assert refused.keys() == kinds.keys()
        assert all(refused.values())
    assert summary["model_sha256"] == expected["model_sha256"]
    checkpoint, _ = latest(out / "poisoned" / "checkpoints")
    assert checkpoint is not None
    assert all(np.isfinite(value).all() for value in (checkpoint.arrays | checkpoint.strategy).values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_poison_costs_the_poisoner_only(name: str, tmp_path: Path) -> None:
    poisoned_runs(name, POISONS, tmp_path)


def test_steps_that_cannot_be_are_refused(tmp_path: Path) -> None:
    poisoned_runs("fednova", STEPS, tmp_path)


def test_a_poisoned_control_variate_is_refused(tmp_path: Path) -> None:
    poison = arrays_by(lambda a: a[f"c@{NAME}"].fill(np.nan))
    poisoned_runs("scaffold", {"nan beside": poison}, tmp_path)


def test_a_second_reply_does_not_count() -> None:
    replies = [
        Answer(client, {"metrics": {"num-examples": 3}}, {"w": np.full(2, value, np.float32)})
        for client, value in ((2, 1.0), (5, 2.0), (2, 9.0), (5, 2.0))
    ]
    verdict = admit(replies, {}, {c: {"w": np.zeros(2, np.float32)} for c in (2, 5)}, {2: 3, 5: 3})
    assert (verdict.admitted, verdict.refused) == (replies[:2], {})
