"""Listeners: the documented one, the notifications of each, and one that raises, which ends nothing."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import RESUMED, run_inline, small
from meadow.arrays.files import read_arrays
from meadow.arrays.named import Arrays
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest
from meadow.server.listeners import open_listeners
from meadow.simulation.launch import engine

PAGE = (Path(__file__).parents[2] / "docs" / "listeners.md").read_text()

TOLD: list[tuple[str, Any]] = []


class Scribe:
    """Writes down its notifications, and asks a run to stop behind its third round."""

    def run_begins(self, run: Any) -> None:
        TOLD.append(("begins", (run.round, run.experiment["run"]["rounds"], run.folder.name)))

    def round_done(self, done: Any) -> str | None:
        TOLD.append(("done", (done.round, done.record["cohort"], {n: v.copy() for n, v in done.model.items()})))
        return "three are enough" if done.round == 3 else None

    def run_ends(self, summary: Any) -> None:
        TOLD.append(("ends", summary["status"]))


class Clumsy:
    """Raises at each notification."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*about: Any) -> None:
            raise SystemExit(name) if name == "settle" else OSError(name)

        return fail


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The documented module, on the path."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "watch.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "user"))
    yield
    sys.modules.pop("watch", None)


@pytest.mark.usefixtures("watch")
def test_the_documented_listener_keeps_the_best_model_and_stops_the_run(tmp_path: Path) -> None:
    """With such a rate training gets worse: the first model is the best, and three worse ones end the run."""
    worse = small("fedavg", "local.lr=50", "local.momentum=0", "run.rounds=20", "run.listeners=watch:Patience")
    summary = run_inline(worse, tmp_path / "run")
    assert summary["status"] == "stopped" and "watch:Patience" in summary["reason"]
    assert 4 <= summary["rounds"] < 20 and summary["metrics"]["clients"]
    kept = read_arrays(tmp_path / "run" / "best.safetensors")
    best = f"run.rounds={summary['rounds'] - 3}"
    shorter = run_inline(small("fedavg", "local.lr=50", "local.momentum=0", best), tmp_path / "shorter")
    found, _ = latest(tmp_path / "shorter" / "checkpoints")
    assert shorter["status"] == "done" and found is not None
    assert all(np.array_equal(kept[name], found.arrays[name]) for name in kept)


def test_a_listener_is_told_what_happens_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    TOLD.clear()
    experiment = small("fedavg", "run.rounds=5", "cohort.size=3", f"run.listeners={__name__}:Scribe")
    stopped = run_inline(experiment, tmp_path / "run")
    assert (stopped["status"], stopped["rounds"]) == ("stopped", 3)
    assert [what for what, _ in TOLD] == ["begins", "done", "done", "done", "ends"]
    assert TOLD[0][1] == (1, 5, "run") and TOLD[-1][1] == "stopped"
    checkpoint, _ = latest(tmp_path / "run" / "checkpoints")
    model: Arrays = TOLD[3][1][2]
    assert checkpoint is not None and checkpoint.round == 3
    assert all(np.array_equal(model[name], value) for name, value in checkpoint.arrays.items())
    TOLD.clear()
    resumed = run_inline(experiment, tmp_path / "run", resume=True)
    assert TOLD[0][1][0] == 4 and [about[0] for what, about in TOLD if what == "done"] == [4, 5]
    whole = run_inline(small("fedavg", "run.rounds=5", "cohort.size=3"), tmp_path / "whole")
    assert [resumed[key] for key in RESUMED] == [whole[key] for key in RESUMED]


def test_a_listener_that_raises_is_named_and_ends_nothing(tmp_path: Path) -> None:
    expected = run_inline(small("fedavg"), tmp_path / "without")
    name = f"{__name__}:Clumsy"
    summary = run_inline(small("fedavg", f"run.listeners={name}"), tmp_path / "with")
    assert [summary[key] for key in RESUMED] == [expected[key] for key in RESUMED]
    (noted,) = summary["listeners"]
    assert noted["listener"] == name and "run_begins" in noted["first"]
    # Begin, three rounds with what follows each, the end of the rounds and of the run.
    assert noted["faults"] >= 1 + 3 + 3 + 1 + 1
    assert "listeners" not in expected


@pytest.mark.parametrize("name", ["nowhere:X", f"{__name__}:NOTHING", f"{__name__}:TOLD"])
def test_what_is_no_listener_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f'run.listeners = "{name}"')):
        open_listeners([name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray", "processes"])
@pytest.mark.usefixtures("watch")
def test_the_documented_listener_stops_a_run_on_every_engine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "user"), prepend=":")
    settings = ("local.lr=50", "local.momentum=0", "run.rounds=20", "run.listeners=watch:Patience")
    expected = run_inline(small("fedavg", *settings), tmp_path / "inline")
    with engine(name, 2, 1) as launch:
        summary = launch(small("fedavg", *settings, f"engine.name={name}"), tmp_path / "run")
    assert [summary[key] for key in ("reason", *RESUMED)] == [expected[key] for key in ("reason", *RESUMED)]
    assert (tmp_path / "run" / "best.safetensors").exists()
