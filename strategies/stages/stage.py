"""Stages, which transform updates before the client sends them and after the server receives them.

Clients apply an experiment's stages in order, the server in reverse order, before admission and the sum. A stage gets
the shared arrays that a client trained, by state name, but no auxiliary arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from meadow.arrays.named import Arrays
from meadow.config.schema import Experiment
from meadow.privacy.releases import NOT_PROTECTED, Quantity

Moves = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class AtClient:
    """The context of `leave`. Arrays must not be written to.

    received: the shared arrays as sent. weights: the weight of each array of the update, 0 if untrained. noise: under
    local DP, maps (received, trained) arrays that learn to releasable ones; the ledger is charged for one call. memory:
    this stage's `Left.memory` of the client's last round; empty before the first.
    """

    client: int
    round: int
    received: Arrays
    weights: Mapping[str, float]
    noise: Callable[[Arrays, Arrays], Arrays] | None = None
    memory: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """What the client sends: arrays by name, without "@". memory: what it stores for its next round."""

    arrays: Arrays
    memory: Arrays = field(default_factory=dict)


@dataclass
class Arrived:
    """The updates of a round at the server.

    updates: by client; each stage changes them. sent: the shared arrays that each client got. sound: whether a client's
    reply with this update would be admitted. faults: by client, why its update cannot be read.
    """

    round: int
    updates: dict[int, Arrays]
    sent: Mapping[int, Arrays]
    sound: Callable[[int, Arrays], bool]
    faults: dict[int, str] = field(default_factory=dict)


class Stage:
    """A transformation of updates. The default does nothing; override the methods that you need."""

    name = "stage"
    sums = False
    """Whether sent updates have the form of the model, so that a node may add them up."""
    keeps = False
    """Whether `leave` returns a memory."""
    plain = False
    """Whether updates with all arrays trained are sent unchanged, and there is no `judge`."""
    before_noise = False
    """Whether it may read updates without noise, with privacy.unit = "client", where the server adds the noise. It must
    then treat each client separately."""

    def leave(self, update: Arrays, at: AtClient) -> Left:
        """Return what the client sends instead of the arrays that it trained."""
        return Left(update)

    def arrive(self, arrived: Arrived) -> None:
        """At the server, `restore` each update; move those that fail to `faults`."""
        for client, update in [*arrived.updates.items()]:
            try:
                arrived.updates[client] = self.restore(update, arrived.sent[client])
            except Exception as error:  # discard only this client's update
                del arrived.updates[client]
                arrived.faults[client] = f'its update is not of the form of the stage "{self.name}": {error!r}'

    def restore(self, update: Arrays, received: Arrays) -> Arrays:
        """At the server, invert `leave` for one client: return the names, shapes and dtypes of `received`."""
        return update

    def judge(self, update: Arrays, received: Arrays) -> str:
        """Return why an update in the form of the model must be rejected, or "". Runs on the node or at the server."""
        return ""

    def combine(self, sent: Arrays, updates: Sequence[Arrays], round_: int) -> Arrays:
        """At the server, compute the next model from the clients' updates, in place of an algorithm that only
        averages. The algorithm computes it unless a stage overrides this."""
        raise NotImplementedError

    def releases(self, experiment: Experiment) -> Sequence[Quantity]:
        """The releases of this stage, and the mechanism that protects them."""
        noised = experiment.privacy.unit in ("example", "local")
        how = "computed only from values that already have noise" if noised else NOT_PROTECTED
        return (Quantity(f'the update in the form of the stage "{self.name}"', how),)


def moves(after: Arrays, before: Arrays) -> Moves:
    """Return after - before in float64, for the names of `after`."""
    return {name: value.astype(np.float64) - before[name].astype(np.float64) for name, value in after.items()}


def moved(before: Arrays, steps: Mapping[str, npt.NDArray[np.float64]]) -> Arrays:
    """Return before + steps, for the names of `steps`, in the dtypes of `before`."""
    return {name: (before[name].astype(np.float64) + step).astype(before[name].dtype) for name, step in steps.items()}
