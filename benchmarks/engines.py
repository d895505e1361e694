"""Compare the time of a round on each engine: the plain PyTorch loop, Meadow, Flower's Ray engine, pfl-research.

    python -m benchmarks.engines [--out FILE.csv] [--repeats N] [--pfl PYTHON] [workload ...]

`benchmarks/workloads.py` has the work; `benchmarks/sides.py` runs it, in two processes of one thread.
The engines alternate `--repeats` times, each in fresh processes; a figure is the median over all rounds after the warm-up.
"of limit" is the share of the machine's measured float32 matrix rate that the models' products achieve. If an engine is not
installed, the output says what to type. pfl-research may be in another Python environment: `--pfl`.
"""

import argparse
import csv
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import PROCESSES, SIDES
from benchmarks.workloads import WORKLOADS
from meadow.runtime.identity import versions

Seconds = dict[tuple[str, str], list[float]]
"""(workload, engine) -> the seconds of its rounds."""

_LIMIT = 600


def matrix_rate(size: int = 1024, seconds: float = 0.5) -> float:
    """Floating-point operations a second of float32 products of this size, summed over the processes.

    The better of torch's two settings that compute in float32.
    """
    best = 0.0
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for precision in ("highest", "medium"):
            best = max(best, sum(pool.starmap(_products, [(size, seconds, precision)] * PROCESSES, chunksize=1)))
    return best


def _products(size: int, seconds: float, precision: str) -> float:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)
    a, b = torch.rand(size, size), torch.rand(size, size)
    out = a @ b
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        torch.mm(a, b, out=out)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - began)


def measure(
    names: Sequence[str], sides: Sequence[str], repeats: int, pythons: dict[str, str]
) -> tuple[Seconds, dict[str, str]]:
    """The rounds' seconds, and for each engine that did not run the reason or what to type."""
    found: Seconds = {}
    missing: dict[str, str] = {}
    for _ in range(repeats):
        for name in names:
            for side in sides:
                if side in missing:
                    continue
                python = pythons.get(side, sys.executable)
                command = [python, "-m", "benchmarks.sides", side, name]
                done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
                if done.returncode:
                    missing[side] = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it failed"
                    continue
                found.setdefault((name, side), []).extend(json.loads(done.stdout.strip().splitlines()[-1]))
    return found, missing


def rows(found: Seconds, rate: float) -> list[dict[str, object]]:
    """A row for each workload and engine: the median, and its ratios."""
    made: list[dict[str, object]] = []
    for (name, side), seconds in found.items():
        median, plain = statistics.median(seconds), statistics.median(found.get((name, "plain"), seconds))
        flops = WORKLOADS[name].flops()
        made.append(
            {
                "workload": name,
                "engine": side,
                "rounds": len(seconds),
                "milliseconds": round(1000 * median, 2),
                "fastest": round(1000 * min(seconds), 2),
                "of_plain": round(median / plain, 3),
                "over_meadow": round(median / statistics.median(found.get((name, "meadow"), seconds)), 2),
                "gflop": round(flops / 1e9, 3),
                "share_of_rate": round(flops / median / rate, 3),
            }
        )
    return made


def table(lines: Iterable[dict[str, object]], rate: float) -> Table:
    """The rows as a table for the terminal."""
    made = Table(title=f"A round: medians; matrix rate {rate / 1e9:.0f} GFLOP/s", title_justify="left", box=None)
    for heading in ("workload", "engine", "rounds", "ms", "fastest", "of plain", "over Meadow", "of limit"):
        made.add_column(heading, justify="left" if heading in ("workload", "engine") else "right")
    for line in lines:
        made.add_row(
            WORKLOADS[str(line["workload"])].title,
            SIDES[str(line["engine"])].title,
            str(line["rounds"]),
            f"{line['milliseconds']:.1f}",
            f"{line['fastest']:.1f}",
            f"{line['of_plain']:.2f}",
            f"{line['over_meadow']:.2f}",
            f"{100 * float(str(line['share_of_rate'])):.1f}%",
        )
    return made


def write(path: Path, lines: Sequence[dict[str, object]], rate: float) -> None:
    """Write the rows as CSV with machine, versions and date; the file's rows of other workloads stay."""
    where, now = {"gflops_rate": round(rate / 1e9), **about()}, {line["workload"] for line in lines}
    rows: list[dict[str, object]] = [{**line, **where} for line in lines]
    if path.exists():
        with path.open(newline="") as file:
            rows += [dict(row) for row in csv.DictReader(file) if row["workload"] not in now]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: list(WORKLOADS).index(str(row["workload"]))))


def about() -> dict[str, str]:
    """The machine, the versions and the date, for each row of a CSV."""
    return {
        "machine": f"{_processor()}, {multiprocessing.cpu_count()} cores",
        "versions": " ".join(f"{name}={version}" for name, version in versions().items()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """The processor's name, which `platform` does not give on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")), "")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each engine takes (3)")
    parser.add_argument("--engines", default=",".join(SIDES), help=f"of {', '.join(SIDES)}; default: all")
    parser.add_argument("--pfl", default=sys.executable, metavar="PYTHON", help="the Python that has pfl-research")
    given = parser.parse_args()
    names = given.workloads or list(WORKLOADS)
    if unknown := [name for name in names if name not in WORKLOADS]:
        parser.error(f"there is no workload {unknown[0]}; there are {', '.join(WORKLOADS)}")
    sides = given.engines.split(",")
    if unknown := [side for side in sides if side not in SIDES]:
        parser.error(f"there is no engine {unknown[0]}; there are {', '.join(SIDES)}")
    rate = matrix_rate()
    found, missing = measure(names, sides, given.repeats, {"pfl": given.pfl})
    lines = rows(dict(sorted(found.items(), key=lambda item: names.index(item[0][0]))), rate)
    console = Console(width=120)
    console.print(table(lines, rate))
    for side, reason in missing.items():
        console.print(f"{SIDES[side].title} is left out: {reason}")
    if given.out and lines:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write(given.out, lines, rate)


if __name__ == "__main__":
    main()
