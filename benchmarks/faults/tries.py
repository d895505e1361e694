"""One try of a kind of fault: its folder, its commands, and how it came out against the run that nothing happened to."""

import json
import random
import re
import shutil
import statistics
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meadow.benchmarks.faults import faulty
from meadow.benchmarks.faults.commands import Command, Limit, left_behind, orphans, start

SAME = ("status", "rounds", "clients", "model_sha256", "personal_sha256", "split_sha256", "metrics", "epsilon")
"""What of a summary is the same whether a fault happened or not."""

Statuses = frozenset[int]


@dataclass(frozen=True)
class Kind:
    """A kind of fault, and what is expected of each try.

    story: plants the fault and carries on as a user would. settings: of the experiment. ends: for each command, its
    possible exit statuses. lost: rounds and clients' turns that may be missing of a run that ends with 0. same: whether
    its result has the same bits as that of `like`, default: of the same settings without a fault. told: a word that the
    user must read. half: the story begins with a run that was stopped after half of its rounds.
    """

    name: str
    story: Callable[["Try"], None]
    ends: Sequence[Statuses]
    settings: tuple[str, ...] = ("fedavg",)
    engine: str = "inline"
    tries: int = 4
    lost: int = 0
    same: bool = True
    like: tuple[str, ...] = ()
    told: str = ""
    left: int = 0
    half: bool = False


@dataclass(frozen=True)
class Whole:
    """The run that nothing happened to: its summary, its seconds, and its folder when it was stopped after half."""

    summary: dict[str, Any]
    seconds: float
    half: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a try came out. problems: what was expected otherwise."""

    ends: tuple[int, ...]
    lost: int
    seconds: float | None
    same: bool | None
    orphans: int
    left: int
    problems: tuple[str, ...]


@dataclass
class Try:
    """A try that goes on. ends: the exit statuses so far. seconds: how long the recovery took. pids: of its commands."""

    kind: Kind
    whole: Whole
    random: random.Random
    folder: Path
    ends: list[int] = field(default_factory=list)
    seconds: float | None = None
    pids: list[int] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def start(
        self,
        *more: str,
        forked: bool | None = None,
        limits: Sequence[Limit] = (),
        output: int | Path = Path("log"),
        path: Path | None = None,
        out: str = "run",
    ) -> Command:
        """Start `meadow run` with the kind's settings."""
        words = ["run", *self.kind.settings, "--engine", self.kind.engine, "--out", out, *more]
        forked = self.kind.engine == "inline" if forked is None else forked
        command = start(words, self.folder, forked=forked, limits=limits, output=output, path=path)
        self.pids.append(command.pid)
        return command

    def end(self, command: Command) -> int:
        """Wait for a command, and note its exit status."""
        self.ends.append(command.wait())
        return self.ends[-1]

    def resume(self) -> int:
        """Run `meadow run --resume`; it counts as the recovery."""
        began = time.monotonic()
        status = self.end(self.start("--resume"))
        self.seconds = time.monotonic() - began
        return status

    def moment(self, command: Command) -> None:
        """Wait for a random moment of the run: of all of it, or, as often, of its rounds."""
        if self.kind.engine != "inline" or self.random.random() < 0.5:
            self.rounds_to(command, 1)
        until = time.monotonic() + self.random.uniform(0, self.whole.seconds)
        while command.poll() is None and time.monotonic() < until:
            time.sleep(0.001)

    def rounds_to(self, command: Command, count: int) -> None:
        """Wait until so many rounds are on record."""
        until = time.monotonic() + 180
        while command.poll() is None and len(records(self.run)) < count and time.monotonic() < until:
            time.sleep(0.005)

    def next_round(self, command: Command) -> None:
        """Wait for the next round; it counts as the recovery."""
        began, count = time.monotonic(), len(records(self.run))
        self.rounds_to(command, count + 1)
        self.seconds = time.monotonic() - began


def records(run: Path) -> list[dict[str, Any]]:
    """The round records, without damaged lines."""
    found = []
    try:
        lines = (run / "rounds.jsonl").read_bytes().split(b"\n")
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in found if isinstance(record, dict)]


def summary(run: Path) -> dict[str, Any]:
    """What of a run's summary must be the same; empty if there is none."""
    try:
        found = json.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    found["epsilon"] = found.get("privacy", {}).get("epsilon")
    return {key: found.get(key) for key in SAME}


