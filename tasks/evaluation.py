"""Models and arrays: loading named arrays into a model in place, taking them out, and scoring a model on data."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from config.durable import Arrays
from tasks.data import Data, Target
from tasks.metrics import score


def load_into(model: nn.Module, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Copy arrays into the model's state in place. Raises ValueError unless names and shapes are exactly the model's."""
    state = model.state_dict()
    if state.keys() != arrays.keys():
        raise ValueError(f"the arrays are not the model's: {sorted(state.keys() ^ arrays.keys())}")
    with torch.no_grad():
        for name, tensor in state.items():
            if tuple(tensor.shape) != arrays[name].shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, the model's is {tuple(tensor.shape)}")
            tensor.copy_(torch.from_numpy(arrays[name]))


def state_of(model: nn.Module) -> Arrays:
    """A copy of the model's state, in state_dict order."""
    return {name: tensor.numpy(force=True).copy() for name, tensor in model.state_dict().items()}


def evaluate(model: nn.Module, data: Data, targets: Sequence[Target]) -> dict[str, float]:
    """Score the model on the data: "target/metric" -> value, over pooled predictions, in `eval()` mode."""
    model.eval()
    with torch.inference_mode():
        scores = score(model(data.x), data.y, targets)
    return {f"{target}/{metric}": value for target, metrics in scores.items() for metric, value in metrics.items()}
