"""Choose the trainer of a client: the fastest one that can do the training.

Fastest first: `stacked`, all clients of a block at once on a GPU; `fused`, compiled code on a CPU; `direct`, torch's
operations without autograd's tape; `loop`, the training loop, which can do everything. All use the samples in the loop's
order and differ from it only in the order of sums (by how much: tests/client/test_direct.py, tests/client/test_fast.py).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from meadow.client.loop.training import Trained, Training, train
from meadow.client.trainers.direct import Direct
from meadow.client.trainers.fused import Fused
from meadow.client.trainers.job import Job, Trainer, job_of
from meadow.client.trainers.kernel import Kernel, KernelTrainer
from meadow.client.trainers.stacked import Stacked
from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.runtime.errors import UserError
from meadow.strategies.wire.trainings import UNDISCLOSED, Reasons, Trainings
from meadow.tasks.data import Data
from meadow.tasks.features import View
from meadow.tasks.task import Task

log = logging.getLogger("meadow.client")

KERNELS: tuple[type[Kernel], ...] = (Stacked, Fused, Direct)
"""The fast trainers, fastest first."""


@dataclass(frozen=True)
class Loop:
    """The training loop as a trainer: it can do everything, and comes last."""

    experiment: Experiment
    task: Task
    name: str = "loop"

    def why_not(self, job: Job) -> str:
        return ""

    def train(self, model: nn.Module, training: Training) -> Trained:
        return train(model, training, self.task, self.experiment)


@dataclass(frozen=True)
class Choice:
    """The trainer of a kind of training, and the reason why each faster one was passed over.

    by_labels: clients with missing labels may get another trainer than those without. secret: that would reveal labels
    that may not leave.
    """

    trainer: Trainer
    reasons: Reasons
    by_labels: bool = False
    secret: bool = False


def choose(job: Job, trainers: Sequence[Trainer]) -> Choice:
    """The first trainer that can do the job. Raises UserError if none can, as `engine.trainer` names one."""
    reasons = list[tuple[str, str]]()
    for trainer in trainers:
        reason = trainer.why_not(job)
        if not reason:
            return Choice(trainer, tuple(reasons))
        reasons.append((trainer.name, reason))
    name, reason = reasons[-1]
    raise UserError(f'engine.trainer = "{name}" cannot train here: {reason}; write engine.trainer = "auto" or "loop"')


def check_device(experiment: Experiment) -> None:
    """Raise UserError if this machine lacks the device."""
    if experiment.engine.device == "cuda" and not torch.cuda.is_available():
        raise UserError('engine.device = "cuda": torch finds no GPU here; write engine.device = "cpu"')


def trainers_of(experiment: Experiment, seen: View) -> "Trainers":
    """The trainers of an experiment on a view of its model. Raises UserError if this machine lacks the device."""
    check_device(experiment)
    job, loop = job_of(experiment, seen), Loop(experiment, seen.task)
    every: list[Trainer] = [KernelTrainer(kernel, experiment, seen.task, job.network) for kernel in KERNELS]
    every.append(loop)
    wanted = experiment.engine.trainer
    return Trainers(job, seen.task, [trainer for trainer in every if wanted in ("auto", trainer.name)], loop)


@dataclass
class Trainers:
    """The trainers of a node. It chooses once for each kind of training, and counts trainings in `trainings`.

    job: the plainest training. loop: takes over if another trainer fails, unless `engine.trainer` names that trainer.
    """

    job: Job
    task: Task
    available: Sequence[Trainer]
    loop: Loop
    trainings: Trainings = field(default_factory=Trainings)
    _chosen: dict[tuple[bool, bool, bool], Choice] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)

    @property
    def forced(self) -> bool:
        """Whether `engine.trainer` names a trainer, so the loop must not replace it."""
        return self.loop not in self.available

    def chosen(self, correction: bool = False, term: bool = False, complete: bool = True) -> Choice:
        """The choice for a kind of training, for clients with (`complete`) or without all labels. Raises as `choose`."""
        key = correction, term, complete
        if (found := self._chosen.get(key)) is None:
            job = replace(self.job, correction=correction, term=term, complete=complete)
            found = choose(job, self.available)
            by_labels = self.forced or choose(replace(job, complete=not complete), self.available) != found
            secret = by_labels and not self.forced and not allowed(job.experiment, "samples")
            found = self._chosen[key] = replace(found, by_labels=by_labels, secret=secret)
        return found

    def choice(self, data: Data, correction: bool = False, term: bool = False) -> Choice:
        """The choice for a kind of training of a client with this data."""
        found = self.chosen(correction, term)
        if not found.by_labels or all(bool(t.known(data.y[t.name]).all()) for t in self.task.targets):
            return found
        return self.chosen(correction, term, complete=False)

    def train(self, model: nn.Module, training: Training) -> Trained:
        """Train the model in place by the chosen trainer; if a fast one fails, by the loop."""
        choice = self.choice(training.data, training.correct is not None, training.term is not None)
        try:
            trained = choice.trainer.train(model, training)
        except Exception as error:
            if choice.trainer is self.loop:
                raise
            secret = choice.secret or not allowed(self.job.experiment, "errors")
            choice = Choice(self.loop, (*choice.reasons, self._note(choice.trainer, error)), secret=secret)
            trained = self.loop.train(model, training)
        self.count(choice)
        return trained

    def count(self, choice: Choice, times: int = 1) -> None:
        """Count trainings by this choice; as "undisclosed" if it is secret."""
        trainer, reasons = (UNDISCLOSED, ()) if choice.secret else (choice.trainer.name, choice.reasons)
        self.trainings.add(trainer, reasons, times)

    def _note(self, trainer: Trainer, error: Exception) -> tuple[str, str]:
        """Log the first failure of a trainer, and return its reason to count. Raises the error if the trainer is forced."""
        if self.forced:
            raise error
        if trainer.name not in self._failed:
            self._failed.add(trainer.name)
            log.warning("%s failed, the training loop takes over: %s: %s", trainer.name, type(error).__name__, error)
            log.debug("where %s failed", trainer.name, exc_info=error)
        return trainer.name, f"it failed with {type(error).__name__}"
