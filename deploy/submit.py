"""The coordinator's one-shot service: admit the nodes, submit the run, follow it to its end, write the report.

`python -m deploy.submit`. Its exit status is the run's: 0 done, 3 ended early for a stated reason, 1 a fault. A run that
Flower calls failed because something under it died (a SuperLink that was killed marks its runs so) is submitted again from
its last checkpoint, at most MEADOW_ATTEMPTS times; the result has the bits of a run that never was interrupted.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w

from config.load import load, to_flat
from config.schema import Experiment
from experiments.report import write_report

KEYS, SHARE, RUNS, STATE = Path("/own/keys"), Path("/own/share"), Path("/runs"), Path("/state")
CONNECTION = "meadow"
PATIENCE = 120.0
"""Seconds for nodes to come; the run then begins with those that did (its quorum decides), or fails if there is none."""


class Stopped(Exception):
    """Somebody stopped the coordinator."""


def main() -> int:
    """Submit and follow; the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    experiment = load(SHARE / "experiment.toml")
    out = RUNS / (os.environ.get("MEADOW_RUN") or f"{experiment.run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    _connect()
    try:
        _admit(sorted(KEYS.glob("*.pub")))
        _wait_for_nodes(len(list(KEYS.glob("*.pub"))))
        status = _run(experiment, out)
    except Stopped:
        _note_stop(out)
        status = 3
    if (out / "experiment.toml").exists():
        log("report", file=str(write_report([out], out / "report.html")))
    ended = os.environ.get("MEADOW_ENDED", "")
    if ended:
        Path(ended).write_text(f"{status}\n")
    return status


def log(event: str, level: str = "INFO", **facts: object) -> None:
    """One line an event."""
    print(" ".join([f"level={level} service=run event={event}", *(f"{k}={v}" for k, v in facts.items())]), flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _connect() -> None:
    home = STATE / "flwr"
    os.environ["FLWR_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    connection = {"address": "superlink:9091", "root-certificates": str(KEYS / "ca.crt")}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))


def _flwr(*words: str) -> Any:
    """What a `flwr` command answers with --format json; an empty mapping if it fails."""
    done = subprocess.run(["flwr", *words, CONNECTION, "--format", "json"], capture_output=True, text=True, timeout=60)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {}


def _admit(keys: Sequence[Path]) -> None:
    """Register the nodes' public keys; one that is registered already stays so."""
    for key in keys:
        answer = subprocess.run(
            ["flwr", "supernode", "register", str(key), CONNECTION, "--format", "json"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        log("register", node=key.stem, answer="new" if answer.returncode == 0 else "known")


def _wait_for_nodes(count: int) -> None:
    end = time.monotonic() + PATIENCE
    online = 0
    while online < count and time.monotonic() < end:
        nodes = _flwr("supernode", "list").get("nodes", [])
        online = sum(node.get("status") == "online" for node in nodes)
        time.sleep(0.5)
    log("nodes", level="INFO" if online >= count else "WARNING", online=online, expected=count)


def _run(experiment: Experiment, out: Path) -> int:
    for attempt in range(1, int(os.environ.get("MEADOW_ATTEMPTS", "3")) + 1):
        # A folder that an earlier attempt, or an earlier start under the same name, has begun is gone on with.
        overrides = {**to_flat(experiment), "out": str(out), "resume": out.exists()}
        file = Path("/tmp/run-config.toml")
        file.write_text(tomli_w.dumps(overrides))
        app = _app()
        log("submit", attempt=attempt, out=str(out))
        submitted = subprocess.run(
            ["flwr", "run", str(app), CONNECTION, "--run-config", str(file), "--format", "json"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if submitted.returncode != 0:
            log("refused", level="ERROR", answer=json.dumps(submitted.stdout + submitted.stderr))
            return 1
        _follow(out)
        summary = _summary(out)
        if summary and summary["status"] in ("done", "stopped"):
            log("end", status=summary["status"], reason=json.dumps(summary["reason"]), model=summary["model_sha256"])
            return 0 if summary["status"] == "done" else 3
        runs = _wait_for_superlink()
        log("failed", level="WARNING", attempt=attempt, flower=json.dumps(runs[:1]))
        if summary and summary["status"] == "failed":
            return 1
    return 1


def _follow(out: Path) -> None:
    """Tell each round as it ends, until Flower calls the run finished."""
    told, looked = 0, 0.0
    while True:
        path = out / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines[told:]:
            record = json.loads(line)
            failed = [failure["client"] for failure in record["failed"]]
            log(
                "round", round=record["round"], clients=len(record["cohort"]), failed=failed,
                seconds=round(record["seconds"], 1), bytes=record["bytes_up"] + record["bytes_down"],
            )  # fmt: skip
        told = max(told, len(lines))
        if time.monotonic() - looked > 5:
            runs = _flwr("ls").get("runs", [])
            if runs and str(runs[0].get("status", "")).startswith("finished"):
                return
            looked = time.monotonic()
        time.sleep(0.5)


def _app() -> Path:
    """A copy of the app to bundle: `flwr run` writes beside it, and the image is read-only."""
    app = Path("/tmp/app")
    shutil.rmtree(app, ignore_errors=True)
    shutil.copytree("/app", app)
    return app


def _wait_for_superlink() -> list[Any]:
    """The list of runs, as soon as the SuperLink answers again."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if runs := _flwr("ls").get("runs", []):
            return list(runs)
        time.sleep(1)
    return []


def _note_stop(out: Path) -> None:
    """What a run says of itself when the coordinator was stopped: status 3, and the folder can be resumed."""
    log("stopped", level="WARNING", resume=f"MEADOW_RUN={out.name} docker compose up")
    runs = _flwr("ls").get("runs", [])
    if runs:
        subprocess.run(["flwr", "stop", str(runs[0].get("run-id", "")), CONNECTION], capture_output=True, timeout=20)


def _summary(out: Path) -> Any:
    path = out / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
