"""The report, the ranking and the progress display, on small run folders whose figures are worked out by hand."""

import csv
import io
import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from helpers.folders import make_run, over_clients, round_line, text_of
from meadow.config.load import to_toml
from meadow.experiments.pairs import compare_paired, t_interval
from meadow.experiments.pictures.confusion import confusion_matrices
from meadow.experiments.pictures.plots import spread_apart
from meadow.experiments.pictures.roc import mean_roc
from meadow.experiments.progress import Tail, follow, line, render, time_left
from meadow.experiments.ranking import number, ranking, ranking_table, worded
from meadow.experiments.report import write_report
from meadow.experiments.report.runs import Fact, entry
from meadow.experiments.report.sentences import Outcome, Warn, outcome, warnings
from meadow.experiments.report.write import contents
from meadow.experiments.results import by_method, find_runs, metrics_of, read_rounds, read_run
from meadow.experiments.words import bytes_text, metric_label, seconds_text
from meadow.runtime.errors import UserError
from meadow.strategies.check import load

LOCAL = {0: [0.5, 0.6, 0.7], 1: [0.4, 0.6, 0.8], 2: [0.5, 0.5, 0.5]}
FEDAVG = {0: [0.6, 0.5, 0.8], 1: [0.6, 0.6, 0.7], 2: [0.9, 0.6, 0.4]}
GAINS = [0.1 / 3, 0.1 / 3, 0.4 / 3]  # worked out by hand: the mean of (fedavg - local) over the clients of each seed


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    for name, scores, sent in (("local", LOCAL, 0), ("fedavg", FEDAVG, 1000)):
        for seed, values in scores.items():
            make_run(tmp_path / "cmp" / f"{name}-seed{seed}", name, seed, values, sent)
    return tmp_path / "cmp"


def figures_of(page: str) -> list[str]:
    """The ids of the page's pictures, in order."""
    return re.findall(r'<figure id="([^"]+)"', page)


def test_ranking_by_hand(compared: Path) -> None:
    first, second = ranking(find_runs([compared]))
    assert (first["method"], first["rank"], second["method"], second["rank"]) == ("fedavg", 1, "local", 2)
    means = [1.9 / 3, 1.9 / 3, 1.9 / 3]
    assert first["client_mean"] == pytest.approx(np.mean(means)) and first["client_mean_seed_std"] == pytest.approx(0)
    assert second["client_mean_seed_std"] == pytest.approx(np.std([0.6, 0.6, 0.5], ddof=1))
    assert first["client_worst_decile"] == pytest.approx((0.5 + 0.6 + 0.4) / 3)
    assert (first["bytes_up"], first["bytes_down"], first["seconds"], second["bytes_up"]) == (2000, 2000, 4.0, 0)
    # Worse than alone: client 1 of seed 0, client 2 of seed 1 and client 2 of seed 2; a tie is no loss.
    assert (first["lost"], first["lost_of"]) == (3, 9)
    assert first["gain"] == pytest.approx(np.mean(GAINS)) and second["gain"] is None
    json.dumps([first, second], allow_nan=False)


def test_what_came_out_by_hand(compared: Path) -> None:
    runs = find_runs([compared])
    found = outcome(by_method(runs), ranking(runs))
    assert found.best is not None and found.following is not None and found.versus is not None
    assert (found.best["method"], found.following["method"]) == ("fedavg", "local") and found.alone is found.following
    assert found.versus.gains == pytest.approx(GAINS) and found.pooled is None
    assert [(row["method"], row["lost"], row["lost_of"]) for row in found.losing] == [("fedavg", 3, 9)]


def test_of_runs_without_a_metric_nothing_came_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "fedavg", 0, [0.5, 0.7], metrics={})
    (folder / "rounds.jsonl").write_text("")
    (folder / "clients.csv").write_text("client\n0\n")
    runs = [read_run(folder)]
    found = outcome(by_method(runs), ranking(runs))
    assert found == Outcome(ranking(runs)[0]) and found.first["global"] is None


