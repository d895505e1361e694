"""Privacy against utility: what a budget costs, paired by hand calculation, who pays, and the sweep that draws it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from helpers.folders import make_run, text_of
from helpers.runs import small
from meadow.config.load import read_tree, to_toml
from meadow.experiments.budgets.costs import Cost, Line, groups_of, lines_of
from meadow.experiments.budgets.sentences import answer, table
from meadow.experiments.command import app
from meadow.experiments.compare import sweep_jobs, values_of
from meadow.experiments.report import write_report
from meadow.experiments.report.write import contents
from meadow.experiments.results import find_runs
from meadow.runtime.errors import UserError

PRIVATE = ("privacy.unit=example", "privacy.sample_rate=0.1", "local.steps=2", "privacy.release=metrics")
SPLIT = {"sizes": [[9, 1, 1], [3, 1, 1], [4, 1, 1], [40, 1, 1]], "labels": [[9, 2], [5, 0], [6, 0], [40, 2]]}


def axes(overrides: Sequence[str]) -> dict[str, list[Any]]:
    """What each setting is given, as the command reads it."""
    return {key: values_of(key, text) for key, _, text in (override.partition("=") for override in overrides)}


def names(overrides: Sequence[str], seeds: int = 1, preset: str = "fedavg") -> list[str]:
    return [job.experiment.run.name for job in sweep_jobs(read_tree(preset), axes(overrides), seeds, Path("out"))]


def test_budgets_are_held_against_the_same_without_protection() -> None:
    assert names([*PRIVATE, "privacy.epsilon=1,8"]) == ["epsilon-1", "epsilon-8", "epsilon-none"]
    assert names([*PRIVATE, "privacy.epsilon=none,2"]) == ["epsilon-none", "epsilon-2"]
    jobs = sweep_jobs(
        read_tree("fedavg"), axes([*PRIVATE, "privacy.epsilon=1,8", "strategy.share=all,body"]), 2, Path("out")
    )
    assert len(jobs) == 2 * 6
    bare = [job.experiment for job in jobs if job.experiment.run.name.endswith("none")]
    assert [(e.privacy, e.share, e.run.seed, e.local.steps) for e in bare] == [
        (small("fedavg").privacy, share, seed, 2) for seed in (0, 1) for share in ("all", "body")
    ]


def test_without_protection_there_is_one_run_for_all_settings_of_privacy() -> None:
    overrides = ["privacy.unit=client,local", "privacy.clip=0.1,1", "privacy.epsilon=1,2"]
    found = names(overrides, seeds=3)
    assert len(found) == 3 * (2 * 2 * 2 + 1) and found.count("epsilon-none") == 3


def test_a_sweep_over_something_else_has_no_run_without_protection() -> None:
    assert names([*PRIVATE, "privacy.epsilon=1", "local.lr=0.1,0.2"]) == ["lr-0.1", "lr-0.2"]
    with pytest.raises(UserError, match=r"privacy\.epsilon = 'none'"):
        names([*PRIVATE, "privacy.epsilon=none", "local.lr=0.1,0.2"])


def made(root: Path, overrides: Sequence[str], values: Mapping[str, Mapping[int, Sequence[float]]]) -> Path:
    """A sweep's folder without its runs having been made: name -> seed -> each client's accuracy at the end."""
    for job in sweep_jobs(read_tree("fedavg"), axes([*overrides, "partition.clients=4", "run.rounds=2"]), 3, root):
        e = job.experiment
        scores = values[e.run.name][e.run.seed]
        make_run(job.folder, "fedavg", e.run.seed, scores)
        (job.folder / "experiment.toml").write_text(to_toml(e))
        change(job.folder / "split.json", SPLIT)
    return root


def change(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(values)))


BARE = {0: [0.9, 0.8, 0.9, 0.8], 1: [0.7, 0.9, 0.9, 0.9], 2: [0.8, 0.8, 0.8, 0.8]}
TIGHT = {0: [0.5, 0.2, 0.5, 0.8], 1: [0.5, 0.5, 0.7, 0.9], 2: [0.6, 0.5, 0.5, 0.9]}
WIDE = {0: [0.9, 0.7, 0.9, 0.8], 1: [0.7, 0.8, 0.9, 0.9], 2: [0.8, 0.8, 0.8, 0.7]}
COSTS = [1.4 / 4, 0.8 / 4, 0.7 / 4]
"""Of epsilon = 1, each seed's mean over the clients of without protection less with it."""


