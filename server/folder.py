"""The run folder: self-contained, readable by people, and enough to resume the run."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from meadow.arrays.files import DamagedFile, write_bytes, write_json, writing
from meadow.config.load import flatten, load, to_toml, to_tree
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.identity import ROOT, code_sha256, versions
from meadow.runtime.limits import read_file
from meadow.server.recorded import Manifest, Record, Summary, fault, read_recorded

log = logging.getLogger("meadow.server")


class RunFolder:
    """One run's folder on disk. Files are written whole or not at all; `rounds.jsonl` grows by one line each round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.state = path / "state"
        self.best = path / "best"

    def manifest(self) -> dict[str, Any]:
        """The manifest that `open_folder` wrote. Raises DamagedFile."""
        manifest = read_recorded(self.path / "manifest.json", Manifest)
        if not isinstance(manifest.get("run_id"), str):
            raise DamagedFile(f"{self.path / 'manifest.json'}: it has no run_id")
        return manifest

    def rounds(self) -> list[dict[str, Any]]:
        """The round records so far, without damaged and incomplete lines."""
        return self._lines()[0]

    def _lines(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """The round records, and the lines that are none."""
        found, damaged = list[dict[str, Any]](), list[bytes]()
        for line in read_lines(self.path / "rounds.jsonl"):
            if not line.endswith(b"\n"):  # the process ended while it wrote the line
                continue
            record = read_record(line)
            if record is None:
                damaged.append(line)
            else:
                found.append(record)
        return found, damaged

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one round's record; it is safely on disk after `sync`. Raises RunStopped if the folder is gone."""
        with self._records() as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Wait until all records are on disk."""
        with self._records() as file:
            os.fsync(file.fileno())

    @contextmanager
    def _records(self) -> Iterator[TextIO]:
        """rounds.jsonl, to append to. `cut_back` has made it: where it is missing now, the folder is not this run's."""
        path = self.path / "rounds.jsonl"
        with writing(path), path.open("r+") as file:
            file.seek(0, os.SEEK_END)
            yield file

    def cut_back(self, round_: int) -> None:
        """Delete an incomplete last line and the records after `round_`, the round of the checkpoint to resume from. Other
        damaged lines move to a file of their own, with a warning."""
        found, damaged = self._lines()
        if damaged:
            aside = self.path / "rounds-damaged.txt"
            with writing(aside), aside.open("ab") as file:
                file.writelines(damaged)
            log.warning("rounds.jsonl: %d damaged lines, now in %s", len(damaged), aside.name)
        kept = [r for r in found if r["round"] <= round_]
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
        write_bytes(self.path / "rounds.jsonl", text.encode())

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write `NAME.json`: the split, the summary, or the evaluation (`meadow.server.evaluation.describe`)."""
        path = self.path / f"{name}.json"
        with writing(path):
            (self.path / "experiment.toml").stat()  # a folder that was removed is not made again
        write_json(path, content)

    def write_clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `clients.csv`: one row per client, a column for each key of any row."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(self.path / "clients.csv", text.getvalue().encode())

    def delete_summary(self) -> None:
        """Delete the outdated summary of a run that ended early and is now resumed."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a run that has ended, else None."""
        try:
            return read_recorded(self.path / "summary.json", Summary)
        except DamagedFile:
            return None


def is_done(path: Path) -> bool:
    """Whether the run in this folder, if any, is done: nothing is left to resume."""
    return (RunFolder(path).summary() or {}).get("status") == "done"


def read_lines(path: Path) -> list[bytes]:
    """The lines of a file, with their ends; none if it does not exist. Raises UserError if it cannot be read."""
    try:
        return read_file(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; restore it, or name another folder") from None


def read_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of rounds.jsonl; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return None if fault(Record, record) else record


def check_folder(path: Path, experiment: Experiment, resume: bool) -> None:
    """Raise UserError if the folder exists, unless it is empty or the same experiment is resumed in it."""
    if not path.exists() or (path.is_dir() and all(_disposable(p) for p in path.iterdir())):
        return
    if not path.is_dir():
        raise UserError(f"--out {path}: this is a file; choose a folder")
    there = path / "experiment.toml"
    if not resume:
        raise UserError(f"--out {path}: this folder exists; add --resume to continue its run, or choose another folder")
    if not there.exists():
        raise UserError(f"--resume {path}: the folder contains no run (no experiment.toml); choose another folder")
    before, now = dict(flatten(to_tree(load(there)))), dict(flatten(to_tree(experiment)))
    changed = [k for k in now if before.get(k) != now[k] and not k.startswith("engine.") and k != "run.listeners"]
    if changed:
        key = changed[0]
        raise UserError(
            f"--resume {path}: {key} = {now[key]!r}, but the run there was started with {before.get(key)!r}; resume it with "
            "the same experiment, or choose another folder"
        )


def _disposable(path: Path) -> bool:
    """Whether a run killed before it wrote its first file may have left this: a temporary file or a launcher's logs."""
    return path.name.startswith(".") or path.name in ("logs", "flower")


def open_folder(
    path: Path, experiment: Experiment, facts: Mapping[str, Any], about: Mapping[str, Any] | None = None
) -> RunFolder:
    """Create the run folder, or open it to resume; `check_folder` comes first.

    facts: of data and split, for the manifest; they must be the same when the run is resumed. about: of the machine.
    The manifest is written before the first round. A folder without manifest, rounds and checkpoints is started afresh.
    Raises UserError if there are rounds or checkpoints without an intact manifest, or if the facts differ.
    """
    folder = RunFolder(path)
    try:
        before = folder.manifest()
        for what in facts:
            if before.get(what) != facts[what]:
                raise UserError(
                    f"--resume {path}: {what} is {facts[what]!r} now, but the run there was started with "
                    f"{before.get(what)!r}: restore the data and the versions in its manifest.json, or start a new run"
                )
    except DamagedFile as error:
        if folder.checkpoints.exists() or (path / "rounds.jsonl").exists():
            raise UserError(
                f"--resume {path}: manifest.json, which names the run that clients' states belong to, is missing or damaged "
                f"({error}); restore it, or start a new run in another folder"
            ) from None
        write_bytes(path / "experiment.toml", to_toml(experiment).encode())
        manifest = {
            "run_id": uuid.uuid4().hex,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": sys.argv,
            "git_commit": _git_commit(),
            "code_sha256": code_sha256(),
            "versions": versions(),
            **(about or {}),
            **facts,
        }
        write_json(path / "manifest.json", manifest)
    return folder


def _git_commit() -> str:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
