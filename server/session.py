"""A run in hand: what its rounds share, and what is known of it before the first one."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from meadow.server.exchange import Exchange
from meadow.server.folder import RunFolder
from meadow.server.listeners import Listeners
from meadow.server.placement import AtClients
from meadow.server.protection import Protection
from meadow.server.writer import Writer
from meadow.strategies import equal_weights
from meadow.strategies.protocol import Roles, ServerAlgorithm, Setup, State
from meadow.strategies.roles import HEADS
from meadow.strategies.stages import Stages
from torch import nn

from meadow.arrays.named import Arrays
from meadow.config.cohort import unseen
from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.runtime.clock import Clock
from meadow.tasks.features import View
from meadow.tasks.task import Task

MOST_ROWS = 100_000
"""Clients of which `split.json` has a row each."""


@dataclass
class Session:
    """What the rounds of one run have in hand. `arrays`, the shared ones, `state`, what the
    algorithm keeps, `round` and `void` are replaced from round to round; the protection changes too.

    clock: where the time of the round in hand goes. round: the last round that is done. void: attempts at rounds that did
    not count, "ROUND.ATTEMPT": clients forget what those left them.
    """

    experiment: Experiment
    task: Task
    roles: Roles
    start: Arrays
    arrays: Arrays
    algorithm: ServerAlgorithm[Any]
    state: State
    exchange: Exchange
    folder: RunFolder
    run_id: str
    model: nn.Module
    view: View
    protection: Protection
    placement: AtClients
    stages: Stages
    schedule: list[list[int]]
    writer: Writer
    listeners: Listeners
    clock: Clock = field(default_factory=Clock)
    round: int = 0
    void: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """The training samples of each client by the split, int64 (clients,)."""
        return self.task.split.sizes[:, 0]

    def evaluates(self, round_: int) -> bool:
        """Whether the server evaluates the shared model after the round."""
        return round_ % self.experiment.evaluate.every == 0 or round_ == self.experiment.run.rounds


def setup(experiment: Experiment, task: Task, parts: Roles) -> Setup:
    """What the server's part of the algorithm is made with. A head is trained by the clients that hold its target; unseen
    ones train nothing."""
    holders = dict.fromkeys(parts.shared, experiment.participants)
    held = np.delete(task.held, sorted(unseen(experiment)), axis=0)
    for target in task.targets:
        count = int(held[:, experiment.task.targets.index(target.name)].sum())
        holders |= {name: count for name in parts.shared if name.startswith(f"{HEADS}{target.name}.")}
    settings, seed = experiment.strategy, experiment.run.seed
    return Setup(settings, experiment.local, seed, parts, holders, equal_weights(experiment))


def split_table(experiment: Experiment, task: Task) -> dict[str, Any]:
    """The split for `split.json`, a row a client: samples of each part; counts of the first target's labels or deciles;
    under DP neither, unless privacy.release lets them out.

    Of more than MOST_ROWS clients none of these. "holds", where clients hold part of the targets: the clients that hold
    each. For law = natural "left_out", how many of the data's own clients are too small and how many samples they have,
    and "names", each client's name in the data.
    """
    table: dict[str, Any] = {"target": experiment.task.targets[0]}
    if (counted := allowed(experiment, "labels")) and experiment.partition.clients <= MOST_ROWS:
        table |= {"sizes": task.split.sizes.tolist(), "labels": task.label_counts().tolist()}
    if experiment.partition.holds:
        columns = zip(experiment.task.targets, task.held.T, strict=True)
        table["holds"] = {name: np.flatnonzero(has).tolist() for name, has in columns}
    if task.split.natural is not None:
        table |= {"left_out": asdict(task.split.left_out)} if counted else {}
        table["names"] = [task.dataset.clients[number] for number in task.split.natural]
    return table
