"""Regularise local training towards a reference model (`[anchor]`): pulls on the weights, and a teacher's outputs.

The gradient of a pull depends on the weights alone, so it is added after clipping and noise
(`meadow.client.loop.training.Correction`). A teacher adds to the loss of each sample.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from meadow.client.loop.fisher import true_fisher
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import one_thread
from meadow.strategies.trainable import HEADS
from meadow.tasks.data import Data, Target
from meadow.tasks.evaluation import device_of, load_into
from meadow.tasks.models.multihead import build, inputs
from meadow.tasks.models.weights import read_file
from meadow.tasks.source import source_data, source_model
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task


@dataclass(frozen=True)
class Pull:
    """The gradient of sum_i s_i (theta_i - reference_i)^2 / 2, s_i = l2 + ewc * fisher_i, by parameter name."""

    reference: Mapping[str, Tensor]
    l2: float
    ewc: float = 0.0
    fisher: Mapping[str, Tensor] | None = None

    def correct(self, learning: Mapping[str, nn.Parameter]) -> None:
        """Add the pull to the gradients of the parameters that have a reference."""
        for name, parameter in learning.items():
            if name in self.reference:
                away = parameter.detach() - self.reference[name]
                pull = away * (self.l2 if self.fisher is None else self.l2 + self.ewc * self.fisher[name])
                parameter.grad = pull if parameter.grad is None else parameter.grad + pull


@dataclass(frozen=True)
class Teacher:
    """A model whose outputs are soft targets, with weight `kl` at temperature 1 and `distill` at `temperature`."""

    model: nn.Module
    task: Task
    kl: float
    distill: float
    temperature: float

    def each(self, batch: Data, outputs: Mapping[str, Tensor]) -> Tensor:
        """The term added to each sample's loss, (n,): the weighted sum over targets of `soft_cross_entropy`."""
        with torch.no_grad():
            teacher = self.model(batch.x)
        total = torch.zeros(len(batch), device=batch.x.device)
        for weight, target in zip(self.task.weights, self.task.targets, strict=True):
            own, aim = outputs[target.name], teacher[target.name]
            if self.kl:
                total = total + weight * self.kl * soft_cross_entropy(target, own, aim, 1.0)
            if self.distill:
                total = total + weight * self.distill * soft_cross_entropy(target, own, aim, self.temperature)
        return total


def soft_cross_entropy(target: Target, output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the cross-entropy of p(output / T) to p(teacher / T), in nats, of each sample: (n,).

    Hinton et al. 2015, section 2; T^2 keeps the size of the gradient. A class: of the softmax (a class at each token: the
    mean over tokens). Labels: the mean over labels of the binary cross-entropy. Values and quantiles: the squared
    difference, summed over quantiles, without a temperature; up to a constant it is the cross-entropy of normal
    distributions of variance 1/2.
    """
    if target.kind == "class":
        each = F.cross_entropy(output / temperature, (teacher / temperature).softmax(1), reduction="none")
        return temperature**2 * each.flatten(1).mean(1) if each.ndim > 1 else temperature**2 * each
    if target.kind == "labels":
        aim = torch.sigmoid(teacher / temperature)
        each = F.binary_cross_entropy_with_logits(output / temperature, aim, reduction="none")
        return temperature**2 * each.mean(1)
    difference = (output - teacher) ** 2
    return difference.flatten(1).sum(1) if difference.ndim > 1 else difference


def pull(model: nn.Module, experiment: Experiment) -> Pull | None:
    """The pull of `[anchor]` on the weights of a model that is not trained yet, or None.

    to = "start": towards the state before the first round, of the trunk only, because the heads are new. "received":
    towards `model`. l2: L2-SP (Li et al. 2018, equation 5, with alpha = l2). ewc: Kirkpatrick et al. 2017, equation 3,
    with the source model's true diagonal Fisher information on its own data (`meadow.client.loop.fisher.true_fisher`).
    """
    plan = experiment.anchor
    if not (plan.l2 or plan.ewc):
        return None
    if plan.to == "received":
        return Pull({name: p.detach().clone() for name, p in model.named_parameters()}, plan.l2)
    device = device_of(model)
    start = {name: value.to(device) for name, value in _start(experiment).items()}
    fisher = {n: v.to(device) for n, v in source_fisher(experiment).items()} if plan.ewc else None
    return Pull(start, plan.l2, plan.ewc, fisher)


def teacher(model: nn.Module, task: Task, experiment: Experiment) -> Teacher | None:
    """The teacher of `[anchor]`, or None. `model`: the model that will learn, not trained yet.

    kl (Phan et al. 2020): adds the cross-entropy to the teacher's outputs to the data's loss. distill (Hinton et al.
    2015): the same at a temperature, with weight `distill`; the data's loss has weight 1 - distill.
    """
    plan = experiment.anchor
    if not (plan.kl or plan.distill):
        return None
    own = _teacher(experiment) if plan.to == "start" or plan.teacher else copy.deepcopy(model)
    own.to(device_of(model)).eval().requires_grad_(False)
    return Teacher(own, task, plan.kl, plan.distill, plan.temperature)


def teaches(experiment: Experiment) -> bool:
    """Whether there is a teacher; it needs the samples themselves, not a frozen trunk's features."""
    return bool(experiment.anchor.kl or experiment.anchor.distill)


@functools.lru_cache(maxsize=8)
def source_fisher(experiment: Experiment) -> Mapping[str, Tensor]:
    """The true diagonal Fisher information of the source model's trunk on its own data, float32, by parameter name."""
    task = open_task(experiment)
    model = source_model(experiment)
    with one_thread():
        fisher = true_fisher(model, source_data(experiment).train, task, experiment.local.fisher_samples)
    return {name: value.float() for name, value in fisher.items() if not name.startswith(HEADS)}


@functools.lru_cache(maxsize=8)
def _start(experiment: Experiment) -> Mapping[str, Tensor]:
    return {n: torch.from_numpy(value) for n, value in initial_state(experiment).items() if not n.startswith(HEADS)}


@functools.lru_cache(maxsize=8)
def _teacher(experiment: Experiment) -> nn.Module:
    """The model of the file `anchor.teacher`, or the source model."""
    task, plan = open_task(experiment), experiment.anchor
    if not plan.teacher:
        return source_model(experiment)
    shape = {"model": plan.teacher_model or task.settings.model, "hidden": plan.teacher_hidden or task.settings.hidden}
    model = build(task.settings.model_copy(update=shape), task.targets, inputs(task.dataset))
    path = Path(plan.teacher).expanduser()
    try:
        load_into(model, {name: value.float().numpy() for name, value in read_file(path).items()})
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f'anchor.teacher = "{plan.teacher}" with anchor.teacher_model = "{plan.teacher_model}" and '
            f"anchor.teacher_hidden = {plan.teacher_hidden}: {error}; give a .safetensors file with all arrays of such a "
            "model, with heads of the learned targets, such as a checkpoint of a run"
        ) from None
    return model
