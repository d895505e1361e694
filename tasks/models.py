"""The models: a trunk that turns a sample into features, and a linear head for each target.

State names are `trunk.*` and `heads.<target>.*`; everything that shares, freezes or personalises goes by them. There
are no batch statistics in any model (GroupNorm, Wu and He 2018), so a model has no buffer that would travel or leak.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.errors import UserError
from config.load import nearest
from config.schema import Task
from config.seeds import torch_seeded
from tasks.data import Dataset, Target


@dataclass(frozen=True)
class Inputs:
    """What a model is built for: the shape of one prepared sample, and how many tokens there are (0: no tokens)."""

    shape: tuple[int, ...]
    tokens: int = 0


def inputs(dataset: Dataset) -> Inputs:
    """What a model for this data set takes."""
    return Inputs(tuple(dataset.train.x.shape[1:]), dataset.tokens)


def build(task: Task, targets: Sequence[Target], inputs: Inputs, seed: int = 0) -> nn.Module:
    """The model of `task.model` and `task.hidden` for samples of this form, with a head for each target, in order.

    Initial weights (torch's defaults: He et al. 2015, uniform with bound 1/sqrt(fan-in)) are a function of `seed`: the
    trunk's of (seed, "init", "trunk"), a head's of (seed, "init", "heads", name), so that methods with more or fewer
    heads start from the same trunk. Raises UserError if the model cannot take samples of this shape.
    """
    with torch_seeded(seed, "init", "trunk"):
        trunk, features = _trunk(task, inputs)
    heads: dict[str, nn.Module] = {}
    for target in targets:
        with torch_seeded(seed, "init", "heads", target.name):
            head = nn.Linear(features, target.size)
            heads[target.name] = Gated(features, head) if task.gated else head
    return Multihead(trunk, heads, {target.name: target.kind == "value" for target in targets})


class Multihead(nn.Module):
    """A trunk and its heads. `forward`: x (n, *shape) as `Task.prepare` gives it -> {target: output}.

    Outputs: logits (n, classes) or (n, labels); (n,) of a value; (n, quantiles). Of a trunk that gives features for
    each token, (n, length, features), logits are (n, classes, length), as `torch.nn.functional.cross_entropy` takes
    them. `on_features` is the second half of `forward` alone.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module], is_value: Mapping[str, bool]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self._is_value = is_value

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.on_features(self.trunk(x))

    def on_features(self, features: Tensor) -> dict[str, Tensor]:
        """The heads' outputs for the trunk's features, float32 (n, features) or (n, length, features)."""
        outputs = {name: cast(Tensor, head(features)) for name, head in self.heads.items()}
        if features.ndim == 3:
            return {name: out.movedim(-1, 1) for name, out in outputs.items()}
        return {name: out.squeeze(-1) if self._is_value[name] else out for name, out in outputs.items()}


class Gated(nn.Module):
    """A head that looks at what it needs of the features h: linear(h * sigmoid(gate(h))), elementwise."""

    def __init__(self, features: int, linear: nn.Linear) -> None:
        super().__init__()
        self.gate = nn.Linear(features, features)
        self.linear = linear

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.linear(h * torch.sigmoid(self.gate(h))))


def _trunk(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """The trunk of `task.model`, and how many features it gives."""
    if task.model == "mlp":
        return _mlp(task.hidden, inputs.shape), task.hidden
    if task.model == "cnn":
        return _cnn(task.hidden, inputs.shape), task.hidden
    raise UserError(f'task.model = "{task.model}": there is no such model{nearest(task.model, MODELS)}')


MODELS = ("mlp", "cnn")


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
