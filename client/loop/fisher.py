"""The diagonal Fisher information of a model's parameters, with the data's labels or in expectation over the model's.

F_i = mean over samples x of E_y[(d log p(y | x) / d theta_i)^2]. Each target's loss is -log p up to a constant, which
defines p: a class is categorical, labels are Bernoulli, a value is normal with variance 1/2 in its scaled unit, quantiles
are asymmetric Laplace (Koenker and Machado 1999). Samples are taken one by one, which is exact for every model.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from meadow.runtime.seeds import torch_generator
from meadow.tasks.data import Data, Target
from meadow.tasks.losses import losses
from meadow.tasks.task import Task


def empirical_fisher(model: nn.Module, data: Data, task: Task, samples: int) -> dict[str, Tensor]:
    """With the data's labels (Sung et al. 2021, equation 3): the mean squared gradient of the training loss (weighted over
    targets), float64, by parameter name. At most `samples` samples are used, drawn from the seed."""

    def one(sample: Data) -> Iterator[tuple[float, Tensor]]:
        parts = losses(model(task.prepare(sample.x)), sample.y, task.targets)
        yield 1.0, torch.stack([w * parts[t.name] for w, t in zip(task.weights, task.targets, strict=True)]).sum()

    return _mean_square(model, data, task, samples, one)


def true_fisher(model: nn.Module, data: Data, task: Task, samples: int) -> dict[str, Tensor]:
    """In expectation over labels from the model's own predictions (Kirkpatrick et al. 2017; Kunstner et al. 2019, equation
    3): the sum over targets of weight times information, float64, by parameter name. The data's labels are not used."""

    def one(sample: Data) -> Iterator[tuple[float, Tensor]]:
        outputs = model(task.prepare(sample.x))
        for weight, target in zip(task.weights, task.targets, strict=True):
            for score in _scores(target, outputs[target.name]):
                yield weight, score

    return _mean_square(model, data, task, samples, one)


def _scores(target: Target, output: Tensor) -> Iterator[Tensor]:
    """Scalars whose squared gradients add up to E_y[(grad log p(y))^2], for one sample's output (1, ...)."""
    if target.kind == "class":
        log_p = torch.log_softmax(output, 1).movedim(1, -1).flatten(0, -2)  # (1, or tokens; classes)
        for row in log_p:
            for entry in row:
                yield entry.detach().exp().sqrt() * entry
    elif target.kind == "labels":
        for logit in output.flatten():
            p = torch.sigmoid(logit.detach())
            yield (p * (1 - p)).sqrt() * logit
    elif target.kind == "value":
        yield 2**0.5 * output.sum()
    else:
        for level, entry in zip(target.quantiles, output.flatten(), strict=True):
            yield (level * (1 - level)) ** 0.5 * entry


def _mean_square(
    model: nn.Module, data: Data, task: Task, samples: int, one: Callable[[Data], Iterator[tuple[float, Tensor]]]
) -> dict[str, Tensor]:
    """The mean over samples of the sum of weight times squared gradient over the (weight, scalar) pairs of `one`."""
    model.eval()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    chosen = torch.randperm(len(data), generator=torch_generator(task.seed, "fisher"))[:samples]
    for index in chosen:
        for weight, term in one(data.take(index[None])):
            gradients = torch.autograd.grad(term, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += weight * gradient.double() ** 2
    return {name: value / len(chosen) for name, value in sums.items()}
