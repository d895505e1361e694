"""The coordinator's one-shot service: registers the nodes, submits the run, follows it to its end, and writes the report.

`python -m deploy.submit`. Its exit status is the run's: 0 done, 2 the input is wrong, 3 ended early for a stated reason,
1 a fault. If Flower marks the run as failed because one of its processes died (such as the SuperLink), the run is submitted
again from its last checkpoint, at most MEADOW_ATTEMPTS times. The result has the bits of an uninterrupted run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import httpx
import tomli_w

from deploy.control import CONNECTION, STATE, connect, log, newest_run, online, register, stop
from meadow.config.load import to_flat
from meadow.config.schema import Experiment
from meadow.experiments.report import write_report
from meadow.runtime.errors import UserError
from meadow.server.folder import RunFolder, check_folder
from meadow.simulation.bundle import write_app
from meadow.strategies.check import load

SHARE = Path(os.environ.get("MEADOW_SHARE", "/own/share"))
RUNS = Path(os.environ.get("MEADOW_RUNS", "/runs"))
PATIENCE = 120.0
"""Seconds to wait for nodes; the run then begins with those that are online, and its quorum decides."""
HANDOVER = 5.0
"""Seconds to wait until the service `runs-folder` has changed the folder's owner."""
POLL = 10.0
"""Seconds between queries of the run's status at the SuperLink while the run folder does not change."""

T = TypeVar("T")


class Stopped(Exception):
    """Somebody stopped the coordinator."""


def main() -> int:
    """Submit the run and follow it; return the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    experiment = load(SHARE / "experiment.toml")
    out = RUNS / (os.environ.get("MEADOW_RUN") or f"{experiment.run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    connect()
    try:
        status = _prepare_and_run(experiment, out)
    except Stopped:
        _stop_run(out)
        status = 3
    except httpx.HTTPError as error:
        log("failed", level="ERROR", superlink=json.dumps(str(error)))
        status = 1
    if (out / "experiment.toml").exists():
        log("report", file=write_report([out], out / "report.html"))
    ended = os.environ.get("MEADOW_ENDED", "")
    if ended:
        Path(ended).write_text(f"{status}\n")
    return status


def _prepare_and_run(experiment: Experiment, out: Path) -> int:
    end = time.monotonic() + HANDOVER
    while not os.access(RUNS, os.W_OK) and time.monotonic() < end:
        time.sleep(0.2)
    if not os.access(RUNS, os.W_OK):
        way = (
            f"its owner is user {RUNS.stat().st_uid}, the containers run as {os.getuid()}; chown it, or set MEADOW_UID"
        )
        log("refused", level="ERROR", answer=json.dumps(f"{RUNS} cannot be written: {way}"))
        return 2
    try:
        check_folder(out, experiment, resume=True)
    except UserError as error:
        log("refused", level="ERROR", answer=json.dumps(str(error)))
        return 2
    _wait_for_nodes(_retry(register))
    return _run(experiment, out)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _wait_for_nodes(count: int) -> None:
    end = time.monotonic() + PATIENCE
    while (now := _retry(online)) < count and time.monotonic() < end:
        time.sleep(0.2)
    log("nodes", level="INFO" if now >= count else "WARNING", online=now, expected=count)


def _run(experiment: Experiment, out: Path) -> int:
    for attempt in range(1, int(os.environ.get("MEADOW_ATTEMPTS", "3")) + 1):
        before = RunFolder(out).summary()
        # An existing folder, from an earlier attempt or an earlier start with the same name, is resumed.
        overrides = {**to_flat(experiment), "out": str(out.absolute()), "resume": out.exists()}
        file = STATE / "run-config.toml"
        file.write_text(tomli_w.dumps(overrides))
        log("submit", attempt=attempt, out=str(out))
        submitted = subprocess.run(
            ["flwr", "run", str(write_app(STATE / "app")), CONNECTION, "--run-config", str(file), "--format", "json"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if refused := _refusal(submitted):
            log("refused", level="ERROR", answer=json.dumps(refused))
            return 1
        _follow(out, before)
        summary = RunFolder(out).summary()
        if summary and summary["status"] in ("done", "stopped"):
            log("end", status=summary["status"], reason=json.dumps(summary["reason"]), model=summary["model_sha256"])
            return 0 if summary["status"] == "done" else 3
        log("failed", level="WARNING", attempt=attempt, flower=json.dumps(_flower_status()))
        if summary and summary["status"] == "failed":
            return 1
    return 1


def _refusal(submitted: subprocess.CompletedProcess[str]) -> str:
    """Why `flwr run --format json` did not submit the run, or "". Its exit status is 0 even then (flwr 1.41)."""
    try:
        if submitted.returncode == 0 and json.loads(submitted.stdout)["success"]:
            return ""
    except (ValueError, KeyError, TypeError):
        pass
    return submitted.stdout + submitted.stderr


def _follow(out: Path, before: Any) -> None:
    """Log each round as it ends, until the run folder has a summary other than `before` or Flower reports the end."""
    logged, polled = len(RunFolder(out).rounds()), time.monotonic()
    while True:
        records = RunFolder(out).rounds()
        for record in records[logged:]:
            failed = [failure["client"] for failure in record["failed"]]
            log(
                "round", round=record["round"], clients=len(record["cohort"]), failed=json.dumps(failed).replace(" ", ""),
                seconds=round(record["seconds"], 1), bytes=record["bytes_up"] + record["bytes_down"],
            )  # fmt: skip
            polled = time.monotonic()
        logged = len(records)
        if (summary := RunFolder(out).summary()) and summary != before:
            return
        if time.monotonic() - polled > POLL:
            if _flower_status().startswith("finished"):
                return
            polled = time.monotonic()
        time.sleep(0.2)


def _flower_status() -> str:
    """Flower's status of the newest run, as text."""
    run = _retry(newest_run)
    return f"{run.status.status} {run.status.sub_status} {run.status.details}" if run else ""


def _retry(call: Callable[[], T]) -> T:
    """Call the SuperLink; repeat the call for up to PATIENCE seconds while it does not answer, as when it restarts."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except httpx.HTTPError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _stop_run(out: Path) -> None:
    """Stop the run and log how to resume it."""
    log("stopped", level="WARNING", resume=f"MEADOW_RUN={out.name}")
    try:
        if (run := newest_run()) and run.status.status != "finished":
            stop(run)
    except httpx.HTTPError as error:  # the SuperLink has stopped, too
        log("stopped", level="WARNING", superlink=json.dumps(str(error)))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once, because `up --exit-code-from run` stops all others as soon as one container ends
