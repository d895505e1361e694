"""What a training is, what of it decides who can do it, and what a trainer is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from meadow.client.loop.training import Correction, Extras, Trained
from meadow.client.trainers.network import Network, Unknown, network
from meadow.strategies.protocol import Term
from torch import nn

from meadow.config.schema import Experiment, Local
from meadow.privacy.dpsgd.step import Permit
from meadow.tasks.data import Data
from meadow.tasks.features import View


class Training(NamedTuple):
    """One client's training in one round: its samples, how long (`plan`, or so many epochs), and what acts on its steps.

    learns: narrows the parameters that learn. correct, term: an algorithm's (`meadow.client.loop.training.train`). permit:
    makes it private. A tuple, because one is made for every client, and a frozen dataclass takes five times as long.
    """

    data: Data
    round: int
    client: int
    plan: Local
    epochs: int = 0
    learns: Callable[[str], bool] | None = None
    correct: Correction | None = None
    term: Term | None = None
    extras: Extras | None = None
    permit: Permit | None = None


@dataclass(frozen=True)
class Job:
    """What decides who can do a training: the settings, the model, and what is asked of this kind of training.

    network: the model as layers, or why it is none. kinds: of the learned targets ("class", "value", ...); weighted: whether
    their classes have weights. complete: whether each of the client's samples has every label. correction, term: whether
    the algorithm changes each step's gradient, or adds to each batch's loss.
    """

    experiment: Experiment
    network: Network | str
    kinds: tuple[str, ...]
    weighted: bool
    complete: bool = True
    correction: bool = False
    term: bool = False


class Trainer(Protocol):
    """What can train a client. `name` is what `engine.trainer` and the summary call it."""

    @property
    def name(self) -> str: ...

    @property
    def blocks_at_once(self) -> int:
        """How many whole blocks `train_blocks` takes at most; 0 if it takes none."""
        ...

    def why_not(self, job: Job) -> str:
        """Why it cannot do this kind of training, or ""."""
        ...

    def train(self, model: nn.Module, training: Training) -> Trained:
        """Train the model in place from where it is."""
        ...


def job_of(experiment: Experiment, seen: View) -> Job:
    """The plainest training of an experiment on a view of its model: nothing of the algorithm's, all labels known."""
    task = seen.task
    kinds = tuple(target.kind for target in task.targets)
    weighted = any(target.weights or target.balanced for target in task.targets)
    if seen.trunk is not None:
        return Job(experiment, "the trunk is frozen, and the heads cost little", kinds, weighted)
    try:
        layers = network(seen.model, tuple(task.dataset.test.x.shape[1:]), task.targets, task.weights)
    except Unknown as reason:
        return Job(experiment, str(reason), kinds, weighted)
    return Job(experiment, layers, kinds, weighted)


def first_of(reasons: dict[str, bool]) -> str:
    """The first reason that holds, or ""."""
    return next((reason for reason, holds in reasons.items() if holds), "")


def beyond_plain_steps(job: Job) -> str:
    """What the training loop alone can do and this kind of training needs, or "": plain SGD on the data's loss is left."""
    experiment, local, anchor = job.experiment, job.experiment.local, job.experiment.anchor
    strategy = f'strategy.name = "{experiment.strategy.name}"'
    return first_of(
        {
            f'privacy.unit = "{experiment.privacy.unit}"': experiment.privacy.unit == "example",
            f'local.optimizer = "{local.optimizer}"': local.optimizer != "sgd",
            f'local.balance = "{local.balance}"': local.balance != "fixed",
            f'local.trainable = "{local.trainable}"': local.trainable in ("gradual", "lora", "adapters", "fisher"),
            f'local.schedule = "{local.schedule}"': local.schedule == "plateau",
            f'adapt.method = "{experiment.adapt.method}"': experiment.adapt.method != "none",
            "anchor.l2, ewc, kl or distill": bool(anchor.l2 or anchor.ewc or anchor.kl or anchor.distill),
            "task.augment": bool(experiment.task.augment),
            f"local.batch_size = {local.batch_size}": not 0 < local.batch_size <= 512,
            f"local.clip_norm = {local.clip_norm}": bool(local.clip_norm),
            f"local.patience = {local.patience}": bool(local.patience),
            f"local.label_smoothing = {local.label_smoothing}": bool(local.label_smoothing),
            str(job.network): isinstance(job.network, str),
            f"{strategy} changes the gradient of each step": job.correction,
            f"{strategy} adds to the loss of each batch": job.term,
        }
    )
