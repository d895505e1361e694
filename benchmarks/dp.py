"""Compare the time of DP-SGD (by way to compute per-example gradients) with training without privacy and with Opacus.

    python -m benchmarks.dp [--out FILE.csv] [--repeats N] [workload ...]

The clients of `benchmarks/workloads.py` train one after another, in this process, on one thread: 60 samples and three steps
with an expected batch of 20 (Poisson rate 1/3), noise multiplier 1. The sides alternate; a figure is the median, without the
first turn, of the thread's processor time, which other processes on the machine hardly change. "Meadow" is
`meadow.client.loop.training.train` as a node calls it; "make_private" is Opacus as in its tutorial, called for each client.
"""

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from meadow.benchmarks.output import about, chosen, options, table, write
from meadow.benchmarks.workloads import BATCH, LR, SAMPLES, WORKLOADS, settings, train_plainly
from meadow.client.loop.training import Training, train
from meadow.config.load import apply, read_tree, resolve
from meadow.privacy.dpsgd.choose import GradSample, chosen_mode
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.noise import Stream
from meadow.runtime.module_cache import enable_cache
from meadow.runtime.seeds import one_thread
from meadow.tasks.numerics import kernels
from meadow.tasks.task import open_task

_RATE, _STEPS = BATCH / SAMPLES, SAMPLES // BATCH
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Makes the C library keep freed memory, as in a worker: otherwise each reuse costs page faults."""

Sides = dict[str, Callable[[int], object]]
"""Name -> function that trains a client once; its argument is a turn's number."""


def sides(name: str) -> Sides:
    """The ways to train a client of a workload."""
    work = WORKLOADS[name]
    experiment = resolve(apply(read_tree("fedavg"), settings(name, 1).items()))
    task = open_task(experiment)
    model, data = enable_cache(task.new_model()), task.client(0).train
    network = work.network()
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    x, y = work.client(0)

    def plain(turn: int) -> None:
        train_plainly(network, optimizer, x, y, torch.Generator().manual_seed(turn))

    def meadow(turn: int) -> None:
        with kernels(model):
            train(model, Training(data, turn, 0, experiment.local), task, experiment)

    def private(mode: GradSample) -> Callable[[int], object]:
        mechanism = Mechanism(_RATE, 1.0, 1.0, BATCH, _STEPS)

        def side(turn: int) -> None:
            permit = Permit(mechanism, Stream(2 * turn), Stream(2 * turn + 1), mode)
            with kernels(model):
                train(model, Training(data, turn, 0, experiment.local, permit=permit), task, experiment)

        return side

    def opacus(turn: int) -> None:
        own = work.network()
        loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
        made, stepper, batches = PrivacyEngine().make_private(
            module=own,
            optimizer=torch.optim.SGD(own.parameters(), lr=LR),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(turn),
        )
        for some, classes in batches:
            stepper.zero_grad()
            if len(some):
                F.cross_entropy(made(some), classes).backward()  # type: ignore[no-untyped-call]
            stepper.step()

    chosen = chosen_mode(task.new_model())
    opacus_modes: list[GradSample] = ["hooks"]
    modes = [chosen, *(mode for mode in opacus_modes if mode != chosen)]
    found: Sides = {"plain PyTorch loop": plain, "Meadow, no privacy": meadow}
    for mode in modes:
        title = f"Meadow, DP ({mode})"
        try:
            private(mode)(0)
        except Exception as error:
            print(f"{work.title}: {title} is left out: {error}", file=sys.stderr)
            continue
        found[title] = private(mode)
    try:
        opacus(0)
        found["Opacus, make_private"] = opacus
    except Exception as error:
        print(f"{work.title}: Opacus by itself is left out: {error}".splitlines()[0], file=sys.stderr)
    return found


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each side of a workload."""
    found: dict[str, list[float]] = {}
    every = sides(name)
    for turn in range(1, repeats + 2):
        for side, once in every.items():
            once(2 * turn)  # warms the caches, like a worker that trains client after client
            began = time.thread_time()
            once(2 * turn + 1)
            if turn > 1:
                found.setdefault(side, []).append(time.thread_time() - began)
    base = statistics.median(found["Meadow, no privacy"])
    return [
        {
            "workload": name,
            "side": side,
            "turns": len(times),
            "milliseconds": round(1000 * statistics.median(times), 3),
            "fastest": round(1000 * min(times), 3),
            "of_no_privacy": round(statistics.median(times) / base, 2),
            "of_plain": round(statistics.median(times) / statistics.median(found["plain PyTorch loop"]), 2),
        }
        for side, times in found.items()
    ]


COLUMNS = {
    "workload": "",
    "side": "",
    "milliseconds": ".2f",
    "fastest": ".2f",
    "of_no_privacy": ".2f",
    "of_plain": ".2f",
}


def main() -> None:
    """Measure, print, write."""
    parser = options(__doc__, "workload", WORKLOADS, "a CSV file to write; its rows of other workloads stay")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side (7)")
    given = parser.parse_args()
    names = chosen(parser, given.names, WORKLOADS)
    if any(os.environ.get(key) != value for key, value in _MEMORY.items()):  # read when a process begins
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.dp", *sys.argv[1:]], os.environ | _MEMORY)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [line for name in names for line in measure(name, given.repeats)]
    titled = [line | {"workload": WORKLOADS[line["workload"]].title} for line in lines]
    Console(width=120).print(table("A client's round, three steps: medians of processor time", COLUMNS, titled))
    if given.out:
        write(given.out, [line | about() for line in lines], replacing="workload")


if __name__ == "__main__":
    main()
