"""Compare the time of a round on each engine: the plain PyTorch loop, Meadow, Flower's Ray engine, pfl-research.

    python -m benchmarks.engines [--out FILE.csv] [--repeats N] [--pfl PYTHON] [workload ...]

`benchmarks/workloads.py` has the work; `benchmarks/sides.py` runs it, in two processes of one thread. The engines
alternate `--repeats` times, each in fresh processes; a figure is the median over all rounds after the warm-up.
"share_of_rate" is the share of the machine's measured float32 matrix rate that the models' products achieve. If an
engine is not installed, the output says what to type. pfl-research may be in another Python environment: `--pfl`.
"""

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from meadow.benchmarks.output import about, chosen, options, table, write
from meadow.benchmarks.sides import PROCESSES, SIDES
from meadow.benchmarks.workloads import WORKLOADS

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


def rows(found: Seconds, rate: float) -> list[dict[str, Any]]:
    """A row for each workload and engine: the median, and its ratios."""
    made = []
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


COLUMNS = {"workload": "", "engine": "", "rounds": "d", "milliseconds": ".1f", "fastest": ".1f", "of_plain": ".2f",
           "over_meadow": ".2f", "share_of_rate": ".1%"}  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__, "workload", WORKLOADS, "a CSV file to write; its rows of other workloads stay")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each engine takes (3)")
    parser.add_argument("--engines", default=",".join(SIDES), help=f"of {', '.join(SIDES)}; default: all")
    parser.add_argument("--pfl", default=sys.executable, metavar="PYTHON", help="the Python that has pfl-research")
    given = parser.parse_args()
    names, sides = chosen(parser, given.names, WORKLOADS), chosen(parser, given.engines.split(","), SIDES)
    rate = matrix_rate()
    found, missing = measure(names, sides, given.repeats, {"pfl": given.pfl})
    lines = rows(dict(sorted(found.items(), key=lambda item: names.index(item[0][0]))), rate)
    titled = [{**x, "workload": WORKLOADS[x["workload"]].title, "engine": SIDES[x["engine"]].title} for x in lines]
    console = Console(width=120)
    console.print(table(f"A round: medians; matrix rate {rate / 1e9:.0f} GFLOP/s", COLUMNS, titled))
    for side, reason in missing.items():
        console.print(f"{SIDES[side].title} is left out: {reason}")
    if given.out and lines:
        where = {"gflops_rate": round(rate / 1e9), **about()}
        write(given.out, [{**line, **where} for line in lines], replacing="workload")


if __name__ == "__main__":
    main()
