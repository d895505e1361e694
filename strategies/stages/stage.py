"""What a stage of an update is: what the client does before the update leaves, and what the server does to what
arrived.

An experiment has a list of stages. Clients apply them in order, the server in reverse; admission and the sum stand
between. A stage sees the shared arrays that a client trained, by state name, and never what an algorithm sends beside
them.
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
    """Where a client's half stands. Arrays may not be written to.

    received: the shared arrays as they were sent. weights: what each array of the update counts, 0 where nothing
    trained it. noise: under local DP, of the arrays that learn, (received, trained) -> what may leave; the client's
    ledger is charged for one call. memory: what this stage left of this client in its last round; empty before the
    first.
    """

    client: int
    round: int
    received: Arrays
    weights: Mapping[str, float]
    noise: Callable[[Arrays, Arrays], Arrays] | None = None
    memory: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """What leaves the client: arrays by name, without "@" in a name. memory: what the client stores for its next
    round."""

    arrays: Arrays
    memory: Arrays = field(default_factory=dict)


@dataclass
class Arrived:
    """What has arrived of a round.

    updates: of each client, changed by stage after stage. sent: the shared arrays that each was sent. sound: whether a
    client's reply would be admitted with an update. faults: why an update cannot be read.
    """

    round: int
    updates: dict[int, Arrays]
    sent: Mapping[int, Arrays]
    sound: Callable[[int, Arrays], bool]
    faults: dict[int, str] = field(default_factory=dict)


class Stage:
    """A step on an update's way. This one does nothing; a stage overrides the halves that it has."""

    name = "stage"
    sums = False
    """Whether updates leave in the form of the model, so that a node may add them up; else the server gets each one."""
    keeps = False
    """Whether `leave` has a memory."""
    plain = False
    """Whether an update whose arrays are all trained leaves as it is, and no `judge` has a say."""
    before_noise = False
    """Whether it may read updates that have no noise yet: under privacy.unit = "client", where the noise is the
    server's. What it does there must depend on one client alone."""

    def leave(self, update: Arrays, at: AtClient) -> Left:
        """The client's half: what leaves in the place of the arrays that the client trained."""
        return Left(update)

    def arrive(self, arrived: Arrived) -> None:
        """The server's half, over all updates that have arrived: `restore` of each. One that it cannot is at fault."""
        for client, update in [*arrived.updates.items()]:
            try:
                arrived.updates[client] = self.restore(update, arrived.sent[client])
            except Exception as error:  # whatever a client sends costs that client alone
                del arrived.updates[client]
                arrived.faults[client] = f'its update is not of the form of the stage "{self.name}": {error!r}'

    def restore(self, update: Arrays, received: Arrays) -> Arrays:
        """The server's half for one client: the inverse of `leave`, in the names, shapes and dtypes of `received`."""
        return update

    def judge(self, update: Arrays, received: Arrays) -> str:
        """Why an update in the form of the model may not be added up, or "". Its node asks, or the server."""
        return ""

    def releases(self, experiment: Experiment) -> Sequence[Quantity]:
        """What leaves by this stage, and by which mechanism it is protected."""
        noised = experiment.privacy.unit in ("example", "local")
        how = "computed from nothing but what has its noise already" if noised else NOT_PROTECTED
        return (Quantity(f'the update in the form of the stage "{self.name}"', how),)


def moves(after: Arrays, before: Arrays) -> Moves:
    """after - before in float64, for the names of `after`."""
    return {name: value.astype(np.float64) - before[name].astype(np.float64) for name, value in after.items()}


def moved(before: Arrays, steps: Mapping[str, npt.NDArray[np.float64]]) -> Arrays:
    """before + steps, for the names of `steps`, in the dtypes of `before`."""
    return {name: (before[name].astype(np.float64) + step).astype(before[name].dtype) for name, step in steps.items()}
