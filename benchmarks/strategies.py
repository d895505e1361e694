"""Run strategies on real data and compare them with published figures: one table for each study.

    MEADOW_DATA=... python -m benchmarks.strategies [STUDY ...] [--seeds N] [--out FOLDER]

Every row of a study has the same data, splits and seeds. Runs already in FOLDER are not repeated, so a stopped study can be
continued. Accuracy in percent, mean and standard deviation over the seeds.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from meadow.benchmarks.output import chosen, options, table
from meadow.config.load import load
from meadow.experiments.api import Summary, run_many
from meadow.experiments.compare import Job

FASHION = (
    "task.dataset=FashionMNIST",
    "task.root=$MEADOW_DATA",
    "task.targets=label",
    "task.mean=0.286",
    "task.std=0.353",
)
PERSONAL = {
    "Local": ("local",),
    "FedAvg": ("fedavg",),
    "FedAvg, fine-tuned": ("fedavg",),
    "Ditto": ("ditto",),
    "APFL": ("apfl",),
    "FedPer": ("fedper",),
    "FedRep": ("fedrep",),
    "FedBABU, fine-tuned": ("fedbabu",),
    "FedRoD": ("fedrod",),
}
"""The table of personalised models. "fine-tuned": each client's model after `evaluate.fine_tune_epochs` more at the end."""


@dataclass(frozen=True)
class Study:
    """Methods on one setting. rows: name -> preset and its overrides; published: name -> what its source reports.

    place: "global", on the data set's own test set; "clients", on the clients' own test parts.
    """

    title: str
    place: str
    settings: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    published: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


STUDIES = {
    "label-skew": Study(
        "Fashion-MNIST, 10 clients, Dirichlet .5, all take part, LeNet, E=10, B=64, half the samples, 8 rounds",
        "global",
        (*FASHION, "task.model=lenet", "partition.clients=10", "partition.law=dirichlet-balanced", "partition.alpha=0.5",
         "partition.parts=0.5,0.01,0.49", "run.rounds=8", "local.epochs=10", "local.batch_size=64", "local.lr=0.01",
         "evaluate.every=4", "evaluate.on=global"),
        {"FedAvg": ("fedavg",), "FedProx": ("fedprox", "strategy.mu=0.01"), "SCAFFOLD": ("scaffold",)},
        {"FedAvg": "88.09", "FedProx": "88.15", "SCAFFOLD": "88.44"},
        "Flower niid_bench, 50 rounds",
    ),
    "personal-fashion": Study(
        "Fashion-MNIST, 20 clients, Dirichlet .1, all take part, LeNet, E=1, B=10, 600 training samples a client, 25 rounds",
        "clients",
        (*FASHION, "task.model=lenet", "partition.clients=20", "partition.law=dirichlet-balanced", "partition.alpha=0.1",
         "partition.parts=0.2,0.05,0.75", "run.rounds=25", "local.epochs=1", "local.batch_size=10", "local.lr=0.02",
         "local.momentum=0", "evaluate.every=25", "evaluate.fine_tune_epochs=5"),
        PERSONAL,
        {"FedAvg": "85.85", "Ditto": "97.47", "FedPer": "97.44", "FedRep": "97.56", "FedRoD": "97.52"},
        "PFLlib: 2,250 training samples a client, up to 2,000 rounds, best of the test",
    ),
    "personal-sensors": Study(
        "uci_har, its 21 natural clients, all take part, 1-D CNN, E=1, B=16, 30 rounds",
        "clients",
        ("task.dataset=arrays", "task.root=$MEADOW_DATA/uci_har", "task.targets=y", "task.client=client",
         "task.model=cnn1d", "partition.law=natural", "partition.clients=0", "partition.parts=0.6,0.1,0.3",
         "run.rounds=30", "local.epochs=1", "local.batch_size=16", "local.lr=0.02", "local.momentum=0",
         "evaluate.every=30", "evaluate.fine_tune_epochs=5"),
        PERSONAL,
    ),
    "writers": Study(
        "MNIST by its 539 writers, 54 a round, LeNet, E=2, B=10, 30 rounds",
        "clients",
        ("task.dataset=MNIST", "task.root=$MEADOW_DATA", "task.targets=label", "task.mean=0.131", "task.std=0.308",
         "task.client=MNIST/train-writers.csv:writer", "task.model=lenet", "partition.law=natural",
         "partition.clients=0", "partition.parts=0.6,0.1,0.3", "cohort.size=54", "run.rounds=30", "local.epochs=2",
         "local.batch_size=10", "local.lr=0.01", "local.momentum=0", "evaluate.every=30"),
        {"FedAvg": ("fedavg",), "FedPer": ("fedper",), "FedRep": ("fedrep", "strategy.head_epochs=2")},
    ),
    "sign-flip": Study(
        "Fashion-MNIST, 20 clients, Dirichlet .5 over labels, MLP, 10 rounds, 4 clients send their update times -5",
        "global",
        (*FASHION, "task.model=mlp", "task.hidden=200", "partition.clients=20", "partition.law=dirichlet-class",
         "partition.alpha=0.5", "partition.parts=0.98,0.01,0.01", "run.rounds=10", "local.epochs=1",
         "local.batch_size=32", "local.lr=0.05", "local.momentum=0", "evaluate.on=global",
         "attack.kind=sign-flip", "attack.fraction=0.2", "attack.scale=5"),
        {"FedAvg, without attack": ("fedavg", "attack.kind=none"), "FedAvg": ("fedavg",), "median": ("median",),
         "trimmed mean": ("trimmed-mean",), "Multi-Krum": ("multi-krum", "strategy.byzantine=4")},
        {"FedAvg, without attack": "90.0", "FedAvg": "38.8", "median": "87.5", "trimmed mean": "87.2",
         "Multi-Krum": "89.6"},
        "times -3 on MNIST, one seed, from docs/field-notes.md",
    ),
}  # fmt: skip


