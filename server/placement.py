"""Where training happens, as far as a round depends on it: at each client, or in one place where all data has moved."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from meadow.server.cohorts import Call
from meadow.strategies.protocol import steps_of

from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.tasks.task import Task

Ints = npt.NDArray[np.int64]


class AtClients:
    """Federated, or each client alone: a client trains on its own data, and evaluates what it receives beside that."""

    def __init__(self, experiment: Experiment, task: Task) -> None:
        self._experiment, self._task = experiment, task
        self._every = experiment.evaluate.every
        self._told = "clients" in experiment.evaluate.on and allowed(experiment, "metrics")

    def samples(self, clients: Sequence[int], declared: Ints) -> dict[int, int]:
        """The training samples that each may weigh at most."""
        return {client: int(declared[client]) for client in clients}

    def work(self, called: Call, sizes: Ints) -> dict[int, float] | None:
        """What each client's training is expected to take, in any unit; None if it cannot go elsewhere anyway. It grows with
        the steps; one more stands for all that does not."""
        local = self._experiment.local
        return {c: 1.0 + called.work.get(c, 1.0) * steps_of(local, max(1, int(sizes[c]))) for c in called.trained}

    def evaluates_received(self, round_: int) -> bool:
        """Whether the round's clients evaluate the model that they receive, which is that of the round before."""
        return self._told and (round_ - 1) % self._every == 0

    def evaluates_after(self, round_: int) -> bool:
        """Whether all clients are asked to evaluate the round's model once it is made."""
        return False

    def traffic(self, down: int, up: int) -> dict[str, int]:
        """Bytes of arrays that travelled to the clients and from them, as if each were reached by itself."""
        return {"bytes_down": down, "bytes_up": up}

    def never_sampled(self, sampled: Collection[int]) -> int:
        """How many clients have never been in a cohort."""
        return self._experiment.partition.clients - len(sampled)


class InOnePlace(AtClients):
    """Pooled: one client has the data of all. No arrays travel: the data itself has moved."""

    def samples(self, clients: Sequence[int], declared: Ints) -> dict[int, int]:
        return {0: len(self._task.pool()) if allowed(self._experiment, "samples") else 1}

    def work(self, called: Call, sizes: Ints) -> dict[int, float] | None:
        return None

    def evaluates_received(self, round_: int) -> bool:
        return False

    def evaluates_after(self, round_: int) -> bool:
        return self._told and round_ % self._every == 0

    def traffic(self, down: int, up: int) -> dict[str, int]:
        return {"bytes_down": 0, "bytes_up": 0}

    def never_sampled(self, sampled: Collection[int]) -> int:
        return 0


def placement(experiment: Experiment, task: Task) -> AtClients:
    """Where `run.placement` has the training happen."""
    return (InOnePlace if experiment.run.placement == "pooled" else AtClients)(experiment, task)
