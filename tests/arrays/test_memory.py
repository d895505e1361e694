"""Data once a machine: what is shared is what was put in, its pages are common, and workers hold no copy of their own."""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.runs import run_inline, small
from meadow.arrays import memory
from meadow.arrays.memory import Segment, common, find, share
from meadow.simulation.launch import engine
from meadow.tasks.data import Data
from meadow.tasks.task import open_task, share_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")


@pytest.fixture(autouse=True)
def _nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_shared", {})


def lies_in_common_memory(address: int) -> bool:
    """Whether what this process has at an address is part of a shared file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split(" ")[0].split("-"))
        if first <= address < last:
            return "meadow-memory" in line
    return False


def child(pipe: Connection, address: str) -> None:
    """Another process: find a piece, answer with what it holds, write to it, and answer again."""
    find(address)
    data: Any = common("data", lambda: None)
    pipe.send((data.x.numpy().copy(), {n: y.numpy().copy() for n, y in data.y.items()}))
    pipe.send((lies_in_common_memory(data.x.data_ptr()), data.x.is_contiguous()))
    data.x.zero_()
    pipe.send(float(data.x.sum()))


def test_another_process_finds_what_is_shared_and_writes_to_its_own() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 7, generator=draw).t()  # not in the order of its memory
    data = Data(x, {"label": torch.arange(7), "value": torch.rand(7, generator=draw)})
    address = share("data", data)
    assert share("data", data) == address
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe()
    other = fresh.Process(target=child, args=(theirs, address))
    other.start()
    assert ours.poll(60)
    found_x, found_y = ours.recv()
    assert found_x.tobytes() == x.contiguous().numpy().tobytes() and found_x.dtype == np.float32
    assert all(np.array_equal(found_y[name], data.y[name].numpy()) for name in data.y)
    assert ours.poll(60) and ours.recv() == (True, True) and ours.poll(60) and ours.recv() == 0.0
    other.join()
    mine: Data = common("data", lambda: data)
    assert mine is not data and torch.equal(mine.x, x) and lies_in_common_memory(mine.x.data_ptr())


def test_what_is_gone_cannot_be_found() -> None:
    addresses = [share(number, torch.full((100,), number)) for number in range(memory.MOST + 1)]
    assert common(0, lambda: "made") == "made"  # the oldest had to go, and its file with it
    memory._shared.clear()
    for address in addresses:
        with pytest.raises(OSError):
            find(address)


def test_an_address_is_not_taken_for_the_piece_that_it_was() -> None:
    """A worker that outlives a run knows addresses of pieces that have gone; their numbers come again."""
    address = share("old", torch.zeros(100))
    old = memory._shared.pop("old").value
    memory._shared["old"] = memory._Shared(old, address)  # as another process has it, whose owner has let it go
    new = Segment()
    assert new.address.path == address
    new.write([("new", torch.ones(100))])
    find(address)
    assert float(common("new", lambda: torch.zeros(1)).sum()) == 100 and float(common("old", lambda: old).sum()) == 0


def test_a_task_from_common_memory_is_the_same_task() -> None:
    experiment = small("fedavg", "partition.clients=5")
    before = open_task(experiment)
    assert len(share_task(experiment)) == 2
    after = open_task(experiment)
    assert after is not before and after is open_task(experiment)
    assert lies_in_common_memory(after.dataset.train.x.data_ptr()) and lies_in_common_memory(
        after.split.order.ctypes.data
    )
    assert (after.dataset.sha256, after.split.sha256) == (before.dataset.sha256, before.split.sha256)
    for client in range(5):
        assert torch.equal(after.client(client).train.x, before.client(client).train.x)


def test_workers_hold_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the data nor of the split; the bits are the inline engine's, who reads them by itself."""
    import meadow.simulation.ray_engine

    class Looking(meadow.simulation.ray_engine.NodeActor):
        """Says where its data lies."""

        def handle(self, message: Any, context: Any, names: list[str], *records: Any) -> Any:
            from meadow.client.node import open_node  # all by value: a worker cannot import this file

            answer = super().handle(message, context, names, *records)
            lines = Path("/proc/self/maps").read_text().splitlines()
            shared = [line.split(" ")[0].split("-") for line in lines if "meadow-memory" in line]
            task = open_node(context).task
            places = (task.dataset.train.x.data_ptr(), task.dataset.test.x.data_ptr(), task.split.order.ctypes.data)
            inside = [any(int(a, 16) <= place < int(b, 16) for a, b in shared) for place in places]
            (tmp_path / f"{context.node_id}").write_text(f"{inside}")
            return answer

    monkeypatch.setattr(meadow.simulation.ray_engine, "NodeActor", Looking)
    experiment = small("fedavg", "partition.clients=20", "cohort.timeout=60")
    with engine("ray", 2) as launch:
        summary = launch(experiment, tmp_path / "ray")
    assert [(tmp_path / node).read_text() for node in ("2", "3")] == ["[True, True, True]"] * 2
    assert lies_in_common_memory(open_task(experiment).dataset.train.x.data_ptr())  # the server's own too
    assert summary["model_sha256"] == run_inline(experiment, tmp_path / "inline")["model_sha256"]


def test_a_worker_that_finds_no_data_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import meadow.simulation.ray_engine

    experiment = small("fedavg", "partition.clients=20", "cohort.timeout=60")
    monkeypatch.setattr(meadow.simulation.ray_engine, "share_task", lambda experiment: ["/proc/self/fd/9999"])
    with engine("ray", 2) as launch:
        summary = launch(experiment, tmp_path / "ray")
    assert summary["model_sha256"] == run_inline(experiment, tmp_path / "inline")["model_sha256"]
