"""Compare transfer from printed to handwritten digits with training from scratch, by samples a client (5 to 50).

    python -m benchmarks.transfer [--out transfer.png]

Each of 20 clients trains alone, with the same split for all methods of a seed: from scratch, with the printed digits' trunk
frozen under a new head, and with all layers fine-tuned. Accuracy on the clients' own test samples, mean over clients, over
three seeds.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console

from meadow.benchmarks import strategies
from meadow.benchmarks.output import table
from meadow.benchmarks.strategies import Study, spread
from meadow.experiments.pictures.style import COLOURS, STYLE, to_file

METHODS = {"local": "from scratch", "transfer": "transfer (head)", "finetune": "fine-tuning (all)"}
SIZES = (5, 10, 20, 50)
SEEDS = 3
EACH = 76
"""Samples of each of the 20 clients: 1,527 split evenly."""

Found = dict[tuple[str, int], list[float]]


def measure(folder: Path) -> Found:
    """Accuracy by (method, training samples a client), one a seed."""
    found: Found = {}
    for size in SIZES:
        share = size / EACH
        fixed = (f"partition.parts={share},0.01,{0.99 - share}", "partition.law=iid", "engine.name=inline",
                 "evaluate.every=1000", "evaluate.on=clients")  # fmt: skip
        study = Study("", "clients", fixed, {method: (method,) for method in METHODS})
        for method, summaries in strategies.measure(study, SEEDS, folder / str(size)).items():
            found[method, size] = [s.metrics["clients"]["digit"]["accuracy"]["mean"] for s in summaries]
    return found


def picture(found: Found) -> Figure:
    """The table as curves."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot(
            xlabel="training samples a client",
            ylabel="accuracy (%)",
            xscale="log",
            title="Printed to handwritten digits",
        )
        for i, (method, name) in enumerate(METHODS.items()):
            colour = COLOURS["ink" if method == "local" else f"m{i - 1}"][0]
            means = [100 * statistics.mean(found[method, size]) for size in SIZES]
            spread = [100 * statistics.stdev(found[method, size]) for size in SIZES]
            axes.errorbar(SIZES, means, spread, color=colour, label=name, linestyle="--" if method == "local" else "-")
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False)
    return figure


def main() -> None:
    """Measure, print the table, draw the picture."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("transfer.png"), help="the picture (.png, .svg or .pdf)")
    out: Path = options.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    rows = [
        {"training samples a client": size, **{name: spread(found[method, size]) for method, name in METHODS.items()}}
        for size in SIZES
    ]
    columns = {"training samples a client": "d", **dict.fromkeys(METHODS.values(), "s")}
    Console().print(table("accuracy (%), mean over 20 clients, ± over three seeds", columns, rows))
    to_file(picture(found), out)


if __name__ == "__main__":
    main()
