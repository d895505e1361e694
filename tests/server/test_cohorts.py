"""Who takes part: draws, schedules, dropout, stragglers, over-selection, void rounds, clients held out of training."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from helpers.refusals import refused
from helpers.runs import clients_answer, run_inline, run_with, small
from meadow.arrays.named import Arrays
from meadow.client.answers import train_client
from meadow.client.app import app
from meadow.client.store import Store
from meadow.config.cohort import draw_cohort, unseen
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest
from meadow.server.cohorts import draw, read_schedule
from meadow.strategies import equal_weights
from meadow.tasks.task import open_task

ROUNDS = 2000


def drawn(experiment: Experiment, sizes: tuple[int, ...] = ()) -> list[list[int]]:
    return [draw_cohort(experiment, r, sizes) for r in range(1, ROUNDS + 1)]


def counts(cohorts: list[list[int]], clients: int) -> Any:
    return np.bincount([c for cohort in cohorts for c in cohort], minlength=clients)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def arrays(out: Path) -> Arrays:
    checkpoint, _ = latest(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint.arrays


def test_poisson_draws_each_client_by_itself() -> None:
    """Probability 1/4 for each of 20: 500 of 2000 with standard deviation 19.4, all within five of these; the sizes of
    cohorts have the binomial's variance, 20 * 1/4 * 3/4 = 3.75 (its own standard deviation over 2000 draws is 0.12)."""
    cohorts = drawn(small("fedavg", "partition.clients=20", "cohort.size=5", "cohort.sampling=poisson"))
    assert (np.abs(counts(cohorts, 20) - 500) < 97).all()
    sizes = np.array([len(c) for c in cohorts])
    assert abs(sizes.mean() - 5) < 5 * np.sqrt(3.75 / ROUNDS)
    assert abs(sizes.var() - 3.75) < 0.6
    assert sizes.min() == 0 and all(c == sorted(set(c)) for c in cohorts)


def test_by_size_the_large_ones_come_more_often() -> None:
    """One client of three is drawn: the shares are those of the sizes 1, 3 and 6 (each within five deviations)."""
    experiment = small("fedavg", "partition.clients=3", "cohort.size=1", "cohort.sampling=size")
    found = counts(drawn(experiment, (1, 3, 6)), 3) / ROUNDS
    for share, expected in zip(found, (0.1, 0.3, 0.6), strict=True):
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / ROUNDS)


def test_by_size_each_counts_once(tmp_path: Path) -> None:
    """Who is drawn by size is not weighed by size as well."""
    assert equal_weights(small("fedavg", "cohort.sampling=size", "cohort.size=3"))
    assert not equal_weights(small("fedavg"))


def test_a_second_attempt_draws_anew() -> None:
    experiment = small("fedavg", "partition.clients=20", "cohort.size=5")
    first = [draw_cohort(experiment, r) for r in range(1, 51)]
    again = [draw_cohort(experiment, r, attempt=2) for r in range(1, 51)]
    assert sum(a != b for a, b in zip(first, again, strict=True)) > 45
    assert again == [draw_cohort(experiment, r, attempt=2) for r in range(1, 51)]


def test_a_schedule_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "who").write_text("# two, then one, then nobody\n3 1\n2,\n\n")
    plan = ("cohort.sampling=schedule", f"cohort.schedule={tmp_path / 'who'}", "cohort.quorum=0")
    run_with(app, small("fedavg", *plan), tmp_path / "run", checkpoint_every=0)
    assert [r["cohort"] for r in records(tmp_path / "run")] == [[1, 3], [2], []]
    rows = list(csv.DictReader((tmp_path / "run" / "clients.csv").open()))
    assert [int(r["rounds"]) for r in rows] == [0, 1, 1, 1, 0, 0, 0, 0]
    names = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert names[1].read_bytes() == names[2].read_bytes()  # nobody: the model stays


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0\n9\n1\n", ["line 2", '"9"', "0 to 7"]),
        ("0\n1 x\n1\n", ["line 2", '"x"']),
        ("0\n1 1\n1\n", ["line 2", "client 1"]),
        ("0\n1\n", ["2 rounds", "run.rounds = 3"]),
    ],
)
def test_a_wrong_schedule_is_named_by_its_line(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "who").write_text(text)
    with pytest.raises(UserError) as caught:
        read_schedule(small("fedavg", "cohort.sampling=schedule", f"cohort.schedule={tmp_path / 'who'}"))
    assert all(word in str(caught.value) for word in ["cohort.schedule", *words]), str(caught.value)


