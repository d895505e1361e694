"""Quick experiments, and a way to run them without a command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meadow.config.schema import Experiment
from meadow.simulation.launch import engine
from meadow.strategies.check import load
from meadow.strategies.wire.packing import NodeReply

SAME = ("model_sha256", "personal_sha256", "split_sha256", "metrics")
"""What of a summary is equal on every engine."""
RESUMED = ("status", "rounds", "clients", *SAME)
"""What of a summary is equal whether a run was interrupted or not."""


def small(preset: str, *overrides: str) -> Experiment:
    """A preset cut down to a second: 3 rounds, 8 clients, a small source model."""
    quick = ("run.rounds=3", "partition.clients=8", "task.source_samples=200", "task.source_epochs=1")
    return load(preset, [*quick, *overrides])


def run_inline(experiment: Experiment, out: Path, resume: bool = False) -> dict[str, Any]:
    """Run on the inline engine; the summary."""
    with engine("inline") as launch:
        return launch(experiment, out, resume)


def clients_answer(monkeypatch: pytest.MonkeyPatch, how: Callable[..., Any]) -> None:
    """Let each client answer to training by `how`, in the place of `meadow.client.answers.train_client`; none as part of a
    block."""
    monkeypatch.setattr(
        "meadow.client.app.train_blocks", lambda node, requests, blocks: (NodeReply([]), list(requests))
    )
    monkeypatch.setattr("meadow.client.app.train_client", how)
