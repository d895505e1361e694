"""What a round needs to know about where training takes place: at each client, or centrally on pooled data."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.server.cohorts import Cohort
from meadow.strategies.protocol import steps_of
from meadow.tasks.task import Task

Ints = npt.NDArray[np.int64]


class AtClients:
    """Federated or local-only: each client trains on its own data and evaluates the model that it receives."""

    def __init__(self, experiment: Experiment, task: Task) -> None:
        self._experiment, self._task = experiment, task
        self._every = experiment.evaluate.every
        self._reported = "clients" in experiment.evaluate.on and allowed(experiment, "metrics")

    def samples(self, clients: Sequence[int], declared: Ints) -> dict[int, int]:
        """The largest weight of each client, in training samples."""
        return {client: int(declared[client]) for client in clients}

    def work(self, called: Cohort, sizes: Ints) -> dict[int, float] | None:
        """The expected work of each client, in any unit; None if clients cannot move to another node.

        It is the number of steps, plus 1 for the work that does not depend on them.
        """
        local = self._experiment.local
        return {c: 1.0 + called.work.get(c, 1.0) * steps_of(local, max(1, int(sizes[c]))) for c in called.trained}

    def evaluates_received(self, round_: int) -> bool:
        """Whether the round's clients evaluate the model that they receive, which is that of the previous round."""
        return self._reported and (round_ - 1) % self._every == 0

    def evaluates_after(self, round_: int) -> bool:
        """Whether all clients evaluate the round's new model."""
        return False

    def traffic(self, down: int, up: int) -> dict[str, int]:
        """Bytes of arrays sent to and from the clients, as if each client were reached separately."""
        return {"bytes_down": down, "bytes_up": up}

    def never_sampled(self, sampled: Collection[int]) -> int:
        """The number of clients that have never been in a cohort."""
        return self._experiment.partition.clients - len(sampled)


class InOnePlace(AtClients):
    """Pooled: one client has all data. No arrays travel, because the data itself has moved."""

    def samples(self, clients: Sequence[int], declared: Ints) -> dict[int, int]:
        return {0: len(self._task.pool()) if allowed(self._experiment, "samples") else 1}

    def work(self, called: Cohort, sizes: Ints) -> dict[int, float] | None:
        return None

    def evaluates_received(self, round_: int) -> bool:
        return False

    def evaluates_after(self, round_: int) -> bool:
        return self._reported and round_ % self._every == 0

    def traffic(self, down: int, up: int) -> dict[str, int]:
        return {"bytes_down": 0, "bytes_up": 0}

    def never_sampled(self, sampled: Collection[int]) -> int:
        return 0


def placement(experiment: Experiment, task: Task) -> AtClients:
    """The placement that `run.placement` asks for."""
    return (InOnePlace if experiment.run.placement == "pooled" else AtClients)(experiment, task)