def test_more_runs_than_a_reader_wants_to_hear_of_are_counted(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / f"{i}", "fedavg", i, [0.5], ended=False)) for i in range(9)]
    assert [warn.about for warn in warnings(runs)] == ["running"] * 5 + ["more-ended-early"]
    assert all(isinstance(warn, Warn) for warn in warnings(runs))


def test_the_losers_are_named_by_seed_and_fold(compared: Path) -> None:
    methods = by_method(find_runs([compared]))
    paired = compare_paired(methods["fedavg"], methods["local"], "digit", "accuracy")
    assert paired is not None
    assert paired.losers == {(0, 0): frozenset({1}), (1, 0): frozenset({2}), (2, 0): frozenset({2})}
    assert paired.gains == pytest.approx(GAINS)


def test_t_interval_is_scipys(compared: Path) -> None:
    reference = stats.ttest_1samp(GAINS, 0).confidence_interval(0.95)
    assert t_interval(GAINS) == pytest.approx((reference.low, reference.high))
    row = ranking(find_runs([compared]))[0]
    assert (row["gain_low"], row["gain_high"]) == pytest.approx((reference.low, reference.high))
    assert t_interval(GAINS[:2]) is None


def test_lower_is_better_for_an_error(tmp_path: Path) -> None:
    for name, value in (("local", 0.2), ("fedavg", 0.3)):
        folder = make_run(tmp_path / name, name, 0, [value, value])
        for file in ("clients.csv", "summary.json", "rounds.jsonl"):
            (folder / file).write_text((folder / file).read_text().replace("accuracy", "rmse"))
    first, second = ranking(find_runs([tmp_path]))
    assert (first["method"], first["metric"]) == ("local", "rmse")
    assert second["gain"] == pytest.approx(-0.1) and second["lost"] == 2


def test_another_split_is_not_paired(compared: Path) -> None:
    split = compared / "fedavg-seed1" / "split.json"
    split.write_text(split.read_text().replace("split1", "other"))
    row = ranking(find_runs([compared]))[0]
    assert row["lost_of"] == 6 and row["gain_low"] is None
    assert [warn.about for warn in warnings(find_runs([compared]))] == ["splits"]


def test_the_page_stands_alone(compared: Path) -> None:
    page = write_report([compared], compared)
    text = text_of(page)
    assert page == compared / "report.html" and len(text) < 2_000_000
    assert "http" not in text and "<script" not in text and "&lt;x&gt;" in text
    assert not re.findall(r'(?:src|href)="(?!#)', text) and not re.findall(r"url\((?!#)", text)
    assert figures_of(text) == ["digit-curves", "digit-dots", "digit-cost", "split"] and text.count("<svg") == 4
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert [p.name for p in compared.iterdir() if p.is_file()] == ["report.html"]


def test_the_same_runs_give_the_same_page(compared: Path, tmp_path: Path) -> None:
    pages = [write_report([compared], tmp_path / name) for name in ("a.html", "b.html")]
    assert text_of(pages[0]) == text_of(pages[1])


def test_a_report_of_the_usual_size_is_light(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for method in ("pooled", "local", "transfer", "finetune", "multitask", "fedavg", "fedper"):
        for seed in range(3):
            make_run(tmp_path / f"{method}-{seed}", method, seed, draw.random(20).tolist(), 1000)
    assert write_report([tmp_path], tmp_path / "r.html").stat().st_size < 2_000_000


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "fedavg", 0, [0.5, 0.7], 10, ended=False)
    run = read_run(folder)
    assert (run.status, run.rounds_done, run.cost["bytes_up"], dict(run.columns)) == ("running", 1, 10.0, {})
    (row,) = ranking([run])
    assert row["client_mean"] == pytest.approx(0.3) and row["lost"] is None
    assert [warn.about for warn in warnings([run])] == ["running"]
    assert 'data-about="running"' in text_of(write_report([folder], tmp_path / "r.html"))


@pytest.mark.parametrize("missing", ["rounds.jsonl", "manifest.json", "split.json"])
def test_a_run_that_has_only_begun(tmp_path: Path, missing: str) -> None:
    folder = make_run(tmp_path / "run", "fedavg", 0, [0.5, 0.7], ended=False)
    (folder / missing).unlink()
    assert write_report([folder], tmp_path / "r.html").is_file()


