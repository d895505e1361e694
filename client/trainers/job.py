"""Define the properties of a training that decide which trainers can do it, and the protocol of trainers."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from meadow.client.loop.training import Trained, Training
from meadow.client.trainers.network import Network, Unknown, network
from meadow.config.schema import Experiment
from meadow.tasks.features import View


@dataclass(frozen=True)
class Job:
    """A kind of training, as far as it decides which trainers can do it.

    network: the model's layers, or the reason why it has none that kernels know. kinds: of the learned targets ("class",
    "value", ...). weighted: whether classes have weights. complete: whether every sample has all labels. correction, term:
    whether the algorithm changes each step's gradient, or adds to each batch's loss.
    """

    experiment: Experiment
    network: Network | str
    kinds: tuple[str, ...]
    weighted: bool
    complete: bool = True
    correction: bool = False
    term: bool = False


class Trainer(Protocol):
    """Trains a client. `name`: as in `engine.trainer` and the summary."""

    @property
    def name(self) -> str: ...

    def why_not(self, job: Job) -> str:
        """The reason why it cannot do this kind of training, or ""."""
        ...

    def train(self, model: nn.Module, training: Training) -> Trained:
        """Train the model in place from its present parameters."""
        ...


def job_of(experiment: Experiment, seen: View) -> Job:
    """The plainest training of an experiment on a view of its model: no correction or term, all labels known."""
    task = seen.task
    kinds = tuple(target.kind for target in task.targets)
    weighted = any(target.weights or target.balanced for target in task.targets)
    if seen.trunk is not None:
        return Job(experiment, "the trunk is frozen, and training the heads costs little", kinds, weighted)
    try:
        layers = network(seen.model, tuple(task.dataset.test.x.shape[1:]), task.targets, task.weights)
    except Unknown as reason:
        return Job(experiment, str(reason), kinds, weighted)
    return Job(experiment, layers, kinds, weighted)


def first_of(reasons: dict[str, bool]) -> str:
    """The first reason that holds, or ""."""
    return next((reason for reason, holds in reasons.items() if holds), "")


def beyond_plain_steps(job: Job) -> str:
    """The first requirement that only the training loop meets, or "" if this is plain SGD on the data's loss."""
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
