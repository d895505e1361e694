"""Cache of a frozen trunk's features, so that transfer learning on images trains only the heads.

The results are exact: features are cached only if the trunk is not trained and samples are not augmented, and discarded
when another trunk, not bit-identical, is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from meadow.runtime.module_cache import enable_cache
from meadow.tasks.data import Data
from meadow.tasks.evaluation import chunks, device_of
from meadow.tasks.models.multihead import Multihead
from meadow.tasks.task import Task


class Heads(nn.Module):
    """The heads of a model as a model of features, with the same state names, parameters and outputs."""

    def __init__(self, model: Multihead) -> None:
        super().__init__()
        self.heads = model.heads
        self.on_features = model.on_features

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return self.on_features(features)


@dataclass(frozen=True)
class View:
    """What training and evaluation use: the model and the samples, or its heads and cached features.

    `task.prepare` takes what `data` returns.
    """

    model: nn.Module
    task: Task
    trunk: nn.Module | None = None
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    _cache: dict[str, Data] = field(default_factory=dict, repr=False, compare=False)
    _of: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def data(self, key: str, data: Data) -> Data:
        """The samples as this view's model takes them; `key`: the cache key (client and part)."""
        if self.trunk is None:
            return data
        state = self.trunk.state_dict()
        if self._of.keys() != state.keys() or not all(torch.equal(self._of[n], t) for n, t in state.items()):
            self._cache.clear()
            self._of.update({name: tensor.clone() for name, tensor in state.items()})
        if key not in self._cache:
            self.trunk.eval()
            with torch.no_grad():
                device = device_of(self.trunk)
                parts = [self.trunk(self.prepare(x.to(device))) for x in chunks(data.x)]
            self._cache[key] = Data(torch.cat(parts), data.y)
        return self._cache[key]


def view(task: Task, model: nn.Module, frozen: bool) -> View:
    """The view of a model. `frozen`: whether local training leaves the trunk unchanged."""
    if frozen and not task.settings.augment and isinstance(model, Multihead):
        return View(enable_cache(Heads(model)), replace(task, pipeline=None), model.trunk, task.prepare)
    return View(model, task)
