"""What tests share: quick experiments, and a way to run them without a command line."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from meadow.simulation.launch import engine
from meadow.strategies.wire.packing import NodeReply

from meadow.config.load import load
from meadow.config.schema import Experiment
from meadow.runtime.seeds import one_thread

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The bits depend on the number of threads: all tests use one, as the engines do."""
    with one_thread():
        yield


def small(preset: str, *overrides: str) -> Experiment:
    """A preset cut down to a second: 3 rounds, 8 clients, a small source model."""
    quick = ("run.rounds=3", "partition.clients=8", "task.source_samples=200", "task.source_epochs=1")
    return load(preset, [*quick, *overrides])


def run_inline(experiment: Experiment, out: Path, resume: bool = False) -> dict[str, Any]:
    """Run on the inline engine; the summary."""
    with engine("inline") as launch:
        return launch(experiment, out, resume)


def clients_answer(monkeypatch: pytest.MonkeyPatch, how: Callable[..., Any]) -> None:
    """Let each client answer to training by `how`, in the place of `meadow.client.node.train_client`; none as part of a
    block."""
    monkeypatch.setattr(
        "meadow.client.app.train_blocks", lambda node, requests, blocks: (NodeReply([]), list(requests))
    )
    monkeypatch.setattr("meadow.client.app.train_client", how)
