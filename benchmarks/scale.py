"""Measure what clients cost besides training: start-up, empty clients, personal state, uneven sizes, large populations.

    python -m benchmarks.scale [--quick] [--out FILE.csv] [part ...]

Parts: start, empty, state, uneven, population. Each measurement is one run on Ray with two workers, in a fresh process.
Seconds for a round are the median without the first round. Memory is the peak of the server's resident memory, and of the
workers' unique memory (USS, without what they share), sampled five times a second. `--quick` skips populations above 10^4.
`--out` appends the figures to a file, with machine and versions.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from meadow.benchmarks.output import about, chosen, options, table, write
from meadow.config.load import resolve, to_toml
from meadow.config.schema import Experiment, Task
from meadow.runtime.identity import ROOT
from meadow.runtime.seeds import numpy_generator
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult, FitResult
from meadow.tasks.data import Part, Raw

WORKERS = 2
SAMPLES = 4
"""Samples of each client; two are for training."""
FEATURES = 8
HIDDEN = 496
"""Width of the two hidden layers, for a model of 1 MB."""
STATE = 5 * 2**20


NOTHING = FitResult(0, {})
"""The training report of a client that did not train."""


class Empty(ClientAlgorithm):
    """A client that sends back what it received."""

    def train(self, context: ClientContext) -> ClientResult:
        return ClientResult(context.received, NOTHING)


class Remembering(ClientAlgorithm):
    """An empty client with 5 MB of personal state, which is read and written in each round."""

    def train(self, context: ClientContext) -> ClientResult:
        state = context.memory or {"own": {"state": np.ones(STATE // 4, np.float32)}}
        return ClientResult(context.received, NOTHING, memory=state)


empty = Algorithm(FedAvg, Empty())
remembering = Algorithm(FedAvg, Remembering())


def population(task: Task) -> Raw:
    """Four samples of eight features for each of `task.source_samples` clients, and 100 test samples."""
    draw = numpy_generator(0, "benchmark")
    parts = []
    for count in (SAMPLES * task.source_samples, 100):
        x = torch.from_numpy(draw.random((count, FEATURES), dtype=np.float32))
        parts.append(Part(x, {"label": draw.integers(0, 2, count)}))
    return Raw("population", parts[0], parts[1], {"label": "class 2"})


def uneven(task: Task) -> Raw:
    """Samples of 100 clients with log-normal sizes: sigma 1.5, median 40, at least 8."""
    draw = numpy_generator(0, "benchmark", "uneven")
    sizes = np.maximum(8, np.exp(draw.normal(np.log(40), 1.5, 100))).astype(np.int64)
    owner = np.repeat(np.arange(100), sizes)
    x = torch.from_numpy(draw.random((len(owner), 784), dtype=np.float32))
    train = Part(x, {"label": draw.integers(0, 10, len(owner))}, client=owner.astype(str))
    return Raw("uneven", train, Part(x[:100], {"label": draw.integers(0, 10, 100)}), {"label": "class 10"})


def experiment(clients: int, cohort: int, rounds: int, strategy: str, hidden: int) -> Experiment:
    """A run of `population`; `strategy` is one of those above."""
    return resolve(
        {
            "run": {"rounds": rounds},
            "task": {
                "dataset": "meadow.benchmarks.scale:population",
                "targets": ["label"],
                "source_samples": max(clients, 100),
                "model": "mlp",
                "hidden": hidden,
            },
            "partition": {"law": "iid", "clients": clients, "min_size": SAMPLES},
            "cohort": {"size": cohort},
            "strategy": {"name": f"meadow.benchmarks.scale:{strategy}"},
            "evaluate": {"on": ["clients"], "every": 10**6, "sample": min(100, clients)},
            "engine": {"name": "ray", "workers": WORKERS, "state_memory": 12_000},
        }
    )


def lopsided(rounds: int) -> Experiment:
    """A run of `uneven`: an MLP of 784-200-200-10, batches of 20, one epoch, all clients in each round."""
    return resolve(
        {
            "run": {"rounds": rounds},
            "task": {"dataset": "meadow.benchmarks.scale:uneven", "targets": ["label"], "model": "mlp", "hidden": 200},
            "partition": {"law": "natural", "clients": 0, "min_size": 4},
            "local": {"epochs": 1, "batch_size": 20},
            "evaluate": {"on": ["clients"], "every": 10**6},
            "engine": {"name": "ray", "workers": WORKERS},
        }
    )


@dataclass(frozen=True)
class Measured:
    """One run: its round records, its peak memory in bytes (server, workers together), and seconds to its first round."""

    rounds: list[dict[str, Any]]
    server: int
    workers: int
    start: float

    @property
    def seconds(self) -> float:
        """Seconds for a round: the median without the first."""
        return statistics.median([float(r["seconds"]) for r in self.rounds[1:] or self.rounds])


def measure(settings: Experiment, memory: bool = True) -> Measured:
    """Run `meadow run` on the experiment in its own process. Each sample of its `memory` delays it by some milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "e.toml").write_text(to_toml(settings))
        out = place / "run"
        command = [sys.executable, "-m", "meadow", "run", str(place / "e.toml"), "--quiet", "--out", str(out)]
        began = time.time()
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        peaks = [0, 0]
        watch = threading.Thread(target=_watch, args=(process, peaks))
        if memory:
            watch.start()
        if process.wait() != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        if memory:
            watch.join()
        records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        oldest = min((out / "checkpoints").glob("*.json"))
        # A checkpoint is written right after its round.
        ended = sum(r["seconds"] for r in records if r["round"] <= int(oldest.stem.removeprefix("round-")))
        return Measured(records, peaks[0], peaks[1], float(oldest.stat().st_mtime - ended - began))


