"""The client's validation part while it trains: its loss, and early stopping with the best weights put back."""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from meadow.tasks.data import Data
from meadow.tasks.evaluation import predict
from meadow.tasks.losses import losses
from meadow.tasks.task import Task


def validation_loss(model: nn.Module, data: Data, task: Task) -> float:
    """The weighted sum over targets of the mean loss over the data, in `eval()`, without regularisers or class weights."""
    parts = losses(predict(model, data.x, task.prepare), data.y, task.targets)
    return sum(w * float(parts[t.name]) for w, t in zip(task.weights, task.targets, strict=True))


@dataclass
class EarlyStopping:
    """Early stopping (Prechelt 1998) within a round: `should_stop` after each epoch, `restore` at the end.

    The best of the states after each epoch is kept, buffers too; of equal losses the first.
    """

    patience: int
    data: Data
    task: Task
    _best: float = math.inf
    _since: int = 0
    _state: dict[str, Tensor] = field(default_factory=dict)

    def should_stop(self, model: nn.Module) -> bool:
        """Whether training is over: `patience` epochs since the best validation loss. The model is left in `eval()`."""
        loss = validation_loss(model, self.data, self.task)
        if loss < self._best or not self._state:
            self._best, self._since, self._state = loss, 0, copy.deepcopy(dict(model.state_dict()))
        else:
            self._since += 1
        return self._since >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Put the best state back."""
        state = model.state_dict()
        with torch.no_grad():
            for name, tensor in self._state.items():
                state[name].copy_(tensor)
