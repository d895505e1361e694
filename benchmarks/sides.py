"""Run a workload of `benchmarks/workloads.py` on one engine; `benchmarks.engines` calls it.

    python -m benchmarks.sides ENGINE WORKLOAD

Its last line is a JSON list with the seconds of the rounds after the warm-up.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.utils import parameters_to_vector

from meadow.benchmarks.workloads import CLIENTS, LR, SAMPLES, WORKLOADS, settings, train_plainly
from meadow.simulation.children import free_port

PROCESSES = 2
WARM_UP = 2


@dataclass(frozen=True)
class Side:
    """An engine: its title in the table, and a function that runs a workload and returns its rounds' seconds."""

    title: str
    run: Callable[[str, int], list[float]]


def plain(name: str, rounds: int) -> list[float]:
    """Plain PyTorch in two processes, each with half of the clients' samples, one model and one optimiser.

    Each process loads the global model in place and sums the updates of its clients.
    """
    fresh = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for first in range(PROCESSES):
        here, there = fresh.Pipe()
        workers.append(fresh.Process(target=_plain_worker, args=(there, name, range(first, CLIENTS, PROCESSES))))
        workers[-1].start()
        pipes.append(here)
    vector = parameters_to_vector(WORKLOADS[name].network().parameters()).detach().numpy()
    seconds = []
    for _ in range(WARM_UP + rounds):
        began = time.perf_counter()
        for pipe in pipes:
            pipe.send_bytes(vector.tobytes())
        sums = [torch.frombuffer(bytearray(pipe.recv_bytes()), dtype=torch.float32) for pipe in pipes]
        vector = (torch.stack(sums).sum(0) / (CLIENTS * SAMPLES)).numpy()
        seconds.append(time.perf_counter() - began)
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.close()
        worker.join()
    return seconds[WARM_UP:]


def _plain_worker(pipe: Connection, name: str, clients: range) -> None:
    torch.set_num_threads(1)
    work = WORKLOADS[name]
    network = work.network()
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LR)
    data = [work.client(number) for number in clients]
    generator = torch.Generator().manual_seed(clients.start)
    while True:
        try:
            start = torch.frombuffer(bytearray(pipe.recv_bytes()), dtype=torch.float32)
        except EOFError:
            return
        total = torch.zeros_like(start)
        for x, y in data:
            with torch.no_grad():
                at = 0
                for p in parameters:
                    p.copy_(start[at : at + p.numel()].view_as(p))
                    at += p.numel()
            train_plainly(network, optimizer, x, y, generator)
            with torch.no_grad():
                total.add_(parameters_to_vector(parameters), alpha=len(x))
        pipe.send_bytes(total.numpy().tobytes())


@contextlib.contextmanager
def stamped() -> Iterator[list[float]]:
    """The times at which a run in this block hands each round's record and checkpoint to the writer."""
    from meadow.server.writer import Writer

    stamps: list[float] = []
    give = Writer.round_done

    def noted(self: Writer, *given: Any) -> None:
        give(self, *given)
        stamps.append(time.perf_counter())

    with mock.patch.object(Writer, "round_done", noted):
        yield stamps


def meadow(name: str, rounds: int, exact: bool = True) -> list[float]:
    """`meadow run` on Ray."""
    from meadow.experiments import api

    engine = {"engine.name": "ray", "engine.workers": PROCESSES, "engine.threads": 1, "engine.exact": exact}
    overrides: dict[str, Any] = settings(name, WARM_UP + rounds + 1) | engine
    with tempfile.TemporaryDirectory() as folder, stamped() as stamps:
        api.run("fedavg", out=Path(folder) / "run", **overrides)
    return between(stamps[:-1])


def flower(name: str, rounds: int) -> list[float]:
    """Flower's own Ray engine, one client a call, two workers (`benchmarks/flower_app.py`)."""
    from flwr.simulation import run_simulation

    from meadow.benchmarks import flower_app

    os.environ |= {flower_app.WORKLOAD: name, flower_app.ROUNDS: str(WARM_UP + rounds), "FLWR_TELEMETRY_ENABLED": "0"}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONPATH"] = paths
    with contextlib.redirect_stdout(sys.stderr):
        run_simulation(
            flower_app.server_app,
            flower_app.client_app,
            CLIENTS,
            backend_config={
                "init_args": {"num_cpus": PROCESSES, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 0},
            },
        )
    return between(flower_app.stamps)


def pfl(name: str, rounds: int) -> list[float]:
    """pfl-research, two processes that it sums over by torch.distributed (`benchmarks/pfl_app.py`)."""
    try:
        metadata.version("pfl")
    except metadata.PackageNotFoundError:
        sys.exit("pip install pfl (in an environment of its own if it does not fit this one: then --pfl ITS_PYTHON)")
    for _ in range(3):  # another process may take a port between the choice and the start
        if (stamps := _pfl_workers(name, rounds)) is not None:
            return between(stamps)
    sys.exit("pfl-research failed")


def _pfl_workers(name: str, rounds: int) -> list[float] | None:
    with free_port() as first, free_port() as second:
        addresses = f"127.0.0.1:{first},127.0.0.1:{second}"
        command = [sys.executable, "-m", "benchmarks.pfl_app", name, str(WARM_UP + rounds)]
        workers = [
            subprocess.Popen(
                command,
                env=os.environ | {"PFL_WORKER_RANK": str(rank), "PFL_WORKER_ADDRESSES": addresses},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(PROCESSES)
        ]
        output = workers[0].communicate()[0]
        ended = [worker.wait() for worker in workers]
    stamps: list[float] | None = None if any(ended) else json.loads(output.strip().splitlines()[-1])
    return stamps


def between(stamps: Sequence[float]) -> list[float]:
    """The seconds between the stamps, without those of the warm-up."""
    return [after - before for before, after in pairwise(stamps)][WARM_UP - 1 :]


SIDES = {
    "plain": Side("plain PyTorch loop, 2 processes", plain),
    "meadow": Side("Meadow", meadow),
    "meadow-fast": Side("Meadow, engine.exact = false", functools.partial(meadow, exact=False)),
    "flower": Side("Flower's own Ray engine", flower),
    "pfl": Side("pfl-research, 2 processes", pfl),
}


def main() -> None:
    """One engine, one workload."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # By default Ray's workers give way to all other processes, which the plain loop's do not.
    os.environ.update(RAY_worker_niceness="0")
    torch.set_num_threads(1)
    side, name = sys.argv[1:]
    print(json.dumps(SIDES[side].run(name, WORKLOADS[name].rounds)))


if __name__ == "__main__":
    main()
