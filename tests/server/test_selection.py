"""Validation decides when a run ends and which round's model it keeps; test parts decide nothing."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

import meadow
from helpers.runs import clients_answer, run_inline, run_with, small
from meadow.client.answers import Handler, evaluate_client, train_client
from meadow.client.app import app
from meadow.client.node import Node
from meadow.config.schema import Experiment
from meadow.experiments.api import check_run
from meadow.experiments.results import read_run
from meadow.runtime.errors import UserError
from meadow.strategies.wire.packing import Answer, Request
from meadow.tasks.evaluation import evaluate, state_of
from meadow.tasks.task import open_task


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", ["fedavg", "fedper", "ditto", "pooled"])
def test_validation_scores_are_those_of_the_validation_parts(preset: str, tmp_path: Path) -> None:
    """At the end: each client's model, loaded from the run, scored on its own validation part, gives its row's scores."""
    experiment = small(preset)
    summary = run_inline(experiment, tmp_path)
    task = open_task(experiment)
    rows = list(csv.DictReader((tmp_path / "clients.csv").open()))
    found, sizes, shared = [], [], []
    for client, row in enumerate(rows):
        part = task.client(client).validation
        scores = evaluate(meadow.load(tmp_path, client=client), part, task)
        assert float(row["validation.digit.accuracy"]) == pytest.approx(scores["digit/accuracy"])
        assert float(row["validation.digit.loss"]) == pytest.approx(scores["digit/loss"], rel=1e-5)
        found.append(scores["digit/accuracy"])
        sizes.append(len(part))
        if preset != "fedper":
            shared.append(evaluate(meadow.load(tmp_path), part, task)["digit/accuracy"])
    told = summary["metrics"]["validation"]
    assert told["clients"]["digit"]["accuracy"]["mean"] == pytest.approx(np.mean(found))
    assert told["clients"]["digit"]["accuracy"]["weighted"] == pytest.approx(np.average(found, weights=sizes))
    if preset == "fedper":
        assert told["global"] == {}
    else:
        assert told["global"]["digit"]["accuracy"] == pytest.approx(np.average(shared, weights=sizes))


PLANS = {
    "patience": ("run.patience=2", "run.stop_metric=clients.digit.loss"),
    "target": ("run.target=0.5",),
    "global": ("run.target=0.5", "run.stop_metric=global.digit.accuracy"),
    "later": ("run.target=0.1", "run.min_rounds=4"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_ends_when_validation_says_so(plan: str, tmp_path: Path) -> None:
    experiment = small("fedavg", *PLANS[plan], "run.rounds=30", "local.lr=0.3", "cohort.fraction=1")
    summary = run_inline(experiment, tmp_path)
    rounds = records(tmp_path)
    assert summary["status"] == "done" and summary["reason"] and summary["rounds"] == len(rounds) < 30
    assert summary["selected"]["metric"] in summary["reason"]
    scored = {r["clients_round"]: r["validation"] for r in rounds if r["clients_round"]}
    ended = len(rounds)
    if plan == "patience":
        losses = {n: v["clients"]["digit"]["loss"]["mean"] for n, v in scored.items()}
        best = min(losses, key=lambda n: losses[n])
        assert summary["selected"]["best_round"] == best == ended - 1 - 2
    elif plan == "later":
        assert ended == 4
    else:
        place = scored[ended - 1]["global" if plan == "global" else "clients"]["digit"]["accuracy"]
        assert (place if plan == "global" else place["mean"]) >= 0.5
    again = run_inline(experiment, tmp_path, resume=True)
    assert again == summary


def told(handler: Handler, change: Callable[[str, float, Request], float]) -> Handler:
    """The handler, with its clients' scores changed on the way to the server: `change(key, score, request)`."""

    def answer(node: Node, request: Request) -> Answer:
        made = handler(node, request)
        for kind in {"evaluation", "validation"} & (made.values or {}).keys():
            scores = {key: change(key, value, request) for key, value in made.section(kind).items()}
            made = replace(made, values={**(made.values or {}), kind: scores})
        return made

    return answer


