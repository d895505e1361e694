"""Loads named arrays into a model, reads them from it, and evaluates a model on data."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.runtime.module_cache import cached
from meadow.tasks.data import Data
from meadow.tasks.metrics import MOST_CLASSES, Ints, confusion, score
from meadow.tasks.task import Task


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors by name, in state_dict order."""
    return cached(model, "state", lambda: dict(model.state_dict(keep_vars=True)))


def names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's state, in state_dict order."""
    return tuple(_state(model))


def device_of(model: nn.Module) -> torch.device:
    """The device of the model."""
    return next((tensor.device for tensor in _state(model).values()), torch.device("cpu"))


def load_into(model: nn.Module, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Copy arrays into the model's state, in place. Raises ValueError unless all names and shapes match."""
    state = _state(model)
    if state.keys() != arrays.keys():
        raise ValueError(f"the arrays are not the model's: {sorted(state.keys() ^ arrays.keys())}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != arrays[name].shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, the model's is {tuple(tensor.shape)}")
        if tensor.device.type == "cpu":
            np.copyto(tensor.detach().numpy(), arrays[name], casting="same_kind")
        else:
            tensor.detach().copy_(torch.from_numpy(arrays[name]))


def state_of(model: nn.Module) -> Arrays:
    """A copy of the model's state, in state_dict order."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in _state(model).items()}


_MAX_VALUES = 2**23
_MAX_SAMPLES = 512


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Stored samples in batches for inference: 512 samples, fewer if they are large (55 images of 3x224x224). The batch
    size affects a result's last bits."""
    size = max(1, x[0].numel()) if len(x) else 1
    return torch.split(x, min(_MAX_SAMPLES, max(8, _MAX_VALUES // size)))


def predict(model: nn.Module, x: Tensor, prepare: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The model's outputs (`meadow.tasks.models.multihead.Multihead`) for stored samples, in `eval()` mode, without
    gradients; computed on the model's device and returned on the CPU."""
    model.eval()
    device = device_of(model)
    with torch.inference_mode():
        outputs = [model(prepare(part.to(device))) for part in chunks(x)]
    return {name: torch.cat([output[name] for output in outputs]).cpu() for name in outputs[0]}


def evaluate(model: nn.Module, data: Data, task: Task, thorough: bool = False) -> dict[str, float]:
    """Evaluate the model on all samples at once, in `eval()` mode: {"target/metric": value}."""
    return _flat(score(predict(model, data.x, task.prepare), data.y, task.targets, thorough))


def examine(model: nn.Module, data: Data, task: Task) -> tuple[dict[str, float], dict[str, Ints]]:
    """A thorough `evaluate`, and the confusion matrix of each class target with at most MOST_CLASSES classes."""
    outputs = predict(model, data.x, task.prepare)
    counts = {
        t.name: confusion(t, outputs[t.name], data.y[t.name])
        for t in task.targets
        if t.kind == "class" and t.size <= MOST_CLASSES
    }
    return _flat(score(outputs, data.y, task.targets, thorough=True)), counts


def _flat(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{target}/{metric}": value for target, metrics in scores.items() for metric, value in metrics.items()}