def prepare(settings: tuple[str, ...], half: bool) -> Whole:
    """Play an experiment on the inline engine without a fault."""
    folder = new_folder()
    words = ["run", *settings, "--engine", "inline", "--out"]
    began = time.monotonic()
    status = start([*words, "run"], folder, forked=True).wait(600)
    seconds = time.monotonic() - began
    found = summary(folder / "run")
    if status or found.get("status") != "done":
        raise RuntimeError(f"{' '.join(settings)}: status {status}: {(folder / 'log').read_text()[-2000:]}")
    if half:
        shutil.rmtree(folder / "run")
        start([*words, "run", "run.listeners=faulty:Half"], folder, forked=True).wait(600)
        return Whole(found, seconds, folder / "run")
    shutil.rmtree(folder)
    return Whole(found, seconds)


def new_folder() -> Path:
    """A folder for a try, with the objects that experiments name; its path is short, for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    shutil.copy(str(faulty.__file__), folder / "faulty.py")
    return folder


def play(kind: Kind, whole: Whole, seed: int) -> Outcome:
    """Play one try, and judge it."""
    this = Try(kind, whole, random.Random(f"{kind.name} {seed}"), new_folder())
    if whole.half and kind.half:
        shutil.copytree(whole.half, this.run)
    try:
        kind.story(this)
    except Exception:
        return Outcome((), 0, None, None, 0, 0, (f"the story itself failed: {traceback.format_exc()}",))
    finally:
        still = orphans(this.folder)
    left = left_behind(this.folder, this.pids)
    outcome = _judged(this, still, left)
    if not outcome.problems:
        shutil.rmtree(this.folder, ignore_errors=True)
    return outcome


def _judged(this: Try, still: Sequence[tuple[int, str]], left: Sequence[Path]) -> Outcome:
    kind, log = this.kind, this.folder / "log"
    text = log.read_text(errors="replace") if log.exists() else ""
    done = bool(this.ends) and this.ends[-1] == 0
    found, lost, same = summary(this.run), 0, None
    if done and kind.ends[-1] >= {0}:
        lines = records(this.run)
        missing = this.whole.summary["rounds"] - len({line["round"] for line in lines})
        lost = missing + sum(len(line["failed"]) for line in lines)
        same = found == this.whole.summary
    problems = []
    if len(this.ends) > len(kind.ends) or any(end not in may for end, may in zip(this.ends, kind.ends, strict=False)):
        problems.append(f"exit status {this.ends}, expected {[sorted(may) for may in kind.ends]}: {_last_line(text)}")
    if "Traceback (most recent call last)" in text:
        problems.append(f"a traceback: {_last_line(text.partition('Traceback (most')[2])}")
    if lost > kind.lost:
        problems.append(f"lost {lost}, expected at most {kind.lost}")
    if kind.same and same is False:
        wrong = [key for key in SAME if found.get(key) != this.whole.summary[key]]
        problems.append(f"not the same {', '.join(wrong)}")
    if kind.told and kind.told not in text:
        problems.append(f"{kind.told} is not told")
    if still:
        problems.append(f"still running: {'; '.join(words[:60] for _, words in still[:3])}")
    if len(left) > kind.left:
        problems.append(f"left behind: {'; '.join(map(str, left[:3]))}")
    notes = tuple(f"{problem} ({this.folder})" for problem in problems)
    return Outcome(tuple(this.ends), lost, this.seconds, same, len(still), len(left), notes)


def _last_line(text: str) -> str:
    """The last line that tells of an error, or the last of all."""
    lines = [line for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"meadow: |Error|stopped|failed", line)]
    return (telling or lines or [""])[-1][:300]


def row(kind: Kind, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The table's line about a kind."""
    seconds = [o.seconds for o in outcomes if o.seconds is not None]
    compared = [o.same for o in outcomes if o.same is not None]
    each = Counter(" then ".join(map(str, o.ends)) for o in outcomes)
    return {
        "fault": kind.name,
        "engine": kind.engine,
        "tries": len(outcomes),
        "lost": sum(o.lost for o in outcomes),
        "recovered_s": round(statistics.median(seconds), 1) if seconds else "",
        "same_bits": f"{sum(compared)}/{len(compared)}" if compared and kind.same else "",
        "exit": ", ".join(f"{ends} ({count})" for ends, count in each.most_common()),
        "orphans": sum(o.orphans for o in outcomes),
        "left": sum(o.left for o in outcomes),
        "unmet": sum(bool(o.problems) for o in outcomes),
    }