@pytest.fixture
def swept(tmp_path: Path) -> Path:
    values = {"epsilon-1": TIGHT, "epsilon-8": WIDE, "epsilon-none": BARE}
    return made(tmp_path / "s", [*PRIVATE, "privacy.epsilon=1,8"], values)


def utility_cost(line: Line, metric: str = "accuracy") -> Cost | None:
    """Of epsilon = 1, where the line is measured."""
    return line.costs("digit", metric)[1.0].utility[line.place("digit", metric)]


def test_a_cost_is_paired_over_the_seeds(swept: Path) -> None:
    (line,) = lines_of(find_runs([swept]))
    assert (line.label, line.unit, list(line.budgets), len(line.bare)) == ("FedAvg", "example", [1.0, 8.0], 3)
    cost = utility_cost(line)
    assert cost is not None and cost.values == pytest.approx(COSTS)
    reference = stats.ttest_1samp(COSTS, 0).confidence_interval(0.95)
    assert cost.interval == pytest.approx((reference.low, reference.high))
    worst = line.costs("digit", "accuracy")[1.0].worst
    assert worst is not None and worst.values == pytest.approx([0.6, 0.2, 0.3])


def test_only_the_same_seed_and_split_are_paired(swept: Path) -> None:
    change(swept / "epsilon-none-seed1" / "split.json", {"sha256": "another"})
    for file in (swept / "epsilon-none-seed2").iterdir():
        file.unlink()
    (line,) = lines_of(find_runs([swept]))
    cost = utility_cost(line)
    assert cost is not None and cost.values == pytest.approx(COSTS[:1]) and cost.interval is None
    assert [run.seed for run, _ in line.costs("digit", "accuracy")[1.0].clients] == [0]


def test_of_an_error_more_is_worse(swept: Path) -> None:
    for folder in swept.iterdir():
        for file in ("clients.csv", "summary.json", "rounds.jsonl"):
            (folder / file).write_text((folder / file).read_text().replace("accuracy", "rmse"))
    (line,) = lines_of(find_runs([swept]))
    cost = utility_cost(line, "rmse")
    assert cost is not None and cost.values == pytest.approx([-c for c in COSTS])


def test_groups_are_quarters_by_hand() -> None:
    # Label 1 has 4 of 64 samples: rare. Client 0 has most of it for its size, clients 1 and 2 none.
    assert groups_of(SPLIT) == {"size": ([1], [3]), "rare labels": ([0], [2])}
    even = {"sizes": [[5, 1, 1]] * 4, "labels": [[5, 5], [5, 5], [9, 1], [1, 9]]}
    # Divergence of (9, 1) / 10 from a half each: .9 log 1.8 + .1 log .2 = .368 nats; that of the even ones is 0.
    assert groups_of(even) == {"unlike labels": ([2], [1])}
    assert groups_of({"sizes": [[5, 1, 1]] * 4, "labels": [[5, 5]] * 4}) == {}
    assert groups_of({}) == {} and groups_of({"sizes": [[5, 1, 1], [50, 1, 1]]}) == {}


def test_who_pays_by_hand(swept: Path) -> None:
    (line,) = lines_of(find_runs([swept]))
    costs = line.costs("digit", "accuracy")[1.0].groups
    small_, large = [0.6, 0.4, 0.3], [0.0, 0.0, -0.1]  # clients 1 and 3
    assert costs["size", "smallest quarter"].values == pytest.approx(small_)
    assert costs["size", "largest quarter"].values == pytest.approx(large)
    differences = [a - b for a, b in zip(small_, large, strict=True)]
    assert costs["size", "difference"].values == pytest.approx(differences)
    reference = stats.ttest_rel(small_, large).confidence_interval(0.95)
    assert costs["size", "difference"].interval == pytest.approx((reference.low, reference.high))
    assert costs["rare labels", "most rare labels"].values == pytest.approx([0.4, 0.2, 0.2])