def test_a_schedule_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cohort\.schedule"):
        run_inline(small("fedavg", "cohort.sampling=schedule", "cohort.schedule=/nowhere"), tmp_path / "run")
    with refused("cohort.schedule"):
        small("fedavg", "cohort.sampling=schedule")


def test_dropout_is_the_run_without_those_who_dropped_out(tmp_path: Path) -> None:
    """The rounds that took place, written as a schedule, give the same model; each missing client has its reason."""
    dropping = small("fedavg", "cohort.dropout=0.4", "cohort.quorum=0")
    run_inline(dropping, tmp_path / "one")
    lines = []
    for record in records(tmp_path / "one"):
        gone = {f["client"] for f in record["failed"]}
        assert all(f["reason"] == "simulated: dropped out (cohort.dropout = 0.4)" for f in record["failed"])
        lines.append(" ".join(str(c) for c in record["cohort"] if c not in gone))
    assert 0 < sum(len(line.split()) for line in lines) < 24
    (tmp_path / "who").write_text("\n".join(lines) + "\n")
    plan = ("cohort.sampling=schedule", f"cohort.schedule={tmp_path / 'who'}", "cohort.quorum=0")
    run_inline(small("fedavg", *plan), tmp_path / "other")
    one, other = arrays(tmp_path / "one"), arrays(tmp_path / "other")
    assert all(np.array_equal(one[n], other[n]) for n in one)


def test_dropout_and_stragglers_have_their_chances() -> None:
    experiment = small("fedavg", "partition.clients=10", "cohort.dropout=0.3", "cohort.stragglers=0.5")
    calls = [draw(experiment, r, ()) for r in range(1, 401)]
    gone, slow = sum(len(c.absent) for c in calls) / 4000, sum(len(c.work) for c in calls) / 4000
    assert abs(gone - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 4000)
    assert abs(slow - 0.35) < 5 * np.sqrt(0.35 * 0.65 / 4000)
    shares = np.array([w for c in calls for w in c.work.values()])
    assert shares.min() >= 0 and shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 5 * np.sqrt(1 / 12 / len(shares))
    assert all(not set(c.work) & set(c.absent) for c in calls)


def test_stragglers_make_part_of_their_steps(tmp_path: Path) -> None:
    experiment = small("fedavg", "cohort.stragglers=0.5", "local.steps=20", "run.rounds=1")
    called = draw(experiment, 1, ())
    steps: dict[int, Any] = {}

    def watched(node: Any, request: Any) -> Any:
        reply = train_client(node, request)
        steps[request.client] = reply.metrics["steps"]
        return reply

    run_with(clients_answer(watched), experiment, tmp_path)
    assert 0 < len(called.work) < 8
    assert steps == {c: max(1, int(20 * called.work.get(c, 1.0))) for c in range(8)}


def test_over_selection_takes_the_first_and_stragglers_come_last() -> None:
    experiment = small(
        "fedavg", "partition.clients=20", "cohort.size=5", "cohort.over_selection=0.6", "cohort.stragglers=0.3"
    )
    for round_ in range(1, 101):
        called = draw(experiment, round_, ())
        assert len(called.asked) == 8 and len(called.trained) == 5
        late = [c for c, reason in called.absent.items() if "too late" in reason]
        assert len(late) == 3
    slow = [len(draw(experiment, r, ()).work) for r in range(1, 401)]
    # A straggler is waited for only if there are more than three of eight: E[max(0, Binomial(8, 0.3) - 3)] = 0.2613.
    assert abs(np.mean(slow) - 0.2613) < 5 * 0.62 / np.sqrt(400)


def test_over_selection_makes_up_for_dropout(tmp_path: Path) -> None:
    plan = ("partition.clients=20", "cohort.size=4", "cohort.over_selection=1.0", "cohort.dropout=0.2")
    run_inline(small("fedavg", *plan), tmp_path)
    for record in records(tmp_path):
        assert len(record["cohort"]) == 8 and len(record["cohort"]) - len(record["failed"]) <= 4


def failing(fails: Any) -> ClientApp:
    def train(node: Any, request: Any) -> Any:
        config = request.config
        reply = train_client(node, request)  # its state is stored: a void round must not leave it anything
        if fails(int(config["round"]), int(config["attempt"]), request.client):
            raise OSError("the line is cut")
        return reply

    return clients_answer(train)


