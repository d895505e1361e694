"""Plant faults, and tell what they cost: rounds and clients lost, seconds to recover, other bits, orphans, files left.

    python -m benchmarks.faults [--kinds A,B] [--tries N] [--hostile N] [--seed N] [--out FILE.csv]

Each kind of fault (`kinds.py`) is tried several times at random moments, on tiny experiments, and its result is held against
that of a run that nothing happened to. Then hostile inputs (`benchmarks/hostile.py`) are given to the command. All of it
takes over an hour on two cores. Exit status 1 if anything is not as expected; folders of such tries are kept in /tmp.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from meadow.benchmarks.faults.commands import preload
from meadow.benchmarks.faults.input import attack, families
from meadow.benchmarks.faults.kinds import PLAIN, kinds
from meadow.benchmarks.faults.tries import Kind, Whole, new_folder, play, prepare, row
from meadow.benchmarks.output import about, write

T = TypeVar("T")

WIDTHS = {"fault": 36, "engine": 9, "tries": 5, "lost": 4, "recovered_s": 11, "same_bits": 9, "orphans": 7, "left": 4,
          "unmet": 5, "exit": 1}  # fmt: skip
HOSTILE = {
    "fault": 36,
    "tries": 5,
    "slowest_s": 9,
    "largest_mb": 10,
    "tracebacks": 10,
    "hangs": 5,
    "unmet": 5,
    "exit": 1,
}


def main(every: Mapping[str, Kind], words: Sequence[str] | None = None) -> int:
    """Try the kinds and the inputs; 1 if an expectation is not met."""
    given = _parser(every).parse_args(words)
    chosen = [
        kind for name, kind in every.items() if not given.kinds or name in given.kinds or kind.name in given.kinds
    ]
    if unknown := set(given.kinds) - {*every, *(kind.name for kind in every.values())}:
        print(f"there is no {', '.join(sorted(unknown))}; there are:\n" + "\n".join(every), file=sys.stderr)
        return 2
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    folder = new_folder()
    preload(["run", *PLAIN, "--engine", "inline", "--out", "run"], folder)
    shutil.rmtree(folder)
    unmet, found = 0, list[dict[str, Any]]()
    for columns, rows in (
        (WIDTHS, _faults(chosen, given.tries, given.seed)),
        (HOSTILE, _inputs(given.hostile, given.seed)),
    ):
        for number, (line, problems) in enumerate(rows):
            if not number:
                print(_line(columns, dict(zip(columns, columns, strict=True))))
            print(_line(columns, line), *problems, sep="\n    ", flush=True)
            unmet += line["unmet"]
            found.append(line)
            if given.out:
                write(given.out, [{**line, **about()}], replacing="fault")
    tries = sum(line["tries"] for line in found)
    print(f"{tries} tries of {len(found)} kinds; {unmet} not as expected")
    return int(unmet > 0)


def _parser(every: Mapping[str, Kind]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name.strip() for name in text.split(",") if name.strip()]  # noqa: E731
    parser.add_argument("--kinds", type=names, default=[], help="names of kinds, with or without their engine")
    parser.add_argument("--tries", type=int, default=0, help="tries of each kind; default: what kinds.py says")
    parser.add_argument("--hostile", type=int, default=10_000, help="hostile inputs (10,000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a CSV file to write; its rows of other faults stay")
    return parser


def _faults(chosen: Sequence[Kind], tries: int, seed: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
    wholes: dict[tuple[tuple[str, ...], bool], Whole] = {}
    try:
        for kind in chosen:
            settings = tuple(text for text in kind.like or kind.settings if not text.startswith("engine.workers"))
            if (settings, kind.half) not in wholes:
                wholes[settings, kind.half] = prepare(settings, kind.half)
            whole, seeds = wholes[settings, kind.half], range(seed, seed + (tries or kind.tries))
            # A run on Ray or of real processes has the machine for itself.
            outcomes = _mapped(partial(play, kind, whole), seeds, 2 if kind.engine == "inline" else 1)
            yield row(kind, outcomes), [problem for outcome in outcomes for problem in outcome.problems]
    finally:
        for whole in wholes.values():
            if whole.half:
                shutil.rmtree(whole.half.parent, ignore_errors=True)


def _inputs(count: int, seed: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
    if count:
        parts = os.cpu_count() or 1
        yield from families(_mapped(partial(attack, count, seed, parts), range(parts), parts))


def _mapped(function: Callable[[int], T], numbers: Sequence[int], workers: int) -> list[T]:
    """The function's values, computed in forked processes, which need not import anything."""
    with multiprocessing.get_context("fork").Pool(workers, _take, (function,)) as pool:
        return pool.map(_do, numbers, chunksize=1)


def _take(function: Callable[[int], Any]) -> None:
    global _function
    _function = function


def _do(number: int) -> Any:
    return _function(number)


_function: Callable[[int], Any]
"""What a forked process computes; closures cannot be sent."""


def _line(columns: Mapping[str, int], cells: Mapping[str, object]) -> str:
    texts = {"fault", "engine", "exit"}
    return "  ".join(f"{cells[name]!s:{'<' if name in texts else '>'}{width}}" for name, width in columns.items())


if __name__ == "__main__":
    sys.exit(main(kinds()))