def test_runs_that_differ_in_more_than_the_budget_are_no_line(swept: Path, tmp_path: Path) -> None:
    for folder in swept.glob("epsilon-none*"):
        text = (folder / "experiment.toml").read_text()
        (folder / "experiment.toml").write_text(text.replace("momentum = 0.9", "momentum = 0.5"))
    (line,) = lines_of(find_runs([swept]))  # of two budgets, but what they cost is not known
    assert not line.bare and utility_cost(line) is None
    assert answer(find_runs([swept])) == []
    assert {column.name for column in table([line], "digit", "accuracy").columns} == {
        "",
        "epsilon",
        "global test",
        "mean",
    }
    for folder in swept.glob("epsilon-8*"):
        text = (folder / "experiment.toml").read_text()
        (folder / "experiment.toml").write_text(text.replace("momentum = 0.9", "momentum = 0.1"))
    assert lines_of(find_runs([swept])) == [] and contents(find_runs([swept]))["budgets"] == []


def test_costs_are_computed_once(swept: Path) -> None:
    (line,) = lines_of(find_runs([swept]))
    assert line.costs("digit", "accuracy") is line.costs("digit", "accuracy")


def test_the_report_shows_costs_and_who_pays(swept: Path) -> None:
    (part,) = contents(find_runs([swept]))["budgets"]
    names = [(column.group, column.name) for column in part["table"].columns]
    bare, tight, _ = part["table"].rows
    cells = dict(zip(names, tight, strict=True))
    cost = cells["clients", "lost"]
    assert cost.text == f"{100 * np.mean(COSTS):+.1f}" and cost.small.startswith("[") and not bare[5].text
    # Client 3 loses nothing in seeds 0 and 1, and gains in seed 2.
    assert (cells["clients", "who lose"].text, cells["clients", "who lose"].small) == ("9", "of 12")
    assert [picture.id for picture in part["pictures"]] == ["digit-budgets", "digit-payers"]
    page = text_of(write_report([swept], swept / "report.html"))
    assert all(f'id="{name}"' in page for name in ("budgets", "digit-budgets", "digit-payers", "digit-budgets-table"))
    # Never an epsilon without its unit, delta, adjacency and accountant: in the sentence, two pictures and the table.
    assert page.count("delta = 1e-05; add or remove one; pld") >= 4


def test_without_the_clients_metrics_the_shared_model_is_drawn(swept: Path) -> None:
    for folder in swept.glob("epsilon-[18]*"):
        (folder / "clients.csv").write_text("client,epsilon\n0,1\n")
        summary = json.loads((folder / "summary.json").read_text())
        summary["metrics"]["clients"] = {}
        (folder / "summary.json").write_text(json.dumps(summary))
        lines = [json.loads(line) | {"clients": {}} for line in (folder / "rounds.jsonl").read_text().splitlines()]
        (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (part,) = contents(find_runs([swept]))["budgets"]
    (line,) = lines_of(find_runs([swept]))
    assert line.place("digit", "accuracy") == "global" and [p.id for p in part["pictures"]] == ["digit-budgets"]
    # Without protection the clients are known; what that costs them is not.
    assert {c.name for c in part["table"].columns if c.group == "clients"} == {"mean"}


def test_the_command_draws_it(tmp_path: Path) -> None:
    given = ["sweep", "fedper", *PRIVATE, "privacy.accountant=rdp", "privacy.epsilon=1,8", "partition.clients=4",
             "run.rounds=2", "task.source_samples=200", "engine.name=inline", "--quiet",
             "--out", str(tmp_path / "s")]  # fmt: skip
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert 'id="budgets"' in text_of(tmp_path / "s" / "report.html")
    assert [line.label for line in lines_of(find_runs([tmp_path / "s"]))] == ["FedPer"]
    assert {p.name for p in (tmp_path / "s").glob("*-seed0")} == {f"epsilon-{e}-seed0" for e in (1, 8, "none")}
