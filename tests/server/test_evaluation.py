"""What a run says of its models at its end, held to identities between its files, and of every kind of target."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import clients_answer, run_inline, run_with, small
from meadow.client.answers import evaluate_client
from meadow.privacy.releases import releases
from meadow.server.evaluation import add_confusion, over_clients, read_confusion, reduce_trees
from meadow.strategies.check import load
from meadow.tasks.data import Target
from meadow.tasks.losses import class_weights
from meadow.tasks.metrics import PRIMARY
from meadow.tasks.task import open_task


def files(out: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """summary.json, evaluation.json and rounds.jsonl."""
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    summary, evaluation = (json.loads((out / f"{n}.json").read_text()) for n in ("summary", "evaluation"))
    return summary, evaluation, rounds


@pytest.mark.parametrize("preset", ["fedavg", "fedper", "pooled"])
def test_the_last_evaluation_agrees_with_itself(preset: str, tmp_path: Path) -> None:
    run_inline(small(preset), tmp_path)
    summary, evaluation, rounds = files(tmp_path)
    metrics = summary["metrics"]
    ours = evaluation["clients"]["digit"]
    counts = np.array(ours["confusion"])
    assert ours["classes"] == [str(i) for i in range(10)] and ours["clients"] == 8
    # The clients' counts added up are pooled, so their accuracy is the one weighted by the test samples.
    assert counts.trace() / counts.sum() == pytest.approx(metrics["clients"]["digit"]["accuracy"]["weighted"])
    rows = list(csv.DictReader((tmp_path / "clients.csv").open()))
    assert counts.sum() == sum(int(row["test_samples"]) for row in rows)
    task = open_task(small(preset))
    truth = np.concatenate([task.client(c).test.y["digit"] for c in range(8)])
    assert counts.sum(1).tolist() == np.bincount(truth, minlength=10).tolist()
    # AUROC is of the last evaluation of the clients alone; so it is no mean over ten rounds.
    areas = [float(row["used.digit.auroc"]) for row in rows]
    assert metrics["clients"]["digit"]["auroc"]["mean"] == pytest.approx(np.mean(areas))
    assert all("auroc" not in r["clients"]["digit"] for r in rounds if r["clients"])
    assert "auroc" not in metrics["last10"]["clients"]["digit"] and "f1" in metrics["last10"]["clients"]["digit"]
    if preset == "fedper":
        assert evaluation["global"] == metrics["global"] == {}
        return
    shared = evaluation["global"]["digit"]
    counts = np.array(shared["confusion"])
    assert counts.sum() == len(task.dataset.test)
    assert counts.trace() / counts.sum() == pytest.approx(metrics["global"]["digit"]["accuracy"])
    assert len(shared["roc"]) == 10
    mean_area = np.mean([curve["auroc"] for curve in shared["roc"].values()])
    assert mean_area == pytest.approx(metrics["global"]["digit"]["auroc"])


def test_the_last_round_is_evaluated_and_confusion_is_said_to_leave(tmp_path: Path) -> None:
    experiment = small("fedavg", "evaluate.every=2", "evaluate.on=global")
    run_inline(experiment, tmp_path)
    summary, evaluation, rounds = files(tmp_path)
    assert [bool(r["global"]) for r in rounds] == [False, True, True]
    assert summary["metrics"]["global"] == rounds[-1]["global"]
    # evaluate.on says what is measured in the rounds; at the end every client is asked, and that is what left.
    assert evaluation["clients"] and summary["metrics"]["clients"]
    left = [release["what"] for release in summary["privacy"]["releases"]]
    assert left == [quantity.what for quantity in releases(experiment)]
    assert {"metrics on the test part", "confusion counts of the test part"} <= set(left)


def test_a_resumed_run_has_the_same_evaluation(tmp_path: Path) -> None:
    experiment = small("fedavg")
    run_inline(experiment, tmp_path)
    before = (tmp_path / "evaluation.json").read_bytes()
    for name in ("summary.json", "evaluation.json"):
        (tmp_path / name).unlink()
    run_inline(experiment, tmp_path, resume=True)
    assert (tmp_path / "evaluation.json").read_bytes() == before


LIES: dict[str, Any] = {
    "too short": [0] * 99,
    "negative": [-1] + [0] * 99,
    "more than there are": [0] * 99 + [10**6],
    "more than there are, each few": [5] * 100,
    "no whole numbers": [0.5] * 100,
    "one number": 3,
}


@pytest.mark.parametrize("lie", LIES)
def test_confusion_counts_are_taken_only_where_they_may_be_true(lie: str) -> None:
    task = open_task(small("fedavg"))
    size = len(task.split.clients[0].test)
    assert 5 < size < 500
    honest = [size] + [0] * 99
    assert read_confusion({"digit": honest}, task, 0)["digit"].tolist() == honest
    assert read_confusion({"digit": [size + 1] + [0] * 99}, task, 0) == {}
    assert read_confusion({"digit": LIES[lie]}, task, 0) == {}
    assert read_confusion({}, task, 0) == {}


def test_a_client_without_confusion_counts_is_left_out(tmp_path: Path) -> None:
    def lying(node: Any, request: Any) -> Any:
        reply = evaluate_client(node, request)
        if request.client == 2:
            assert reply.values is not None
            reply.values["confusion"] = {"digit": LIES["negative"]}
        return reply

    assert run_with(clients_answer(evaluate_one=lying), small("fedper"), tmp_path)["status"] == "done"
    assert files(tmp_path)[1]["clients"]["digit"]["clients"] == 7


def test_added_confusion_by_hand() -> None:
    pair = Target("pair", "class", 2, names=("no", "yes"))
    counts = [{"pair": np.array(c)} for c in ([1, 2, 3, 4], [10, 0, 0, 10])] + [{}]
    expected = {"pair": {"classes": ["no", "yes"], "confusion": [[11, 2], [3, 14]], "clients": 2}}
    assert add_confusion(counts, [pair]) == expected


def test_the_worst_tenth_is_the_highest_of_what_should_be_low() -> None:
    scores = {c: {"stay/pinball": float(c), "stay/coverage_0.1": float(c), "mark/r2": float(c)} for c in range(20)}
    found = over_clients(scores, dict.fromkeys(range(20), 1))
    worst = {m: v["worst_decile"] for metrics in found.values() for m, v in metrics.items()}
    assert worst == {"pinball": 18.5, "coverage_0.1": 0.5, "r2": 0.5}


def test_trees_are_reduced_leaf_by_leaf() -> None:
    trees: list[dict[str, Any]] = [{"a": {"x": 1.0}, "b": 2.0}, {"a": {"x": 5.0, "y": 7.0}}]
    assert reduce_trees(trees, max) == {"a": {"x": 5.0, "y": 7.0}, "b": 2.0}


EVERYTHING = {
    "run": {"name": "everything", "rounds": 4},
    "task": {
        "dataset": "helpers.objects:everything",
        "targets": ["side", "signs", "total", "stay"],
        "kinds": ["class balanced", "labels balanced", "value scale 100 offset 100",
                  "quantiles 0.1 0.5 0.9 scale 100 offset 100"],
    },
    "partition": {"clients": 6, "law": "iid"},
    "local": {"lr": 0.02},
}  # fmt: skip


def test_every_kind_of_target_in_one_run(tmp_path: Path) -> None:
    experiment = load(EVERYTHING)
    summary = run_inline(experiment, tmp_path)
    assert summary["status"] == "done"
    task = open_task(experiment)
    kinds = {t.name: t.kind for t in task.targets}
    assert kinds == {"side": "class", "signs": "labels", "total": "value", "stay": "quantiles"}
    evaluation = files(tmp_path)[1]
    for name, kind in kinds.items():
        assert PRIMARY[kind] in summary["metrics"]["global"][name]
        assert {"mean", "worst_decile"} <= summary["metrics"]["clients"][name][PRIMARY[kind]].keys()
    # Only what is known is counted: the confusion counts are as many as the labels that there are.
    known = sum(task.client(c).test.y["side"].ge(0).sum().item() for c in range(6))
    assert np.sum(evaluation["clients"]["side"]["confusion"]) == known < sum(len(task.client(c).test) for c in range(6))
    assert evaluation["global"].keys() == {"side", "signs"}
    assert list(evaluation["global"]["side"]["roc"]) == ["right"]
    assert evaluation["global"]["side"]["classes"] == ["left", "right"]
    assert len(evaluation["global"]["signs"]["roc"]) == 3 and "confusion" not in evaluation["global"]["signs"]
    # Metrics are in the column's own unit, losses over the scale of 100; the loss adds up the three quantiles.
    truth = task.dataset.test.y["total"].double().numpy()
    truth = truth[~np.isnan(truth)]
    metrics = summary["metrics"]["global"]
    assert metrics["total"]["rmse"] == pytest.approx(math.sqrt((1 - metrics["total"]["r2"]) * truth.var()))
    assert metrics["total"]["rmse"] == pytest.approx(100 * math.sqrt(metrics["total"]["loss"]))
    assert 3 * metrics["stay"]["pinball"] == pytest.approx(100 * metrics["stay"]["loss"])
    # Each client balances by its own labels.
    weights = class_weights(task.targets, task.client(0).train.y)
    side = task.client(0).train.y["side"]
    assert weights["side"][side[side >= 0]].mean().item() == pytest.approx(1)
    assert set(weights) == {"side", "signs"}
