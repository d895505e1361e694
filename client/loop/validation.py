"""The loss on a client's validation part, and early stopping, which restores the best weights."""

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
    """The weighted sum over targets of the mean loss, in `eval()` mode, without regularisers or class weights."""
    parts = losses(predict(model, data.x, task.prepare), data.y, task.targets)
    return sum(w * float(parts[t.name]) for w, t in zip(task.weights, task.targets, strict=True))


@dataclass
class EarlyStopping:
    """Early stopping (Prechelt 1998) within a round: call `should_stop` after each epoch, and `restore` at the end.

    It keeps the state, with buffers, of the epoch with the lowest loss; of equal losses the first.
    """

    patience: int
    data: Data
    task: Task
    _best: float = math.inf
    _since: int = 0
    _state: dict[str, Tensor] = field(default_factory=dict)

    def should_stop(self, model: nn.Module) -> bool:
        """Whether `patience` epochs have passed since the best validation loss. Leaves the model in `eval()` mode."""
        loss = validation_loss(model, self.data, self.task)
        if loss < self._best or not self._state:
            self._best, self._since, self._state = loss, 0, copy.deepcopy(dict(model.state_dict()))
        else:
            self._since += 1
        return self._since >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Load the best state."""
        state = model.state_dict()
        with torch.no_grad():
            for name, tensor in self._state.items():
                state[name].copy_(tensor)
