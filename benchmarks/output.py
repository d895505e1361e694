"""What the benchmarks print and write: tables for the terminal, and CSV files that name the machine and the versions."""

import argparse
import csv
import multiprocessing
import platform
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from meadow.runtime.identity import versions

Row = Mapping[str, Any]


def options(about: str | None, names: str, known: Collection[str], out: str = "") -> argparse.ArgumentParser:
    """The options of a benchmark: the things to measure, all of `known` by default, and with `out` the file to write."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar=names, help=f"of {', '.join(known)}; default: all")
    if out:
        parser.add_argument("--out", type=Path, help=out)
    return parser


def chosen(parser: argparse.ArgumentParser, names: Sequence[str], known: Collection[str]) -> list[str]:
    """The given names, all if none is given; an unknown one ends the program."""
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(known)}")
    return [*(names or known)]


def table(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> Table:
    """The rows as a table. `columns`: heading -> format of its cells; "" for text, which is left-aligned."""
    made = Table(title=title, title_justify="left", box=None)
    for heading, form in columns.items():
        made.add_column(heading, justify="right" if form else "left")
    for row in rows:
        made.add_row(*(format(row[heading], form) if heading in row else "" for heading, form in columns.items()))
    return made


def about() -> dict[str, str]:
    """The machine, the versions and the date, for each row of a CSV."""
    return {
        "machine": f"{_processor()}, {multiprocessing.cpu_count()} cores",
        "versions": " ".join(f"{name}={version}" for name, version in versions().items()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write(path: Path, rows: Sequence[Row], replacing: str = "") -> None:
    """Add the rows to a CSV file; the file's rows with the same value in the column `replacing` are dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now, kept = {row.get(replacing) for row in rows}, list[Row]()
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if not replacing or row[replacing] not in now]
    every = [*kept, *rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in every for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)


def _processor() -> str:
    """The processor's name, which `platform` does not give on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")), "")
