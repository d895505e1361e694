"""Outputs that cannot be written, and signals at the wrong moment: status 3, one message, and a run that can be resumed."""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from helpers.runs import RESUMED, run_inline, small
from meadow.config.load import to_toml
from meadow.server.folder import RunFolder

# A shell starts what runs in the background with SIGINT ignored, and children inherit that.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
MAIN += "from meadow.experiments.command import main; main()"
EXPERIMENT = small("fedper", "local.steps=1", "partition.clients=4", "engine.name=inline")


def command(tmp_path: Path, out: str, *options: str) -> list[str]:
    file = tmp_path / "e.toml"
    file.write_text(to_toml(EXPERIMENT))
    return [sys.executable, "-c", MAIN, "run", str(file), "--out", str(tmp_path / out), *options]


def limited(size: int) -> Callable[[], None]:
    """Lets a process write files of at most so many bytes, as a disk quota or a full disk would."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(("size", "file"), [(1000, "experiment.toml"), (4000, "summary.json"), (20_000, "checkpoints")])
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(size: int, file: str, tmp_path: Path) -> None:
    """The message names the file; the summary, where there was no room for it, comes with the resumed run."""
    asked, out = command(tmp_path, "run", "--quiet"), tmp_path / "run"
    full = subprocess.run(asked, preexec_fn=limited(size), capture_output=True, text=True)
    assert full.returncode == 3 and file in full.stderr and "Traceback" not in full.stderr
    assert len(full.stderr.splitlines()) == 1
    if size > 10_000:
        assert (RunFolder(out).summary() or {})["status"] == "stopped"
    resumed, whole = run_inline(EXPERIMENT, out, resume=True), run_inline(EXPERIMENT, tmp_path / "whole")
    assert [resumed[k] for k in RESUMED] == [whole[k] for k in RESUMED]


@pytest.mark.slow
def test_a_full_disk_stops_real_processes_too(tmp_path: Path) -> None:
    asked = command(tmp_path, "run", "--quiet", "--engine", "processes")
    full = subprocess.run(asked, preexec_fn=limited(20_000), capture_output=True, text=True)
    assert full.returncode == 3 and str(tmp_path / "run") in full.stderr and "Traceback" not in full.stderr


@pytest.mark.parametrize(("redirect", "options"), [(">/dev/full", ()), (">&-", ("--json",)), ("| true", ())])
def test_a_full_or_closed_output_costs_no_result(redirect: str, options: tuple[str, ...], tmp_path: Path) -> None:
    script = f'"$@" {redirect}; exit ${{PIPESTATUS[0]}}'
    asked = ["bash", "-c", script, "-", *command(tmp_path, "run", *options)]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 3 and "standard output" in done.stderr and "Traceback" not in done.stderr
    assert (RunFolder(tmp_path / "run").summary() or {})["status"] == "done"


def test_no_file_of_a_run_takes_the_place_of_a_closed_output(tmp_path: Path) -> None:
    asked = ["bash", "-c", '"$@" >&- 2>&- <&-', "-", *command(tmp_path, "run", "--quiet")]
    assert subprocess.run(asked).returncode == 0
    for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines():
        assert json.loads(line)["round"]


def test_a_report_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    run_inline(EXPERIMENT, tmp_path / "run")
    asked = [sys.executable, "-m", "meadow", "report", str(tmp_path / "run")]
    full = subprocess.run(asked, preexec_fn=limited(1000), capture_output=True, text=True)
    assert full.returncode == 3 and "report.html" in full.stderr and "Traceback" not in full.stderr


def signalled(asked: Sequence[str], begun: Path) -> int:
    """Start a command, and send it a signal every few milliseconds from the moment that a file exists; its exit status."""
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as process:
        while not begun.exists() and process.poll() is None:
            time.sleep(0.005)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    return process.returncode


def test_signals_while_the_report_is_written_and_again_end_with_the_same_status(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert signalled(command(tmp_path, "run", "--quiet"), out / "summary.json") == 3
    assert (RunFolder(out).summary() or {})["status"] == "done"


def test_a_second_signal_while_the_first_stops_a_run_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert signalled(command(tmp_path, "run", "run.rounds=2000", "--quiet"), out / "rounds.jsonl") == 3