@pytest.mark.parametrize("preset", ["fedavg", "fedper", "ditto", "local", "pooled"])
def test_the_best_round_is_scored_and_loaded(preset: str, tmp_path: Path) -> None:
    """Clients find the model of round 3 best. The run of nine rounds ends as the run of three does."""

    def best_in_round_3(of_model: Callable[[Request], int]) -> Callable[[str, float, Request], float]:
        return lambda key, value, request: 1 / (1 + abs(of_model(request) - 3)) if "validation" in key else value

    app = clients_answer(
        told(train_client, best_in_round_3(lambda request: int(request.config["round"]) - 1)),
        told(evaluate_client, best_in_round_3(lambda request: int(request.config["round"]))),
    )
    best = run_with(app, small(preset, "run.rounds=9", "run.keep=best"), tmp_path / "best")
    short = run_with(app, small(preset), tmp_path / "short")
    assert best["rounds"] == 9 and best["selected"]["kept_round"] == best["selected"]["best_round"] == 3
    for key in ("model_sha256", "personal_sha256"):
        assert best[key] == short[key]
    for place in ("clients", "global", "validation"):
        assert best["metrics"][place] == short["metrics"][place]
    means = [r["clients"]["digit"]["accuracy"]["mean"] for r in records(tmp_path / "best")]
    assert best["metrics"]["last10"]["clients"]["digit"]["accuracy"]["mean"] == pytest.approx(np.mean(means))
    for place in ("train", "validation", "clients"):
        curves = [read_run(tmp_path / name).curve(place, "digit", "loss") for name in ("best", "short")]
        kept, last = (dict(zip(*curve, strict=True))[3] for curve in curves)
        assert kept == pytest.approx(last)
    scored = {r["clients_round"] for r in records(tmp_path / "best")}  # of the model of round 9 there is no score
    assert {*read_run(tmp_path / "best").curve("clients", "digit", "loss")[0]} == scored
    one, other = (state_of(meadow.load(tmp_path / name, client=3)) for name in ("best", "short"))
    assert all(np.array_equal(one[n], other[n]) for n in other)


def interrupted_in(round_: int) -> Callable[[Message, Context], Message]:
    """The ClientApp, with Ctrl-C as soon as clients are asked to train in this round."""

    def answer(message: Message, context: Context) -> Message:
        if any(record.get("round") == round_ for record in message.content.config_records.values()):
            raise KeyboardInterrupt
        return app(message, context)

    return answer


def test_a_resumed_run_keeps_and_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    experiment = small("fedper", "local.lr=0.3", "run.rounds=30", "run.patience=2", "run.keep=best")
    whole = run_inline(experiment, tmp_path / "whole")
    assert whole["rounds"] < 30
    for end in (1, whole["rounds"] // 2, whole["rounds"] - 1):
        cut = tmp_path / f"cut-{end}"
        run_with(interrupted_in(end + 1), experiment, cut)
        again = run_inline(experiment, cut, resume=True)
        assert [again[k] for k in ("model_sha256", "reason", "selected", "metrics", "rounds")] == [
            whole[k] for k in ("model_sha256", "reason", "selected", "metrics", "rounds")
        ]


def test_test_parts_that_lie_choose_nothing(tmp_path: Path) -> None:
    """Clients whose test scores are turned round: the run ends in the same round with the same model."""

    def lie(key: str, value: float, request: Request) -> float:
        return value if "validation" in key else 1 - value

    experiment = small("fedavg", "local.lr=0.3", "run.rounds=12", "run.patience=1", "run.keep=best")
    honest = run_inline(experiment, tmp_path / "honest")
    app = clients_answer(told(train_client, lie), told(evaluate_client, lie))
    fooled = run_with(app, experiment, tmp_path / "fooled")
    assert honest["metrics"]["clients"] != fooled["metrics"]["clients"]
    for key in ("rounds", "selected", "model_sha256"):
        assert honest[key] == fooled[key]


@pytest.mark.parametrize("metric", ["clients.slope.accuracy", "clients.digit.rmse", "global.digit.loss"])
def test_a_metric_that_is_never_measured_is_refused_before_the_run(metric: str) -> None:
    experiment: Experiment = small("fedper", f"run.stop_metric={metric}", "run.patience=3")
    with pytest.raises(UserError, match=metric):
        check_run(experiment)
