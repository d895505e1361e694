"""The models: a trunk that turns a sample into features, and a linear head for each target.

State names are `trunk.*` and `heads.<target>.*`; everything that shares, freezes or personalises goes by them. There
are no batch statistics in any model (GroupNorm, Wu and He 2018), so a model has no buffer that would travel or leak.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from config.errors import UserError
from config.schema import Task
from config.seeds import torch_seeded
from tasks.data import Target


def build(task: Task, targets: Sequence[Target], shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """The model of `task.model` and `task.hidden` for samples of `shape`, with a head for each target, in order.

    Initial weights (torch's defaults: He et al. 2015, uniform with bound 1/sqrt(fan-in)) are a function of `seed`: the
    trunk's of (seed, "init", "trunk"), a head's of (seed, "init", "heads", name), so that methods with more or fewer
    heads start from the same trunk. Raises UserError if the model cannot take samples of this shape.
    """
    with torch_seeded(seed, "init", "trunk"):
        trunk = _mlp(task.hidden, shape) if task.model == "mlp" else _cnn(task.hidden, shape)
    heads = {}
    for target in targets:
        with torch_seeded(seed, "init", "heads", target.name):
            heads[target.name] = nn.Linear(task.hidden, target.size)
    return Multihead(trunk, heads, {target.name: target.kind == "value" for target in targets})


class Multihead(nn.Module):
    """A trunk and its heads. `forward`: x float32 (n, *shape) -> {target: logits (n, classes), or values (n,)}."""

    def __init__(self, trunk: nn.Module, heads: dict[str, nn.Linear], is_value: dict[str, bool]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self._is_value = is_value

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        outputs = {name: cast(Tensor, head(features)) for name, head in self.heads.items()}
        return {name: out.squeeze(-1) if self._is_value[name] else out for name, out in outputs.items()}


FEATURE_NORM_SQUARED = 8.0


class BoundedFeatures(nn.Module):
    """Centre each sample's features (n, hidden) and scale them to squared length 8: layer normalisation (Ba et al.
    2016) without parameters, times sqrt(8 / hidden).

    A head's loss has curvature at most 2 (8 + 1) then, whatever the trunk has learned: gradient descent on a value
    head is stable for lr < 2 / 18, and with momentum 0.9 for lr < 3.8 / 18. A trunk of a source task gives features of
    squared length 300 without it, on which a value head at lr = 0.05 goes to infinity.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.shape[-1]
        return F.layer_norm(x, (hidden,)) * math.sqrt(FEATURE_NORM_SQUARED / hidden)


def _mlp(hidden: int, shape: tuple[int, ...]) -> nn.Sequential:
    """Flatten, two hidden layers of `hidden` units with ReLU, `BoundedFeatures`: (n, *shape) -> (n, hidden)."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            flatten=nn.Flatten(),
            linear1=nn.Linear(math.prod(shape), hidden),
            relu1=nn.ReLU(),
            linear2=nn.Linear(hidden, hidden),
            relu2=nn.ReLU(),
            bounded=BoundedFeatures(),
        )
    )


def _cnn(hidden: int, shape: tuple[int, ...]) -> nn.Sequential:
    """Twice 3x3 convolution, GroupNorm, ReLU and 2x2 pooling, then a linear layer with ReLU, and `BoundedFeatures`:
    (n, c, h, w) -> (n, hidden).

    The convolutions have hidden // 2 (at least 1) and `hidden` channels. Not adaptive pooling: its gradient has no
    deterministic kernel on a GPU.
    """
    if len(shape) != 3 or min(shape[1:]) < 2:
        raise UserError(
            f'task.model = "cnn" needs images (channels, height, width), not {shape}: use task.model = "mlp"'
        )
    channels, height, width = shape
    narrow = max(1, hidden // 2)
    pooled = hidden * math.ceil(math.ceil(height / 2) / 2) * math.ceil(math.ceil(width / 2) / 2)
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(channels, narrow, 3, padding=1),
            norm1=nn.GroupNorm(math.gcd(8, narrow), narrow),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2, ceil_mode=True),
            conv2=nn.Conv2d(narrow, hidden, 3, padding=1),
            norm2=nn.GroupNorm(math.gcd(8, hidden), hidden),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2, ceil_mode=True),
            flatten=nn.Flatten(),
            linear=nn.Linear(pooled, hidden),
            relu3=nn.ReLU(),
            bounded=BoundedFeatures(),
        )
    )
