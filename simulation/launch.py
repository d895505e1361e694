"""Launches the same ServerApp and ClientApp on the engine that the experiment names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from meadow.arrays.files import locked
from meadow.client.trainers.choose import check_device
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.server.app import app
from meadow.server.folder import RunFolder, check_folder
from meadow.simulation.grid import LocalGrid, become_server, server_context
from meadow.simulation.inline import InlineGrid
from meadow.tasks.task import open_task

SUPERNODES = 4


class Launch(Protocol):
    """Runs one experiment in the folder `out` and returns its summary."""

    def __call__(self, experiment: Experiment, out: Path, resume: bool = False) -> dict[str, Any]: ...


@contextmanager
def engine(name: str, workers: int = 0, threads: int = 1, address: str = "") -> Iterator[Launch]:
    """Start an engine: `with engine("ray") as launch: launch(experiment, out)`, any number of times.

    name: inline, ray or processes. workers: Ray actors or SuperNodes; 0: one actor per core, or 4 SuperNodes. address: a
    Ray cluster to join. Everything that was started is stopped at the end, whatever happens.
    """
    if name == "inline":
        if workers > 1:
            raise UserError(f"engine.workers = {workers}: the inline engine has only one process; use --engine ray")
        yield lambda experiment, out, resume=False: _run_local(
            InlineGrid(experiment, out / "state"), experiment, out, resume
        )
    elif name == "ray":
        from meadow.simulation.ray_engine import ray_grid, ray_workers  # here, because Ray takes a second to import

        with ray_workers(workers, threads, address) as pool:
            yield lambda experiment, out, resume=False: _run_local(
                ray_grid(experiment, out / "state", pool), experiment, out, resume
            )
    else:
        from meadow.simulation.processes import run_processes

        def deploy(experiment: Experiment, out: Path, resume: bool = False) -> dict[str, Any]:
            check_folder(out, experiment, resume)
            with locked(out):  # as below: the server, another process, will lock it
                pass
            open_task(experiment)  # so that faulty input is reported here and not in another process's log
            run_processes(experiment, out, resume, min(workers or SUPERNODES, experiment.partition.clients))
            return _summary(out)

        yield deploy


def _run_local(grid: LocalGrid, experiment: Experiment, out: Path, resume: bool) -> dict[str, Any]:
    check_device(experiment)
    check_folder(out, experiment, resume)
    become_server()
    threads = torch.get_num_threads()
    try:
        grid.open()
        app(grid, server_context(experiment, out, resume))
    finally:
        torch.set_num_threads(threads)
    return _summary(out)


def _summary(out: Path) -> dict[str, Any]:
    summary = RunFolder(out).summary()
    if summary is None:
        raise RuntimeError(f"the run ended without a summary in {out}")
    return summary
