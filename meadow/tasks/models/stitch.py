"""Cross-stitch networks (Misra et al. 2016): one trunk per target, whose feature maps are mixed after each layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from meadow.runtime.errors import UserError
from meadow.tasks.data import Target
from meadow.tasks.models.peft import Layer

OWN, OTHERS = 0.9, 0.1
"""Initial weights of a trunk's own feature map, and of all others together (section 4.2)."""

COLUMNS = "trunk.columns."
"""Prefix of the coupled trunks' state names; the trunk's number and its own state name follow."""


class Unit(nn.Module):
    """Mixes K feature maps channel by channel: out_i = sum_j alpha_ijc in_j (equation 1, a matrix for each channel)."""

    def __init__(self, columns: int, channels: int) -> None:
        super().__init__()
        alpha = torch.full((columns, columns, channels), OTHERS / max(1, columns - 1))
        alpha[range(columns), range(columns)] = OWN if columns > 1 else 1.0
        self.alpha = nn.Parameter(alpha)

    def forward(self, maps: Tensor) -> Tensor:
        """maps (n, K, channels, ...) -> the same shape; samples first, as Opacus expects."""
        return torch.einsum("ijc,njc...->nic...", self.alpha, maps)


class Coupled(nn.Module):
    """K equal trunks with a unit after each stage: x (n, *shape) -> features (n, K * width)."""

    def __init__(self, columns: Sequence[nn.Sequential], stages: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.columns = nn.ModuleList(columns)
        self.units = nn.ModuleList([Unit(len(columns), channels) for _, _, channels in stages])
        self._bounds = [(first, last) for first, last, _ in stages]

    def forward(self, x: Tensor) -> Tensor:
        maps = [x] * len(self.columns)
        for (first, last), unit in zip(self._bounds, self.units, strict=True):
            stacked = torch.stack(
                [cast(nn.Sequential, c)[first:last](m) for c, m in zip(self.columns, maps, strict=True)], 1
            )
            maps = list(unit(stacked).unbind(1))
        return torch.cat([cast(nn.Sequential, c)[last:](m) for c, m in zip(self.columns, maps, strict=True)], 1)


class Own(nn.Module):
    """A head on its own trunk's features, `first` to first + width."""

    def __init__(self, head: nn.Module, first: int, width: int) -> None:
        super().__init__()
        self.head = head
        self._part = slice(first, first + width)

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.head(features[:, self._part]))


def couple(
    make: Callable[[str], nn.Module], width: int, heads: Mapping[str, nn.Module], targets: Sequence[Target], model: str
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Couple one trunk per target, `make(target name)`, and give each head (of `width` features) its own.

    A stage is a linear layer or convolution with the norm, activation, pooling and dropout after it. Raises UserError if
    the trunk of `model` is not a sequence of these.
    """
    columns = []
    for target in targets:
        column = make(target.name)
        if not isinstance(column, nn.Sequential) or not any(isinstance(m, Layer) for m in column):
            raise UserError(
                f'task.trunks = "cross-stitch" with task.model = "{model}": this model is not a sequence of layers, so '
                'trunks cannot be coupled; use "mlp", "cnn", "lenet", "mcmahan-cnn" or "cnn1d", or task.trunks = "shared"'
            )
        columns.append(column)
    return Coupled(columns, _stages(columns[0])), {
        t.name: Own(heads[t.name], i * width, width) for i, t in enumerate(targets)
    }


def _stages(column: nn.Sequential) -> list[tuple[int, int, int]]:
    """(first, last, channels) of each stage, which has the modules first to last - 1."""
    modules = list(column)
    at = [i for i, m in enumerate(modules) if isinstance(m, Layer)]
    stages, first = [], 0
    for i, following in zip(at, [*at[1:], len(modules)], strict=True):
        last = next((k for k in range(i + 1, following) if not _keeps_channels(modules[k])), following)
        layer = cast(Layer, modules[i])
        stages.append((first, last, layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels))
        first = last
    return stages


def _keeps_channels(module: nn.Module) -> bool:
    kinds = ("activation", "batchnorm", "dropout", "normalization", "pooling")
    return type(module).__module__ in {f"torch.nn.modules.{kind}" for kind in kinds}
