"""Measure the time of a round by phase (`meadow.runtime.clock`):

    python -m benchmarks.profile PRESET [KEY=VALUE ...]

PRESET: a preset, an experiment file, or a workload of `benchmarks/workloads.py`. The figures are means over the rounds
after the first two, from `rounds.jsonl`; the wall time is measured separately, from round to round.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from meadow.benchmarks.output import table
from meadow.benchmarks.sides import WARM_UP, between, stamped
from meadow.benchmarks.workloads import WORKLOADS, settings
from meadow.config.load import apply, parse_override, read_tree, resolve
from meadow.config.schema import Experiment
from meadow.experiments.api import run_many
from meadow.experiments.compare import Job
from meadow.runtime.clock import PHASES
from meadow.runtime.errors import UserError
from meadow.server.folder import RunFolder

ROUNDS = 20


def measure(experiment: Experiment) -> tuple[dict[str, float], float]:
    """Run the experiment. Returns the mean seconds of each phase, and of a round by the wall clock, after the warm-up."""
    with tempfile.TemporaryDirectory() as place, stamped() as stamps:
        folder = Path(place) / "run"
        run_many([Job(experiment, folder)])
        records = RunFolder(folder).rounds()[WARM_UP:]
    return {p: statistics.fmean(r["times"][p] for r in records) for p in PHASES}, statistics.fmean(between(stamps))


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
        phases, wall = measure(resolve(apply(tree, [*flat, *map(parse_override, given.overrides)])))
    except UserError as error:
        parser.error(str(error))
    parts = {**phases, "sum of the phases": sum(phases.values()), "wall time": wall}
    rows = [{"phase": what, "milliseconds": 1e3 * s, "of the round": s / wall} for what, s in parts.items()]
    Console().print(table("", {"phase": "", "milliseconds": ".2f", "of the round": ".1%"}, rows))


if __name__ == "__main__":
    main()
