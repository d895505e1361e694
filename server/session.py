"""The session of a running experiment: what its rounds share. Also its set-up and the table of its split."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from meadow.arrays.named import Arrays
from meadow.config.cohort import unseen
from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.runtime.clock import Clock
from meadow.server.exchange import Exchange
from meadow.server.folder import RunFolder
from meadow.server.listeners import Listeners
from meadow.server.placement import AtClients
from meadow.server.protection import Protection
from meadow.server.selection import Selection
from meadow.server.states import States
from meadow.server.writer import Writer
from meadow.strategies import equal_weights
from meadow.strategies.protocol import Roles, ServerAlgorithm, Setup, State
from meadow.strategies.stages import Stages
from meadow.strategies.trainable import HEADS
from meadow.tasks.features import View
from meadow.tasks.task import Task

MOST_ROWS = 100_000
"""`split.json` has a row per client up to this many clients."""


@dataclass
class Session:
    """What the rounds of one run share. Each round replaces `arrays`, `state`, `round` and `void` and changes `protection`.

    arrays: the shared arrays. state: the algorithm's state. clock: measures the phases of the current round. round: the
    last finished round. kept_round: the round whose model the run keeps, once it has ended. void: attempts that did not
    count, "ROUND.ATTEMPT"; clients discard their effects. states: which clients have a state.
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
    selection: Selection
    clock: Clock = field(default_factory=Clock)
    round: int = 0
    kept_round: int = 0
    void: list[str] = field(default_factory=list)
    states: States = field(default_factory=States)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """The training samples of each client, int64 (clients,)."""
        return self.task.split.sizes[:, 0]

    def evaluates(self, round_: int) -> bool:
        """Whether the server evaluates the shared model after the round."""
        return round_ % self.experiment.evaluate.every == 0 or round_ == self.experiment.run.rounds


def setup(experiment: Experiment, task: Task, parts: Roles) -> Setup:
    """The set-up of the algorithm's server part. The clients with a target's labels train its head; unseen clients train
    nothing."""
    holders = dict.fromkeys(parts.shared, experiment.participants)
    held = np.delete(task.held, sorted(unseen(experiment)), axis=0)
    for target in task.targets:
        count = int(held[:, experiment.task.targets.index(target.name)].sum())
        holders |= {name: count for name in parts.shared if name.startswith(f"{HEADS}{target.name}.")}
    settings, seed = experiment.strategy, experiment.run.seed
    return Setup(settings, experiment.local, seed, parts, holders, equal_weights(experiment))


def split_table(experiment: Experiment, task: Task) -> dict[str, Any]:
    """The split for `split.json`.

    sizes: samples of each part, a row per client. labels: counts of the first target's labels or deciles. Both are absent
    under DP, unless privacy.release allows them, and with more than MOST_ROWS clients. holds, if clients hold only some
    targets: the clients that hold each target. For law = natural, left_out counts the data's clients that were too small
    and their samples, and names has each client's name in the data.
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
