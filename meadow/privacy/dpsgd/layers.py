"""Squared norms and weighted sums of per-example gradients, from a layer's inputs and the gradients of its outputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT_ONCE = 2**20
"""Scalars of a convolution's im2col columns computed at once; more are computed in pieces."""


def own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own learning parameters by name; `named_parameters` takes several times as long."""
    return {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}


Pairs = list[tuple[Tensor, Tensor]]
"""(input, gradient of the output) of each use of a layer."""

Add = Callable[[Tensor, Tensor], None]
"""(factors (n,), gradient of the parameter's shape): adds to it the samples' gradients weighted by the factors."""


@dataclass(frozen=True)
class Part:
    """One parameter of a layer: each sample's squared gradient norm, (n,), and the function of the weighted sum."""

    squares: Tensor
    add: Add


def _linear(layer: nn.Linear, pairs: Pairs) -> dict[str, Part]:
    if len(pairs) == 1 and pairs[0][0].ndim == 2:
        ((x, back),) = pairs
        bias = _rows(back)

        def add(factors: Tensor, gradient: Tensor) -> None:
            gradient.addmm_((factors[:, None] * back).T, x)

        return _learning(layer, lambda: Part(_squares(x).mul_(bias.squares), add), lambda: bias)
    inputs = _concatenated([x.reshape(len(x), -1, layer.in_features) for x, _ in pairs])
    backs = _concatenated([back.reshape(len(back), -1, layer.out_features) for _, back in pairs])
    return _learning(layer, lambda: _products(lambda some: inputs[some], backs), lambda: _rows(backs.sum(1)))


def _convolution(layer: nn.Conv1d | nn.Conv2d, pairs: Pairs) -> dict[str, Part]:
    """A convolution as a linear layer at each place of the output, applied to its input patch (im2col)."""
    groups, kernel = layer.groups, (1, *layer.kernel_size)[-2:]
    # Copies are fast along contiguous runs: choose rows of places if there are few channels.
    by_rows = kernel[1] * layer.in_channels // groups < pairs[0][1].shape[-1]
    views = [_patches(layer, x, by_rows) for x, _ in pairs]
    # (n, out, *places) -> (n, places, out); no copy for channels_last
    backs = _concatenated([back.flatten(2).transpose(1, 2) for _, back in pairs])

    def columns(some: slice) -> Tensor:
        parts = [view[some].flatten(0, 1) for view in views]
        width = math.prod(kernel) * layer.in_channels // groups
        if by_rows:
            return _concatenated([part.permute(0, 3, 4, 5, 1, 2).reshape(len(part), width, -1) for part in parts], 2).mT
        return _concatenated([part.reshape(len(part), -1, width) for part in parts])

    def weight() -> Part:
        grouped = backs.reshape(*backs.shape[:2], groups, -1).transpose(1, 2).flatten(0, 1)
        part = _products(columns, grouped, groups)

        def add(factors: Tensor, gradient: Tensor) -> None:
            summed = torch.zeros_like(gradient).reshape(len(gradient), *kernel, -1)
            part.add(factors, summed)
            gradient += summed.movedim(-1, 1).reshape(gradient.shape)

        return Part(part.squares, add)

    return _learning(layer, weight, lambda: _rows(backs.sum(1)))


def _embedding(layer: nn.Embedding, pairs: Pairs) -> dict[str, Part]:
    tokens = _concatenated([ids.reshape(len(ids), -1) for ids, _ in pairs])
    backs = _concatenated([back.reshape(len(back), -1, layer.embedding_dim) for _, back in pairs])
    if layer.padding_idx is not None:  # it learns nothing
        backs = backs * (tokens != layer.padding_idx)[..., None]
    same = tokens[:, :, None] == tokens[:, None, :]

    def add(factors: Tensor, gradient: Tensor) -> None:
        gradient.index_add_(0, tokens.flatten(), (factors[:, None, None] * backs).flatten(0, 1))

    return {"weight": Part((same * (backs @ backs.mT)).sum((1, 2)), add)}


def _norm(layer: nn.GroupNorm | nn.LayerNorm, pairs: Pairs) -> dict[str, Part]:
    def summed(values: Tensor) -> Tensor:
        """Sum over the places of each sample: (n, size of the weight)."""
        if isinstance(layer, nn.GroupNorm):
            return values.reshape(*values.shape[:2], -1).sum(2)
        return values.reshape(len(values), -1, layer.weight.numel()).sum(1)

    def normal(x: Tensor) -> Tensor:
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, eps=layer.eps)
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)

    return _learning(
        layer,
        lambda: _rows(torch.stack([summed(normal(x) * back) for x, back in pairs]).sum(0)),
        lambda: _rows(torch.stack([summed(back) for _, back in pairs]).sum(0)),
    )


