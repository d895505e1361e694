"""The live table of a run's progress: a thread reads the rounds that any engine appends to rounds.jsonl."""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from meadow.experiments.ranking import worded
from meadow.experiments.words import bytes_text, metric_name, seconds_text
from meadow.tasks.metrics import PRIMARY, kind_of

SHOWN = 8
"""Rounds in the table."""

PERIOD = 0.25
"""Seconds between two reads of the file."""

Record = Mapping[str, Any]


class Tail:
    """Reads the complete rounds of a growing rounds.jsonl as they appear; a resumed run may replace the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[int, Record] = {}
        self._file = -1
        self._offset = 0

    def read(self) -> bool:
        """Read the new lines; true if there were any. Ignores a missing file, an incomplete line and a damaged one."""
        with suppress(OSError), self.path.open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino != self._file or state.st_size < self._offset:
                self.records, self._file, self._offset = {}, state.st_ino, 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    self.records[int(record["round"])] = record
            return bool(whole)
        return False


@contextmanager
def follow(run_folder: Path, total_rounds: int, label: str, console: Console, quiet: bool = False) -> Iterator[None]:
    """Show the progress of the run in `run_folder` on `console` while the context lasts.

    A terminal shows a live table of the last rounds, and one closing line. Other output gets a line for each round, at
    most one a second, and always the last. An error in the display ends the display, never the run.
    """
    if quiet:
        yield
        return
    tail, ended = Tail(run_folder / "rounds.jsonl"), threading.Event()
    with suppress(Exception):
        tail.read()
    before = dict(tail.records)  # rounds before a resume: shown, but not used to estimate the remaining time
    show = _show_live if console.is_terminal else _show_lines

    def work() -> None:
        with suppress(Exception):
            show(tail, before, ended, total_rounds, label, console)

    thread = threading.Thread(target=work, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=2.0)


def _show_live(
    tail: Tail, before: Mapping[int, Record], ended: threading.Event, total: int, label: str, console: Console
) -> None:
    began = time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False) as live:
        while not ended.wait(PERIOD):
            tail.read()
            live.update(render(tail.records, total, label, time.monotonic() - began, before), refresh=True)
    tail.read()
    if tail.records:
        console.print(Text(line(tail.records, total, label, before, over=True)), soft_wrap=True)


def _show_lines(
    tail: Tail, before: Mapping[int, Record], ended: threading.Event, total: int, label: str, console: Console
) -> None:
    printed, at = 0, float("-inf")
    while True:
        over = ended.wait(PERIOD)
        tail.read()
        newest = max(tail.records, default=0)
        if newest != printed and (over or time.monotonic() - at >= 1.0):
            console.print(Text(line(tail.records, total, label, before, over)), soft_wrap=True)
            printed, at = newest, time.monotonic()
        if over:
            return


def line(
    records: Mapping[int, Record],
    total: int,
    label: str,
    before: Mapping[int, Record] | None = None,
    over: bool = False,
) -> str:
    """The newest round in one line; `before` as in `time_left`; `over`: no further round follows."""
    newest = records[max(records)]
    target, metric = subject(records)
    parts = [f"{label}: round {newest['round']}/{total}"]
    parts += [f"loss {loss}"] if (loss := _loss(newest, target)) else []
    scored = newest.get("clients_round", newest["round"])
    clients = "clients" if scored == newest["round"] else f"clients after round {scored}"
    for name, value in zip(("global", clients, "worst tenth"), _metrics(newest, newest, target, metric), strict=True):
        if value is not None:
            parts.append(f"{name} {worded(value, metric, target)}")
    sent = sum(_bytes(record) for record in records.values())
    spent = sum(float(record.get("seconds") or 0) for record in records.values())
    left = None if over else time_left(records, total, before)
    return ", ".join(
        [*parts, bytes_text(sent), f"{seconds_text(left)} left" if left else f"{seconds_text(spent)} in all"]
    )


def render(
    records: Mapping[int, Record],
    total: int,
    label: str,
    elapsed: float,
    before: Mapping[int, Record] | None = None,
) -> RenderableType:
    """The table of the last rounds; before the first round it shows the `elapsed` seconds. `before` as in `time_left`."""
    if not records:
        return Text(f"{label}: waiting for the first of {total} rounds, {seconds_text(elapsed)}", style="dim")
    target, metric = subject(records)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    failing = any(record.get("failed") for record in records.values())
    for head in ("round", "loss", f"global {metric_name(metric)}", "clients' mean", "worst tenth", "sent", "a round"):
        table.add_column(head, justify="right")
    if failing:
        table.add_column("failed", justify="right", style="yellow")
    sent, scored = 0.0, {record.get("clients_round", number): record for number, record in records.items()}
    for number in sorted(records):
        record = records[number]
        sent += _bytes(record)
        if number > max(records) - SHOWN:
            found = _metrics(record, scored.get(number, {}), target, metric)
            values = [worded(value, metric, target) if value is not None else "" for value in found]
            spent = seconds_text(float(record.get("seconds") or 0))
            failed = [str(len(record.get("failed") or []) or "")] if failing else []
            table.add_row(f"{number}/{total}", _loss(record, target), *values, bytes_text(sent), spent, *failed)
    left = time_left(records, total, before)
    title = Text.assemble((label, "bold"), f"  {target}  ", (f"{seconds_text(left)} left" if left else "", "dim"))
    return Group(title, table)


def subject(records: Mapping[int, Record]) -> tuple[str, str]:
    """The target and metric to show: the first target that was evaluated or trained, and its primary metric."""
    found: dict[str, set[str]] = {}
    for record in records.values():
        for place in ("train", "global", "clients"):
            for target, metrics in (record.get(place) or {}).items():
                found.setdefault(target, set()).update(metrics)
    target = next(iter(found), "")
    primary = PRIMARY[kind_of(found.get(target, ()))]
    return target, primary if primary in found.get(target, ()) else "metric"


def time_left(records: Mapping[int, Record], total: int, before: Mapping[int, Record] | None = None) -> float | None:
    """Estimate the remaining seconds from the mean of the last ten rounds; None if there are none.

    `before` has the rounds from before a resume, perhaps on another machine: they do not count. A round that was then
    repeated has a new record, so it counts.
    """
    fresh = [number for number in sorted(records) if (before or {}).get(number) != records[number]][-10:]
    if not fresh:
        return None
    return max(total - max(records), 0) * sum(float(records[n].get("seconds") or 0) for n in fresh) / len(fresh)


def _metrics(
    record: Record, scored: Record, target: str, metric: str
) -> tuple[float | None, float | None, float | None]:
    """Global metric of a record; clients' mean and worst tenth of the record in which they scored that model."""
    clients = (scored.get("clients") or {}).get(target, {}).get(metric) or {}
    return (record.get("global") or {}).get(target, {}).get(metric), clients.get("mean"), clients.get("worst_decile")


def _loss(record: Record, target: str) -> str:
    loss = (record.get("train") or {}).get(target, {}).get("loss")
    return "" if loss is None else f"{loss:.3f}"


def _bytes(record: Record) -> float:
    return float((record.get("bytes_up") or 0) + (record.get("bytes_down") or 0))