def _watch(process: subprocess.Popen[bytes], peaks: list[int]) -> None:
    """Record the peaks of the server's resident memory and of the workers' unique memory until the process ends."""
    while process.poll() is None:
        with suppress(OSError):
            peaks[0] = max(peaks[0], _memory(process.pid, "Rss:"))
            peaks[1] = max(peaks[1], sum(_memory(w, "Private_") for w in _workers(process.pid)))
        time.sleep(0.2)


def _workers(server: int) -> list[int]:
    """The process ids of Ray's workers started by the server, from /proc (Linux)."""
    parents: dict[int, int] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with suppress(OSError):
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    below = [server]
    for found in below:
        below += [child for child, parent in parents.items() if parent == found]
    return [p for p in below if "ray::NodeActor" in Path(f"/proc/{p}/cmdline").read_text()]


def _memory(process: int, kind: str) -> int:
    """A process's memory in bytes, over the lines of /proc's smaps_rollup that begin with `kind`."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(kind))


Row = dict[str, Any]


def start() -> Iterator[Row]:
    """From `meadow run` to the first round."""
    found = [measure(resolve({"run": {"rounds": 1}, "engine": {"name": "ray", "workers": WORKERS}})) for _ in range(3)]
    yield {"what": "from `meadow run` to the first round", "seconds": statistics.median(m.start for m in found)}


def empties() -> Iterator[Row]:
    """Rounds of empty clients of a 1 MB model."""
    for clients in (100, 1000):
        found = measure(experiment(clients, clients, 8, "empty", HIDDEN))
        yield _row("empty clients, 1 MB model", clients, clients, found)


def states() -> Iterator[Row]:
    """The time that 5 MB of personal state add to a round."""
    clients = 200
    without = measure(experiment(clients, clients, 16, "empty", 8))
    with_state = measure(experiment(clients, clients, 16, "remembering", 8))
    yield _row("empty clients, small model", clients, clients, without)
    each = (with_state.seconds - without.seconds) / clients
    yield _row("the same with 5 MB of state each", clients, clients, with_state) | {"ms a client": 1000 * each}


def lopsidedness() -> Iterator[Row]:
    """Idle share of the workers with log-normal sizes."""
    found = measure(lopsided(10), memory=False)
    idle = statistics.median(r["idle"] for r in found.rounds[1:])
    yield _row("log-normal sizes, sigma 1.5: MLP", 100, 100, found) | {"idle": idle}


def populations(most: int) -> Iterator[Row]:
    """Cohorts of 1,000 from populations of 1,000, 10,000, ... up to `most` clients."""
    clients = 1000
    while clients <= most:
        yield _row("population, empty clients", clients, 1000, measure(experiment(clients, 1000, 4, "empty", 64)))
        clients *= 10


def _row(what: str, clients: int, cohort: int, found: Measured) -> Row:
    memory = {"server MB": found.server / 2**20, "workers MB": found.workers / 2**20} if found.server else {}
    return {"what": what, "population": clients, "cohort": cohort, "seconds": found.seconds, **memory}


COLUMNS = {"what": "", "population": ",d", "cohort": ",d", "seconds": ".3f", "ms a client": ".2f", "idle": ".1%",
           "server MB": ".0f", "workers MB": ".0f"}  # fmt: skip


def main() -> None:
    """Measure, print, and append to the CSV file."""
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "start": start,
        "empty": empties,
        "state": states,
        "uneven": lopsidedness,
        "population": lambda: populations(10**4 if given.quick else 10**6),
    }
    parser = options(__doc__, "part", parts, "the CSV file to append to")
    parser.add_argument("--quick", action="store_true", help="no population above 10^4")
    given = parser.parse_args()
    rows = [row for name in chosen(parser, given.names, parts) for row in parts[name]()]
    Console(width=140).print(table("What clients cost besides training", COLUMNS, rows))
    if given.out:
        where = {**about(), "load": round(os.getloadavg()[0], 1)}
        write(given.out, [{**dict.fromkeys(COLUMNS, ""), **row, **where} for row in rows])


if __name__ == "__main__":
    main()