@pytest.mark.parametrize(("clients", "bubbles"), [(80, True), (81, False)])
def test_the_split_is_drawn_as_bubbles_or_as_shades(tmp_path: Path, clients: int, bubbles: bool) -> None:
    """A picture of more than 80 clients has shades, an image, where fewer have a bubble each."""
    split = contents([read_run(make_run(tmp_path / "run", "fedavg", 0, [0.5] * clients))])["split"]
    assert ("bubble" in split["caption"]) == bubbles == ("<image" not in split["picture"].svg)


def test_a_stopped_run_says_why_and_failures_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "fedper", 0, [0.5, 0.7], status="stopped", reason="too few <clients>",
                      clients={"never_sampled": 1})  # fmt: skip
    failed = [{"client": 3, "reason": "ValueError: no\nTraceback"}]
    lines = [json.dumps(round_line(r, [0.5, 0.7], failed=failed)) for r in (1, 2)]
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(folder)
    (warn,) = warnings([run])
    assert warn.about == "ended-early" and warn.text.endswith("too few <clients>")
    facts = {fact.name: fact for fact in entry("fedper", run)["facts"]}
    assert facts["client 3 failed"] == Fact("client 3 failed", "rounds 1, 2: ValueError: no", more="Traceback")
    assert facts["never sampled"].text.startswith("1 of 2 clients; ")
    assert "too few &lt;clients&gt;" in text_of(write_report([folder], tmp_path / "r.html"))


