"""Models: a trunk that turns a sample into features, and a head for each target.

State names are `trunk.*` and `heads.<target>.*`; sharing, freezing and personalisation use them. The trunks are in
`meadow/tasks/models/networks.py` (Meadow's) and `meadow/tasks/models/backbones.py` (torchvision's and transformers').
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from meadow.config.load import nearest
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.runtime.limits import check_fits
from meadow.runtime.objects import user_object
from meadow.runtime.seeds import torch_seeded
from meadow.tasks.data import Dataset, Inputs, Target
from meadow.tasks.models import networks
from meadow.tasks.models.backbones import TRANSFORMERS, torchvision_names, torchvision_trunk, transformers_trunk
from meadow.tasks.models.stitch import couple


def inputs(dataset: Dataset) -> Inputs:
    """The inputs of a model for this data set."""
    return Inputs(tuple(dataset.train.x.shape[1:]), dataset.tokens)


def build(task: Task, targets: Sequence[Target], inputs: Inputs, seed: int = 0) -> nn.Module:
    """Build `task.model` for these inputs, with a head for each target, in order.

    Initial weights (torch's defaults: He et al. 2015, uniform with bound 1/sqrt(fan-in)) depend on `seed`: the trunk's on
    (seed, "init", "trunk"), a head's on (seed, "init", "heads", name), so that methods with different heads start from
    the same trunk; coupled trunks' on (seed, "init", "trunk", name). The heads are float64 if the trunk is. Raises UserError
    if the model cannot take samples of this shape.
    """
    if task.model in OWN:
        with torch.device("meta"):  # shapes without memory
            large, features = OWN[task.model](task, inputs)
        count = sum(p.numel() for p in large.parameters()) + sum(features * target.size for target in targets)
        check_fits(f"task.hidden = {task.hidden}: {task.model} with {count:,} weights and their gradients", 8 * count)
    with torch_seeded(seed, "init", "trunk"):
        trunk, features = _trunk(task)(task, inputs)
    heads: dict[str, nn.Module] = {}
    for target in targets:
        with torch_seeded(seed, "init", "heads", target.name):
            head = nn.Linear(features, target.size)
            heads[target.name] = Gated(features, head) if task.gated else head
    if task.trunks == "cross-stitch":

        def column(name: str) -> nn.Module:
            with torch_seeded(seed, "init", "trunk", name):
                return _trunk(task)(task, inputs)[0]

        trunk, heads = couple(column, features, heads, targets, task.model)
    model = Multihead(trunk, heads, {target.name: target.kind == "value" for target in targets})
    return model.double() if any(p.dtype == torch.float64 for p in trunk.parameters()) else model


class Multihead(nn.Module):
    """A trunk and its heads. `forward`: x (n, *shape) as `Task.prepare` gives it -> {target: output}.

    Outputs: logits (n, classes) or (n, labels); (n,) for a value; (n, quantiles). If the trunk returns features per token,
    (n, length, features), logits are (n, classes, length), as `torch.nn.functional.cross_entropy` expects.
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
    """A head with a gate on the features h: linear(h * sigmoid(gate(h)))."""

    def __init__(self, features: int, linear: nn.Linear) -> None:
        super().__init__()
        self.gate = nn.Linear(features, features)
        self.linear = linear

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.linear(h * torch.sigmoid(self.gate(h))))


class TwoDomains(nn.Linear):
    """A head on augmented features (Daume 2007): (h, h, 0) for source features h, (h, 0, h) for target features.

    It takes features (n, width) of target samples, as in evaluation, or augmented ones, (n, 3 width). The shared weights
    start as those of the plain head, the domains' own weights at 0.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(3 * plain.in_features, plain.out_features)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, : plain.in_features] = plain.weight
            self.bias.copy_(plain.bias)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h if h.shape[-1] == self.in_features else augmented(h, source=False))


def with_domains(model: nn.Module) -> nn.Module:
    """Replace each linear head of the model with `TwoDomains`, in place."""
    heads = cast(nn.ModuleDict, model.heads)
    for name, head in list(heads.items()):
        heads[name] = TwoDomains(cast(nn.Linear, head))
    return model


def augmented(h: Tensor, source: bool) -> Tensor:
    """Augment features (n, width) to (n, 3 width): (h, h, 0) or (h, 0, h)."""
    none = torch.zeros_like(h)
    return torch.cat([h, h, none] if source else [h, none, h], -1)


Trunk = Callable[[Task, Inputs], tuple[nn.Module, int]]
"""Builds a trunk: (settings, inputs) -> (module, number of features)."""

OWN: dict[str, Trunk] = {
    "mlp": networks.mlp,
    "cnn": networks.cnn,
    "lenet": networks.lenet,
    "mcmahan-cnn": networks.mcmahan_cnn,
    "cnn1d": networks.cnn1d,
    "bilstm": networks.bilstm,
    "charlstm": networks.charlstm,
}


def _trunk(task: Task) -> Trunk:
    if task.model in OWN:
        return OWN[task.model]
    if task.model.startswith(TRANSFORMERS):
        return transformers_trunk
    if ":" in task.model:
        found = user_object("task.model", task.model)
        if not callable(found):
            raise UserError(f'task.model = "{task.model}": it is not a function; docs/models.md says what it must be')
        return found
    if task.model in torchvision_names():
        return torchvision_trunk
    raise UserError(
        f'task.model = "{task.model}": there is no such model{nearest(task.model, [*OWN, *torchvision_names()])}; write '
        f"{', '.join(OWN)}, a torchvision classification model, transformers:NAME, or your own module:object"
    )
