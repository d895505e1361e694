"""A frozen trunk's features, computed once: what transfer learning on images costs on a CPU is the heads alone.

This is a fact, not an approximation: it is done where the trunk is not trained and a sample always looks the same (no
augmentation), and features are forgotten as soon as a trunk is loaded that is not, bit for bit, the one that they are of.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from meadow.runtime.module_cache import hold_still
from meadow.tasks.data import Data
from meadow.tasks.evaluation import chunks, device_of
from meadow.tasks.models.multihead import Multihead
from meadow.tasks.task import Task


class Heads(nn.Module):
    """The heads of a model on features: state names, parameters and outputs are the model's own."""

    def __init__(self, model: Multihead) -> None:
        super().__init__()
        self.heads = model.heads
        self.on_features = model.on_features

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return self.on_features(features)


@dataclass(frozen=True)
class View:
    """What training and evaluation look at: the model and the samples themselves, or the heads and cached features.

    `task.prepare` fits what `data` gives.
    """

    model: nn.Module
    task: Task
    trunk: nn.Module | None = None
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    _kept: dict[str, Data] = field(default_factory=dict, repr=False, compare=False)
    _of: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def data(self, key: str, data: Data) -> Data:
        """The samples as this view's model takes them; `key` names them (client and part), and is what is kept under."""
        if self.trunk is None:
            return data
        state = self.trunk.state_dict()
        if self._of.keys() != state.keys() or not all(torch.equal(self._of[n], t) for n, t in state.items()):
            self._kept.clear()
            self._of.update({name: tensor.clone() for name, tensor in state.items()})
        if key not in self._kept:
            self.trunk.eval()
            with torch.no_grad():
                device = device_of(self.trunk)
                parts = [self.trunk(self.prepare(x.to(device))) for x in chunks(data.x)]
            self._kept[key] = Data(torch.cat(parts), data.y)
        return self._kept[key]


def view(task: Task, model: nn.Module, frozen: bool) -> View:
    """The view of a model. `frozen`: local training does not change the trunk."""
    if frozen and not task.settings.augment and isinstance(model, Multihead):
        return View(hold_still(Heads(model)), replace(task, pipeline=None), model.trunk, task.prepare)
    return View(model, task)