def measure(study: Study, seeds: int, folder: Path) -> dict[str, list[Summary]]:
    """Every row's summaries, one a seed."""
    jobs, names = [], []
    for name, (preset, *more) in study.rows.items():
        if name == "FedAvg, fine-tuned":  # the same runs as FedAvg's, scored after fine-tuning
            continue
        for seed in range(seeds):
            experiment = load(preset, [*study.settings, *more, f"run.seed={seed}", f"run.name={preset}"])
            jobs.append(Job(experiment, folder / f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"))
            names.append(name)
    found: dict[str, list[Summary]] = {}
    for name, summary in zip(names, run_many(jobs, resume=True), strict=True):
        found.setdefault(name, []).append(summary)
    return {name: found.get(name) or found["FedAvg"] for name in study.rows}


def scores(study: Study, name: str, summaries: Sequence[Summary], key: str = "mean") -> list[float]:
    """A row's accuracy for each seed; for the clients their "mean" or "worst_decile"."""
    place = "finetuned" if name.endswith("fine-tuned") else study.place
    found = [next(iter(summary.metrics[place].values()))["accuracy"] for summary in summaries]
    return [one[key] for one in found] if study.place == "clients" else found


def study_table(study: Study, found: Mapping[str, Sequence[Summary]]) -> Table:
    """A row for each method."""
    keys = {"clients' mean": "mean", "worst tenth": "worst_decile"}
    if study.place == "global":
        keys = {"global test set": ""}
    rows = [
        {"method": name, **{head: spread(scores(study, name, found[name], key)) for head, key in keys.items()}}
        | ({"published": study.published[name]} if name in study.published else {})
        for name in study.rows
    ]
    columns = {"method": "", **dict.fromkeys(keys, "s"), **({"published": "s"} if study.published else {})}
    made = table(study.title, columns, rows)
    made.caption = study.source and f"published: {study.source}"
    return made


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    """Run the studies that are named, and print their tables."""
    parser = options(__doc__, "STUDY", STUDIES, "keep the runs in this folder")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen(parser, given.names, STUDIES):
            study = STUDIES[name]
            Console().print(study_table(study, measure(study, given.seeds, (given.out or Path(folder)) / name)))


if __name__ == "__main__":
    main()