def test_curves_stand_at_the_round_of_the_model(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", "fedavg", 0, [0.4, 0.8], 5))
    rounds, means = run.curve("clients", "digit", "accuracy")
    # Round 1 received the model of round 0, round 2 that of round 1; the summary has the one after round 2.
    assert rounds.tolist() == [0, 1, 2] and means == pytest.approx([0.3, 0.6, 0.6])
    assert run.curve("global", "digit", "accuracy")[0].tolist() == [1, 2]
    assert run.spent("bytes", rounds).tolist() == [0, 10, 20] and run.spent("seconds", rounds).tolist() == [0, 2, 4]


def test_a_torn_last_line_is_not_a_round(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    whole = json.dumps(round_line(1, [0.5]))
    for torn in ("", "\n", "\n" + whole[:20], "\n{"):
        path.write_text(whole + torn)
        assert [r["round"] for r in read_rounds(path)] == [1]
    path.write_text(whole[:20] + "\n" + whole)
    with pytest.raises(UserError, match="line 1"):
        read_rounds(path)


def test_what_is_no_run_is_refused(tmp_path: Path, compared: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(UserError, match=path.name):
            find_runs([path])
    (compared / "local-seed0" / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: .*damaged"):
        find_runs([compared])


def test_one_folder_given_twice_counts_once(compared: Path) -> None:
    assert len(find_runs([compared, compared / "local-seed0"])) == 6


def test_settings_part_runs_of_one_name(tmp_path: Path) -> None:
    for lr in ("0.1", "0.2"):
        folder = make_run(tmp_path / lr, "fedavg", 0, [0.5])
        (folder / "experiment.toml").write_text(to_toml(load("fedavg", [f"local.lr={lr}"])))
    assert list(by_method(find_runs([tmp_path]))) == ["fedavg (lr=0.1)", "fedavg (lr=0.2)"]


def test_a_method_s_name_may_be_longer_than_a_page_is_wide(tmp_path: Path) -> None:
    names = ("lr", "epochs", "batch_size", "weight_decay", "trunk_lr_factor", "depth_lr_factor", "clip_norm", "warmup")
    settings = [f"local.{name}={{}}" for name in names]
    for value in (1, 2):
        folder = make_run(tmp_path / str(value), "fedavg", 0, [0.5, 0.6])
        (folder / "experiment.toml").write_text(
            to_toml(load("fedavg", [setting.format(value) for setting in settings]))
        )
    assert max(map(len, by_method(find_runs([tmp_path])))) > 110
    assert "…" in text_of(write_report([tmp_path], tmp_path / "report.html"))


def test_the_terminals_table_has_every_method(compared: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(ranking_table(find_runs([compared])))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "63.3 ± 0.0" in out and "3 of 9" in out and "local" in out


def test_labels_keep_apart_and_move_least() -> None:
    # By hand: 0 and 0.1 want 0.1 between them and need 0.4, so both give way by 0.15; 2 is far and stays.
    assert spread_apart(np.array([0.0, 0.1, 2.0]), 0.4) == pytest.approx([-0.15, 0.25, 2.0])


def test_sizes_and_times_in_words() -> None:
    assert [bytes_text(n) for n in (0, 999, 4_200_000)] == ["0 B", "999 B", "4.2 MB"]
    assert [seconds_text(s) for s in (0.31, 42, 185, 7800)] == ["0.31 s", "42 s", "3 min 05 s", "2 h 10 min"]


def test_the_tail_reads_on_and_notices_a_file_put_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    tail = Tail(path)
    assert not tail.read()
    whole = [json.dumps(round_line(r, [0.5])) + "\n" for r in (1, 2, 3)]
    path.write_text(whole[0] + whole[1][:30])
    assert tail.read() and list(tail.records) == [1]
    path.write_text(whole[0] + whole[1] + whole[2])
    assert tail.read() and list(tail.records) == [1, 2, 3]
    (tmp_path / "new").write_text(whole[0])
    (tmp_path / "new").replace(path)
    assert tail.read() and list(tail.records) == [1]


def records(count: int) -> Mapping[int, Mapping[str, Any]]:
    return {r: round_line(r, [0.4, 0.6], 500) for r in range(1, count + 1)}


def test_time_left_by_hand() -> None:
    assert time_left(records(3), 10) == 7 * 2.0
    assert "round 3/10" in line(records(3), 10, "x") and "3 kB" in line(records(3), 10, "x")


@pytest.mark.parametrize("terminal", [True, False])
def test_following_a_run_ends_with_it_and_shows_the_last_round(tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    before = set(threading.enumerate())
    with follow(tmp_path, 2, "fedavg-seed0", console, False):
        (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(2).values()))
    assert set(threading.enumerate()) == before
    assert "fedavg-seed0: round 2/2" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_the_display_hides_no_error_and_makes_none(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"round": 1, "train": 7}\nnonsense\n')
    with pytest.raises(KeyError, match="theirs"), follow(tmp_path, 2, "x", Console(file=io.StringIO()), False):
        raise KeyError("theirs")
    out = io.StringIO()
    with follow(tmp_path, 2, "x", Console(file=out), True):
        pass
    assert out.getvalue() == ""


def test_the_time_left_counts_only_rounds_of_this_session() -> None:
    # Rounds 1 and 2 were there before a resume; 3 and 4 take 2 s and 4 s, so six more take 6 * 3 s.
    found = {r: round_line(r, [0.5], seconds=spent) for r, spent in ((1, 900.0), (2, 900.0), (3, 2.0), (4, 4.0))}
    before = {1: found[1], 2: found[2]}
    assert time_left(found, 10, before) == 18.0 and time_left(before, 10, before) is None
    assert "18 s left" in line(found, 10, "x", before) and "left" not in line(before, 10, "x", before)
    # Round 2 was cut off and played again: it counts.
    assert time_left({1: found[1], 2: round_line(2, [0.5], seconds=5.0)}, 10, before) == 8 * 5.0


def test_untrained_clients_are_said_before_the_figures(tmp_path: Path) -> None:
    clients = {"total": 2, "never_sampled": 1, "untrained_head": 1}
    folder = make_run(tmp_path / "run", "fedper", 3, [0.5, 0.7], clients=clients)
    (warn,) = warnings([read_run(folder)])
    assert warn.about == "untrained" and "1 of 2 (fedper, seed 3)" in warn.text
    head, _, _ = text_of(write_report([folder], tmp_path / "r.html")).partition('id="answer"')
    assert 'data-about="untrained"' in head


def with_evaluation(folder: Path, matrix: Sequence[Sequence[int]], roc: Mapping[str, Any] | None = None) -> Path:
    about = {"classes": [f"<{i}>" for i in range(len(matrix))], "confusion": matrix}
    shared = {"digit": about | {"roc": roc}} if roc is not None else {}
    (folder / "evaluation.json").write_text(json.dumps({"global": shared, "clients": {"digit": about}}))
    return folder


LINE = {"false_positive": [0.0, 0.0, 0.5, 1.0], "true_positive": [0.0, 0.6, 1.0, 1.0], "auroc": 0.9}


def test_confusion_and_roc_are_shown_once_a_method(tmp_path: Path) -> None:
    for seed in (0, 1):
        with_evaluation(
            make_run(tmp_path / f"a{seed}", "fedavg", seed, [0.5, 0.7]), [[71, 2], [3, 400 + seed]], {"x": LINE}
        )
        with_evaluation(make_run(tmp_path / f"b{seed}", "fedper", seed, [0.5, 0.7]), [[55, 2], [3, 500 + seed]])
    text = text_of(write_report([tmp_path], tmp_path / "r.html"))
    assert figures_of(text)[3:] == ["digit-confusion", "digit-roc", "split"]
    # A matrix for each method, of the first seed; class names as text, never as markup.
    assert [f">{n}<" in text for n in ("400", "500", "401", "501")] == [True, True, False, False]
    assert "&lt;0&gt;" in text and "<0>" not in text
    assert ">90.0  fedavg<" in text and len(text) < 400_000


def test_a_single_run_shows_the_global_matrix_and_a_curve_for_each_class(tmp_path: Path) -> None:
    roc = {"a": LINE, "b": {**LINE, "auroc": 0.4}, "c": {**LINE, "auroc": 0.8}}
    folder = with_evaluation(make_run(tmp_path / "a", "fedavg", 0, [0.5, 0.7]), np.eye(3, dtype=int).tolist(), roc)
    text = text_of(write_report([folder], tmp_path / "r.html"))
    assert text.count(">0</text>") and figures_of(text)[3:] == ["digit-confusion", "digit-roc", "split"]
    assert all(f">{area}  {name}<" in text for name, area in (("a", "90.0"), ("b", "40.0"), ("c", "80.0")))


def test_the_folds_matrices_are_added_up(tmp_path: Path) -> None:
    for fold in (1, 2):
        folder = make_run(tmp_path / f"fold-{fold}", "fedavg", 0, [0.5, 0.7])
        settings = ["run.rounds=2", "partition.clients=2", "evaluate.folds=2", f"evaluate.fold={fold}"]
        (folder / "experiment.toml").write_text(to_toml(load("fedavg", settings)))
        with_evaluation(folder, [[100 * fold, 0], [0, 1]], {})
    text = text_of(write_report([tmp_path], tmp_path / "r.html"))
    # The clients' are 100 + 200; the global test set is the same in each fold, so it is shown of the first.
    assert ">300<" in text and ">100<" in text and ">200<" not in text


@pytest.mark.parametrize("classes", [2, 12, 13, 50])
@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_matrices_of_any_size_fit_their_picture(classes: int, count: int) -> None:
    counts = np.arange(classes**2).reshape(classes, classes)
    panel = {"classes": [f"a long name {i}" for i in range(classes)], "confusion": counts}
    figure = confusion_matrices({f"method {i}": panel for i in range(count)})
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == count
    wide, tall = figure.get_size_inches()
    for i, box in enumerate(boxes):
        assert box.x0 > 0 and box.y0 > 0 and box.x1 < 1 and box.y1 < 1
        assert box.width * wide == pytest.approx(box.height * tall)  # square
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_mean_roc_curve_by_hand() -> None:
    step = (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]), 1.0)
    chance = (np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.5, 1.0]), 0.5)
    false, true, area = mean_roc([step, chance])
    assert false.tolist() == [0, 0, 0.5, 1] and true.tolist() == [0, 0.5, 0.75, 1] and area == 0.75


def test_numbers_have_their_kind_s_unit() -> None:
    assert [number(0.1234, m) for m in ("accuracy", "f1", "coverage_0.1", "exact_match")] == ["12.3"] * 4
    assert [number(v, "pinball") for v in (0.12345, 9.8765, 12.346, 123.46, 12345.6)] == [
        "0.123", "9.877", "12.35", "123.5", "12,346",
    ]  # fmt: skip
    assert number(-1234.5, "rmse", signed=True) == "\N{MINUS SIGN}1,234"
    assert (worded(0.5, "auroc", "slant"), worded(0.5, "rmse", "slant"), worded(0.5, "pinball", "stay")) == (
        "50.0%", "0.500 rad", "0.500",
    )  # fmt: skip
    assert [metric_label("slant", m) for m in ("mae", "r2", "coverage_0.9", "f1")] == [
        "MAE (rad)", "R\N{SUPERSCRIPT TWO}", "coverage at 0.9 (%)", "F1 (%)",
    ]  # fmt: skip


GLOBAL = "shared model on the global test set"
KINDS = {
    "class": (["loss", "accuracy", "f1"], "accuracy"),
    "labels": (["accuracy", "loss", "f1", "exact_match"], "f1"),
    "value": (["loss", "r2", "mae", "rmse"], "rmse"),
    "quantiles": (["coverage_0.1", "pinball", "coverage_0.9", "loss"], "pinball"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_ranked_by_its_primary_metric(kind: str, tmp_path: Path) -> None:
    names, primary = KINDS[kind]
    for method, value in (("local", 0.2), ("fedavg", 0.3)):
        folder = make_run(tmp_path / method, method, 0, [value, value])
        every = {name: over_clients([value, value]) for name in names}
        for file in ("summary.json", "rounds.jsonl"):
            found = [json.loads(text) for text in (folder / file).read_text().splitlines()]
            for tree in (one.get("metrics", one) for one in found):
                tree["clients"] = {"digit": every}
                tree["global"] = {"digit": dict.fromkeys(names, value)}
            (folder / file).write_text("\n".join(map(json.dumps, found)) + "\n")
        with (folder / "clients.csv").open("w", newline="") as file_:
            writer = csv.writer(file_)
            writer.writerow(["client", "test_samples", *(f"used.digit.{name}" for name in names)])
            writer.writerows([c, 1, *(value for _ in names)] for c in (0, 1))
    runs = find_runs([tmp_path])
    rows = {row["method"]: row for row in ranking(runs)}
    assert rows["local"]["metric"] == primary
    better = "local" if primary in ("rmse", "pinball") else "fedavg"
    assert rows[better]["rank"] == 1
    # 0.3 against 0.2: a gain of 0.1 where higher is better, a loss of 0.1 for both clients where it is worse.
    gain = -0.1 if better == "local" else 0.1
    assert (rows["fedavg"]["gain"], rows["fedavg"]["lost"]) == (pytest.approx(gain), 0 if gain > 0 else 2)
    assert set(metrics_of(runs, "digit")) == set(names) and metrics_of(runs, "digit")[-1] == "loss"
    (part,) = contents(runs)["targets"]
    assert {column.group for column in part["metrics"].columns} == {"", "clients' mean", GLOBAL}
    shown = line(dict(enumerate(runs[0].rounds, 1)), 2, "x")
    assert f"global {worded(0.3, primary, 'digit')}" in shown


def test_progress_names_the_round_whose_model_the_clients_scored() -> None:
    """Clients score the model that they received, so what a record says of them is of the round before."""
    scores = {"digit": {"accuracy": {"mean": 0.5, "worst_decile": 0.1}}}
    records = {
        round_: {"round": round_, "seconds": 1.0, "clients": scores, "clients_round": round_ - 1} for round_ in (1, 2)
    }
    assert "clients after round 1 50.0%" in line(records, 5, "run")
    shown = io.StringIO()
    Console(width=120, file=shown, force_terminal=False).print(render(records, 5, "run", 0.0))
    first, second = (row.split() for row in shown.getvalue().splitlines() if "/5" in row)
    assert "50.0%" in first and "50.0%" not in second
