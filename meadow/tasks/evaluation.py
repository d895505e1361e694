"""Models and arrays: loading named arrays into a model in place, taking them out, and scoring a model on data."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.runtime.module_cache import once
from meadow.tasks.data import Data
from meadow.tasks.metrics import MOST_CLASSES, Ints, confusion, score
from meadow.tasks.task import Task


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name, in state_dict order: its own tensors."""
    return once(model, "state", lambda: dict(model.state_dict(keep_vars=True)))


def names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's state, in state_dict order."""
    return tuple(_state(model))


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: where it trains and is evaluated."""
    return next((tensor.device for tensor in _state(model).values()), torch.device("cpu"))


def load_into(model: nn.Module, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Copy arrays into the model's state in place. Raises ValueError unless names and shapes are exactly the model's."""
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


_NUMBERS_AT_ONCE = 2**23
_SAMPLES_AT_ONCE = 512


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Stored samples in pieces that go through a model at once where nothing learns: 512 of them, fewer if they are large
    (55 images of 3x224x224). Part of the result's last bits, like a batch size."""
    size = max(1, x[0].numel()) if len(x) else 1
    return torch.split(x, min(_SAMPLES_AT_ONCE, max(8, _NUMBERS_AT_ONCE // size)))


def predict(model: nn.Module, x: Tensor, prepare: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The model's outputs (`meadow.tasks.models.multihead.Multihead`) for stored samples, in `eval()` mode, without
    gradients; computed where the model is, and given back on the CPU."""
    model.eval()
    device = device_of(model)
    with torch.inference_mode():
        outputs = [model(prepare(part.to(device))) for part in chunks(x)]
    return {name: torch.cat([output[name] for output in outputs]).cpu() for name in outputs[0]}


def evaluate(model: nn.Module, data: Data, task: Task, thorough: bool = False) -> dict[str, float]:
    """Score the model on the data: "target/metric" -> value, over pooled predictions, in `eval()` mode."""
    return _flat(score(predict(model, data.x, task.prepare), data.y, task.targets, thorough))


def examine(model: nn.Module, data: Data, task: Task) -> tuple[dict[str, float], dict[str, Ints]]:
    """A thorough `evaluate`, and the confusion counts of each class target that has at most MOST_CLASSES classes."""
    outputs = predict(model, data.x, task.prepare)
    counts = {
        t.name: confusion(t, outputs[t.name], data.y[t.name])
        for t in task.targets
        if t.kind == "class" and t.size <= MOST_CLASSES
    }
    return _flat(score(outputs, data.y, task.targets, thorough=True)), counts


def _flat(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{target}/{metric}": value for target, metrics in scores.items() for metric, value in metrics.items()}
