"""Measure the time of a round by phase (`meadow.runtime.clock`):

    python -m benchmarks.profile PRESET [KEY=VALUE ...]

PRESET: a preset, an experiment file, or a workload of `benchmarks/workloads.py`. The figures are means over the rounds
after the first two, from `rounds.jsonl`; the wall time is measured separately, from round to round.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks.workloads import WORKLOADS, settings
from meadow.config.load import apply, parse_override, read_tree, resolve
from meadow.config.schema import Experiment
from meadow.experiments.api import run_many
from meadow.experiments.compare import Job
from meadow.runtime.clock import PHASES
from meadow.runtime.errors import UserError
from meadow.server.folder import RunFolder
from meadow.server.writer import Writer

WARM_UP = 2
ROUNDS = 20


def measure(experiment: Experiment) -> tuple[dict[str, float], float]:
    """Run the experiment. Returns the mean seconds of each phase, and of a round by the wall clock, after the warm-up."""
    stamps: list[float] = []
    give = Writer.round_done

    def stamped(self: Writer, *given: Any) -> None:
        stamps.append(time.perf_counter())
        give(self, *given)

    with tempfile.TemporaryDirectory() as place, mock.patch.object(Writer, "round_done", stamped):
        folder = Path(place) / "run"
        run_many([Job(experiment, folder)])
        records = RunFolder(folder).rounds()[WARM_UP:]
    walls = [after - before for before, after in pairwise(stamps)][WARM_UP - 1 :]
    return {p: statistics.fmean(r["times"][p] for r in records) for p in PHASES}, statistics.fmean(walls)


def table(phases: dict[str, float], wall: float) -> Table:
    """The phases as a table, with their share of the wall time."""
    found = Table("phase", "milliseconds", "of the round")
    for column in found.columns[1:]:
        column.justify = "right"
    for name, seconds in [*phases.items(), ("sum of the phases", sum(phases.values())), ("wall time", wall)]:
        found.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / wall:.1%}", end_section=name == PHASES[-1])
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a preset, an experiment file or a workload")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for `meadow run`")
    given = parser.parse_args()
    name, rounds = given.preset, WARM_UP + ROUNDS
    flat = [*(settings(name, rounds) if name in WORKLOADS else {"run.rounds": rounds}).items()]
    try:
        tree = read_tree("fedavg" if name in WORKLOADS else name)
        experiment = resolve(apply(tree, [*flat, *map(parse_override, given.overrides)]))
        Console().print(table(*measure(experiment)))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