@pytest.mark.parametrize("strategy", [("fedper", "fedavg"), ("fedavg", "scaffold"), ("fedavg", "ditto")])
def test_a_void_round_leaves_nothing_and_is_tried_again(strategy: tuple[str, str], tmp_path: Path) -> None:
    """Round 2 is void twice, then made by its third cohort: as a schedule of the cohorts that counted makes it."""
    preset, name = strategy
    plan = (f"strategy.name={name}", "cohort.quorum=3", "partition.clients=8")
    voided = small(preset, *plan, "cohort.size=3", "cohort.attempts=3")
    found = {attempt: draw_cohort(voided, 2, attempt=attempt) for attempt in (1, 2, 3)}
    cut = failing(lambda round_, attempt, c: round_ == 2 and attempt < 3 and c == found[attempt][0])
    summary = run_with(cut, voided, tmp_path / "one")
    assert summary["status"] == "done"
    seen = records(tmp_path / "one")
    assert [v["cohort"] for v in seen[1]["void"]] == [found[1], found[2]]
    assert "the line is cut" in seen[1]["void"][0]["failed"][0]["reason"]
    assert "void" not in seen[0] and seen[1]["cohort"] == found[3]
    (tmp_path / "who").write_text("\n".join(" ".join(map(str, r["cohort"])) for r in seen) + "\n")
    schedule = ("cohort.sampling=schedule", f"cohort.schedule={tmp_path / 'who'}")
    other = run_inline(small(preset, *plan, *schedule), tmp_path / "other")
    for key in ("model_sha256", "personal_sha256"):
        assert summary[key] == other[key], key
    assert summary["cost"]["bytes_down"] > other["cost"]["bytes_down"]  # what void rounds cost is counted


def test_a_round_that_stays_void_stops_the_run(tmp_path: Path) -> None:
    experiment = small("scaffold", "cohort.attempts=2", "cohort.quorum=8")
    cut = failing(lambda round_, attempt, c: round_ == 2 and c == 5)
    summary = run_with(cut, experiment, tmp_path / "cut")
    assert summary["status"] == "stopped" and summary["rounds"] == 1
    assert all(fact in summary["reason"] for fact in ("round 2", "7 of 8", "cohort.attempts = 2"))
    resumed = run_inline(experiment, tmp_path / "cut", resume=True)
    assert resumed["model_sha256"] == run_inline(experiment, tmp_path / "whole")["model_sha256"]


def test_unseen_clients_never_train_and_are_scored(tmp_path: Path) -> None:
    experiment = small("fedavg", "evaluate.unseen=0.25", "evaluate.fine_tune_epochs=1")
    hidden = unseen(experiment)
    assert len(hidden) == 2 and hidden != unseen(small("fedavg", "evaluate.unseen=0.25", "run.seed=3"))
    summary = run_inline(experiment, tmp_path)
    assert all(not hidden & set(r["cohort"]) and len(r["cohort"]) == 6 for r in records(tmp_path))
    rows = list(csv.DictReader((tmp_path / "clients.csv").open()))
    assert {int(r["client"]) for r in rows if r["rounds"] == "0"} == hidden
    assert all(r["used.digit.accuracy"] and r["finetuned.digit.accuracy"] for r in rows)
    seen = {int(r["client"]): float(r["used.digit.accuracy"]) for r in rows}
    assert summary["clients"]["never_sampled"] == 2
    assert summary["metrics"]["unseen"]["digit"]["accuracy"]["mean"] == pytest.approx(
        np.mean([seen[c] for c in sorted(hidden)]), rel=1e-12
    )


def test_fine_tuned_scores_are_those_of_training_on(tmp_path: Path) -> None:
    """After k epochs: the score that the model has when trained k epochs more on the client's own part."""
    from meadow.client.loop.training import Training, train
    from meadow.tasks.evaluation import evaluate, load_into
    from meadow.tasks.start import initial_state

    experiment = small("fedavg", "evaluate.fine_tune_epochs=2")
    run_inline(experiment, tmp_path)
    task, rows = open_task(experiment), list(csv.DictReader((tmp_path / "clients.csv").open()))
    for number in (0, 5):
        model = task.new_model()
        load_into(model, initial_state(experiment) | arrays(tmp_path))
        train(model, Training(task.client(number).train, 4, number, experiment.local, 2), task, experiment)
        expected = evaluate(model, task.client(number).test, task)["digit/accuracy"]
        assert float(rows[number]["finetuned.digit.accuracy"]) == pytest.approx(expected)


def test_what_an_attempt_after_the_one_that_counted_left_is_not_there(tmp_path: Path) -> None:
    """A server was stopped in the second attempt at round 5; when it went on, the first counted."""
    store = Store(tmp_path, "run")
    store.save(0, 5, {"w": np.array([52.0])}, 0, attempt=2)
    store.save(0, 5, {"w": np.array([51.0])}, 0, attempt=1)
    assert store.load(0, 6)["w"] == 51
    assert store.load(0, 6, void=["5.1"])["w"] == 52