LAYERS: dict[type[nn.Module], Callable[[Any, Pairs], dict[str, Part]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.GroupNorm: _norm,
    nn.LayerNorm: _norm,
}


def _learning(layer: nn.Module, weight: Callable[[], Part], bias: Callable[[], Part]) -> dict[str, Part]:
    """The parts of those parameters that learn."""
    parts, learning = {"weight": weight, "bias": bias}, own(layer)
    return {name: part() for name, part in parts.items() if name in learning}


def _rows(rows: Tensor) -> Part:
    """The part of a parameter whose per-example gradients are given, (n, size of the parameter)."""

    def add(factors: Tensor, gradient: Tensor) -> None:
        gradient.view(1, -1).addmm_(factors[None], rows)

    return Part(_squares(rows), add)


def _products(columns: Callable[[slice], Tensor], backs: Tensor, groups: int = 1) -> Part:
    """The part of a parameter whose gradients are sums over places of backs x columns; backs: (n groups, places, out).

    columns(slice of samples): (samples x groups, places, in). Uses Gram matrices over places (ghost norms) if they are
    smaller than the gradients.
    """
    n, places, out = len(backs) // groups, *backs.shape[1:]
    width = columns(slice(0, 1)).shape[-1]
    each = max(1, AT_ONCE // (groups * places * width))
    some = [slice(begin, min(begin + each, n)) for begin in range(0, n, each)]
    if groups == 1 and 2 * places * places < out * width:
        grams = [((c := columns(s)) @ c.mT * (backs[s] @ backs[s].mT)).sum((1, 2)) for s in some]

        def add(factors: Tensor, gradient: Tensor) -> None:
            for s in some:
                weighted = factors[s, None, None] * backs[s]
                gradient.view(out, width).addmm_(weighted.flatten(0, 1).T, columns(s).flatten(0, 1))

        return Part(torch.cat(grams), add)
    made = backs.new_empty(len(backs), out, width)
    for s in some:
        them = slice(s.start * groups, s.stop * groups)
        torch.bmm(backs[them].mT, columns(s), out=made[them])
    return _rows(made.view(n, -1))


def _patches(layer: nn.Conv1d | nn.Conv2d, x: Tensor, by_rows: bool) -> Tensor:
    """The input patch of each place of a convolution's output, a view: (n, groups, height, width, *kernel, channels of a
    group); in 1-D height and the kernel's first side are 1. In memory the rows are contiguous, or the channels."""
    one = isinstance(layer, nn.Conv1d)
    around = layer._reversed_padding_repeated_twice
    if any(around):
        x = F.pad(x, around, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    x = x[:, :, None] if one else x
    x = x.contiguous() if by_rows else x.contiguous(memory_format=torch.channels_last)
    x = x.unflatten(1, (layer.groups, -1)).movedim(2, -1)  # type: ignore[no-untyped-call]
    sizes = [(1, *side)[-2:] for side in (layer.kernel_size, layer.stride, layer.dilation)]
    for axis, kernel, stride, dilation in zip((2, 3), *sizes, strict=True):
        x = x.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    seen: Tensor = x.movedim(4, -1)
    return seen


def _concatenated(parts: list[Tensor], dim: int = 1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _squares(rows: Tensor) -> Tensor:
    """The squared norm of each row, (n,)."""
    squares: Tensor = torch.linalg.vecdot(rows, rows)
    return squares
