"""A run folder's files are checked before they are relied on: another form is told, never a traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.folders import make_run
from helpers.refusals import refused
from helpers.runs import run_inline, small
from meadow.experiments.report.write import render
from meadow.experiments.results import find_runs
from meadow.runtime.errors import UserError
from meadow.server.folder import RunFolder

Change = Callable[[Any], Any]
CHANGES: dict[str, tuple[str, Change]] = {
    "a list": ("summary.json", lambda found: [1]),
    "rounds in words": ("summary.json", lambda found: found | {"rounds": "two"}),
    "an endless number": ("summary.json", lambda found: found | {"rounds": 10**4000}),
    "no cost": ("summary.json", lambda found: {k: v for k, v in found.items() if k != "cost"}),
    "a metric in words": ("summary.json", lambda found: found | {"metrics": {"clients": {"digit": {"accuracy": "x"}}}}),
    "releases of nothing": ("summary.json", lambda found: found | {"privacy": {"unit": "none", "releases": [3]}}),
    "versions": ("manifest.json", lambda found: found | {"versions": 3}),
    "the manifest's split": ("manifest.json", lambda found: found | {"split": []}),
    "sizes": ("split.json", lambda found: found | {"sizes": [[1, 2]]}),
    "ragged labels": ("split.json", lambda found: found | {"labels": [[1, 2], [1]]}),
    "no classes": ("evaluation.json", lambda found: {"clients": {"digit": {"classes": [], "confusion": []}}}),
    "a confusion of two sizes": (
        "evaluation.json",
        lambda found: {"clients": {"digit": {"classes": ["0"], "confusion": [[1, 2]]}}},
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_form_is_told_with_the_files_name(tmp_path: Path, case: str) -> None:
    folder = make_run(tmp_path / "run", "fedavg", 0, [0.5, 0.7])
    assert render(find_runs([folder]))
    name, change = CHANGES[case]
    found = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(change(found)))
    with refused(name):
        render(find_runs([folder]))


def test_a_methods_name_may_be_as_long_as_it_can_be(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "fedavg", 0, [0.5, 0.7])
    text = (folder / "experiment.toml").read_text()
    (folder / "experiment.toml").write_text(text.replace('name = "fedavg"', f'name = "{"n" * 200}"', 1))
    assert "n" * 200 in render(find_runs([folder]))


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "rounds.jsonl", "clients.csv", "experiment.toml"])
@pytest.mark.parametrize("place", ["/dev/zero", "pipe", "."])
def test_a_run_folders_files_are_regular(tmp_path: Path, name: str, place: str) -> None:
    folder = make_run(tmp_path / "run", "fedavg", 0, [0.5, 0.7])
    (folder / name).unlink()
    if place == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(place)
    with pytest.raises(UserError):
        render(find_runs([folder]))


def test_a_done_run_whose_summary_lost_an_entry_is_summarised_again(tmp_path: Path) -> None:
    experiment = small("fedavg", "run.rounds=1", "partition.clients=2")
    done = run_inline(experiment, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    path.write_text(json.dumps({key: value for key, value in done.items() if key != "cost"}))
    assert RunFolder(tmp_path / "run").summary() is None
    again = run_inline(experiment, tmp_path / "run", resume=True)
    assert again["status"] == "done" and again["model_sha256"] == done["model_sha256"]
    assert json.loads(path.read_text()).keys() == done.keys()
