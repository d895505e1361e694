"""Measure the cost of data on this machine: splitting samples among clients, opening a client, preparing its batches.

    python -m benchmarks.data [--quick]

Each split is measured in its own process; the table has the growth of that process's peak memory during the split.
`--quick` splits 10^5 samples among 10^3 clients instead of 10^6 among 10^4 and 10^7 among 10^5.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from meadow.benchmarks.output import table
from meadow.config.schema import Partition
from meadow.config.schema import Task as Settings
from meadow.runtime.seeds import numpy_generator, torch_generator, torch_seeded
from meadow.tasks.data import Data, Target, make_dataset
from meadow.tasks.pipeline import Pipeline, image_pipeline
from meadow.tasks.splits.holds import held
from meadow.tasks.splits.partition import make_split
from meadow.tasks.splits.partitioners import PARTITIONERS
from meadow.tasks.task import Task

LABELS = 10
ALPHA = 10.0  # with a lower value no split by quantity gives each of so many clients three samples
SIZES = ((1_000_000, 10_000), (10_000_000, 100_000))
QUICK = ((100_000, 1_000),)


def split_cost(law: str, samples: int, clients: int) -> tuple[float, int]:
    """The cost of one split: wall time in seconds, growth of the process's peak memory in bytes."""
    labels = numpy_generator(0, "labels").integers(0, LABELS, samples)
    owner = numpy_generator(0, "owner").integers(0, clients, samples) if law == "natural" else None
    partition = Partition.model_validate({"law": law, "clients": clients, "alpha": ALPHA, "min_size": 3})
    before, began = _peak(), time.perf_counter()
    make_split(partition, labels, 0, owner)
    return time.perf_counter() - began, _peak() - before


def splits(sizes: Sequence[tuple[int, int]]) -> Table:
    """Time and memory of every law for each (samples, clients)."""
    rows = []
    fresh = multiprocessing.get_context("spawn")
    for samples, clients in sizes:
        for law in (*PARTITIONERS, "natural"):
            with fresh.Pool(1) as pool:
                seconds, size = pool.apply(split_cost, (law, samples, clients))
            rows.append({"law": law, "samples": samples, "clients": clients, "seconds": seconds, "peak MB": size / 1e6,
                         "bytes a sample": size / samples})  # fmt: skip
    forms = {"law": "", "samples": ",d", "clients": ",d", "seconds": ".2f", "peak MB": ".0f", "bytes a sample": ".0f"}
    return table(f"Splits of {LABELS} labels, alpha = {ALPHA:g}", forms, rows)


def opening(sizes: Sequence[tuple[int, int]]) -> Table:
    """The time to open a client of array data for the first time: three parts, two targets."""
    rows = []
    for what, shape, dtype in (("28x28 uint8", (1, 28, 28), torch.uint8), ("64 float32", (64,), torch.float32)):
        for samples, clients in sizes:
            for law in ("iid", "feature-shift"):
                task = _task(law, torch.zeros((samples, *shape), dtype=dtype), clients)
                some = numpy_generator(0, "some").choice(clients, min(clients, 1000), replace=False)
                times = [_seconds(task, client) for client in some.tolist()]
                middle, worst = np.quantile(times, [0.5, 0.99]) * 1000
                rows.append({"inputs": what, "law": law, "samples": samples, "clients": clients, "median ms": middle,
                             "99th percentile ms": worst})  # fmt: skip
    forms = {"inputs": "", "law": "", "samples": ",d", "clients": ",d", "median ms": ".3f", "99th percentile ms": ".3f"}
    return table("Opening a client", forms, rows)


PIPELINES = {"scaled": (), "flip": ("flip",), "crop, flip": ("crop 4", "flip"), "jitter": ("jitter 0.2",)}


def pipelines(samples: int) -> Table:
    """Samples a second in batches of 64, gathered, prepared and augmented as in the training loop."""
    found: dict[tuple[str, str], float] = {}
    tokens = torch.ones((samples, 128), dtype=torch.int64)
    for what, x in (("128 tokens", tokens), ("9x128 float32", torch.zeros(samples, 9, 128))):
        found[what, "as they are"] = _rate(Data(x, {}), None)
    for side, channels, n in ((28, 1, samples), (224, 3, min(samples, 256))):
        images = Data(torch.zeros((n, channels, side, side), dtype=torch.uint8), {})
        dataset = make_dataset("images", images, images, (), images=True)
        for name, augment in PIPELINES.items():
            prepare = image_pipeline(dataset, Settings(augment=augment, mean=(0.5,), std=(0.25,)))
            found[f"{channels}x{side}x{side} uint8", name] = _rate(images, prepare)
    rows = [{"samples": what, "pipeline": name, "samples a second": rate} for (what, name), rate in found.items()]
    return table(
        "Batches of 64, as training takes them", {"samples": "", "pipeline": "", "samples a second": ",.0f"}, rows
    )


def _rate(data: Data, prepare: Pipeline | None) -> float:
    """Samples a second over half a second of batches in random order."""
    order = torch.randperm(len(data), generator=torch_generator(0, "order"))
    seen, began = -1, 0.0
    with torch_seeded(0, "benchmark"):
        while seen < 0 or (took := time.perf_counter() - began) < 0.5:
            batch = data.take(order[max(seen, 0) % len(data) :][:64])
            if prepare is not None:
                prepare(batch.x, True)
            if seen < 0:  # the first batch warms up
                seen, began = 0, time.perf_counter()
            else:
                seen += len(batch)
    return seen / took


def _task(law: str, x: torch.Tensor, clients: int) -> Task:
    n = len(x)
    y = {"digit": torch.arange(n) % LABELS, "slant": torch.zeros(n)}
    targets = (Target("digit", "class", LABELS), Target("slant", "value", 1))
    data = Data(x, y)
    dataset = make_dataset("arrays", data, data.take(torch.arange(1)), targets)
    partition = Partition.model_validate({"law": law, "clients": clients})
    split = make_split(partition, y["digit"].numpy(), 0)
    noise = partition.noise if law == "feature-shift" else 0.0
    holders = held((), ("digit", "slant"), clients, 0)
    return Task(dataset, split, targets, (1.0, 1.0), Settings(), 0, holders, noise)


def _seconds(task: Task, client: int) -> float:
    began = time.perf_counter()
    task.client(client)
    return time.perf_counter() - began


def _peak() -> int:
    """The peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str]) -> None:
    """Print every table."""
    torch.set_num_threads(1)
    quick, console = "--quick" in arguments, Console(width=120)
    console.print(splits(QUICK if quick else SIZES))
    console.print(opening(QUICK if quick else SIZES[:1]))
    console.print(pipelines(2_000 if quick else 10_000))


if __name__ == "__main__":
    main(sys.argv[1:])
