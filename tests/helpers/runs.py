"""Quick experiments, and a way to run them without a command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from meadow.arrays.folding import fold_for_wire
from meadow.client.answers import Handler, evaluate_client, train_client
from meadow.client.app import app, evaluate, join, train
from meadow.client.context import LocalContext
from meadow.client.loop.training import Trained
from meadow.client.release import PrivateRelease
from meadow.config.schema import Experiment
from meadow.server.run import run_experiment
from meadow.server.writer import EVERY
from meadow.simulation.grid import become_server
from meadow.simulation.inline import InlineGrid
from meadow.simulation.launch import engine
from meadow.strategies.check import load

SAME = ("model_sha256", "personal_sha256", "split_sha256", "metrics")
"""What of a summary is equal on every engine."""
RESUMED = ("status", "rounds", "clients", *SAME)
"""What of a summary is equal whether a run was interrupted or not."""


def small(preset: str, *overrides: str) -> Experiment:
    """A preset cut down to half a second: 3 rounds of one epoch, 8 clients, a small source model."""
    quick = (
        "run.rounds=3", "partition.clients=8", "local.epochs=1", "task.source_samples=200", "task.source_epochs=1"
    )  # fmt: skip
    return load(preset, [*quick, *overrides])


def run_inline(experiment: Experiment, out: Path, resume: bool = False) -> dict[str, Any]:
    """Run on the inline engine; the summary."""
    with engine("inline") as launch:
        return launch(experiment, out, resume)


def run_with(
    client_app: Callable[[Message, Context], Message],
    experiment: Experiment,
    out: Path,
    resume: bool = False,
    checkpoint_every: float = EVERY,
) -> dict[str, Any]:
    """Run on the inline engine with another ClientApp on its node; the summary."""
    become_server()
    return run_experiment(InlineGrid(experiment, out / "state", client_app), experiment, out, resume, checkpoint_every)


def clients_answer(train_one: Handler = train_client, evaluate_one: Handler = evaluate_client) -> ClientApp:
    """A ClientApp whose clients answer by these functions, each by itself and none as part of a block."""
    own = ClientApp(mods=[fold_for_wire])
    own.query()(join)
    own.train()(lambda message, context: train(message, context, train_one))
    own.evaluate()(lambda message, context: evaluate(message, context, evaluate_one))
    return own


def recorded(replies: list[Message]) -> Callable[[Message, Context], Message]:
    """The ClientApp; every reply is put into the list as it leaves the node."""

    def answered(message: Message, context: Context) -> Message:
        replies.append(app(message, context))
        return replies[-1]

    return answered


def _nothing(*_: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Watching:
    """An observer of a node (`meadow.client.context.Observer`) that calls functions where a training begins and ends."""

    begins: Callable[[LocalContext], None] = _nothing
    ends: Callable[[LocalContext, Trained], None] = _nothing

    def trains(self, context: LocalContext, leaves: bool) -> Callable[[Trained], None]:
        self.begins(context)
        return lambda trained: self.ends(context, trained)

    def noises(self, client: int, allowed: PrivateRelease) -> None:
        """Noise is not watched."""
