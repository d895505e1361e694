"""Book-keeping (Bu et al. 2023): the norms of single samples' gradients, and their clipped sum, from one backward pass.

    book = Book(model)                  # until book.close()
    values = losses(index)              # each learning layer's inputs are written down
    norms = book.norms(values)          # backward as far as the layers' outputs; no weight's gradient is made
    book.add(factors, gradients)        # gradients[name] += sum over samples of factor times the sample's gradient

A layer's gradient for one sample is a product of what went in and what came back. Its norm needs no such gradient where
two small products do (Goodfellow 2015; Li et al. 2022, "ghost"); where the gradient is smaller than those, as a
convolution's over many places is, it is made once and used for both norm and sum.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward, get_gradient_edge

from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import once

_AT_ONCE = 2**20
"""Numbers of a convolution's columns that are made at once; more are taken in pieces."""

_HELD: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()
"""Models that have been seen to keep samples apart, each with the layers that learned then."""


def covers(model: nn.Module) -> bool:
    """Whether every parameter that learns belongs to one layer of a covered kind, and to no other."""
    learning = [(module, name, p) for module in model.modules() for name, p in _own(module).items()]
    if len({id(p) for _, _, p in learning}) < len(learning):
        return False
    return all(
        # A subclass of a layer may compute something else.
        type(m) in _LAYERS and name in ("weight", "bias") and not (isinstance(m, nn.Embedding) and _unusual(m))
        for m, name, _ in learning
    )


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by their place in it."""
    return once(model, "modules by place", lambda: dict(model.named_modules()))


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters that learn, by name; `named_parameters` takes several times as long."""
    return {name: p for name, p in module._parameters.items() if p is not None and p.requires_grad}


class _Call(NamedTuple):
    """One use of a layer: its input, the input's version then, and where the gradient of its output will appear."""

    input: Tensor
    version: int
    edge: GradientEdge


def _writing(forward: Callable[[Tensor], Tensor], calls: list[_Call]) -> Callable[[Tensor], Tensor]:
    """A layer's forward, which writes down every use through which a gradient may come back."""

    def written(input: Tensor) -> Tensor:
        output = forward(input)
        if output.requires_grad:
            calls.append(_Call(input.detach(), input._version, get_gradient_edge(output)))
        return output

    return written


def _path(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _unusual(layer: nn.Embedding) -> bool:
    """Whether it changes its own weight, or its gradient depends on how often a token occurs in the batch."""
    return layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse


class Book:
    """Keeps the books of a model that `covers` accepts, until `close`. Its `requires_grad` flags must stay as they are."""

    def __init__(self, model: nn.Module) -> None:
        some = once(model, "layers", lambda: {place: m for place, m in modules_of(model).items() if m._parameters})
        self._layers = {place: layer for place, layer in some.items() if _own(layer)}
        self._kind = tuple(self._layers)
        self._held = self._kind in _HELD.setdefault(model, set())
        self._model = model
        self._calls: dict[str, list[_Call]] = {place: [] for place in self._layers}
        self._parts: dict[str, _Part] = {}
        # Ahead of hooks that add to a layer's output (LoRA, adapters): what is written down is the layer's own. A hook for
        # it would cost several times as much.
        self._before = {place: layer.__dict__.get("forward") for place, layer in self._layers.items()}
        for place, layer in self._layers.items():
            layer.__dict__["forward"] = _writing(layer.forward, self._calls[place])

    def close(self) -> None:
        """Let the layers be as they were."""
        for place, layer in self._layers.items():
            del layer.__dict__["forward"]
            if (before := self._before[place]) is not None:
                layer.__dict__["forward"] = before

    def forget(self) -> None:
        """Let go of what the last pass left."""
        for calls in self._calls.values():
            calls.clear()
        self._parts.clear()

    def norms(self, values: Tensor) -> Tensor:
        """The norm of each sample's gradient, float (n,), of losses (n,) that the model has just made.

        The first time that these layers of the model learn it is checked that every use of a parameter was by its own
        layer, and that no sample's loss touches what another sample's went through. Raises UserError if not.
        """
        n = len(values)
        if values.grad_fn is None:
            return values.new_zeros(n)
        if not self._held:
            self._hold_uses(values.grad_fn)
        calls = [call for some in self._calls.values() for call in some]
        if not calls:
            return values.new_zeros(n)
        for call in calls:
            if call.input._version != call.version:
                raise UserError("task.model: the input of a layer is changed in place after its use; leave that out")
            if call.input.shape[0] != n:
                raise UserError(
                    f"task.model: a layer sees {call.input.shape[0]} rows of a batch of {n}, so that single samples "
                    'cannot be told apart: keep the samples first, or write privacy.grad_sample = "hooks"'
                )
        edges = [call.edge for call in calls]
        hold = not self._held and n > 1
        # torch.autograd.grad but for its checks, which take as long as going back through a small network.
        whole, unused = (torch.ones_like(values),), True
        backs = _engine_run_backward((values,), whole, hold, False, tuple(edges), unused, accumulate_grad=False)
        if hold:
            self._hold_samples_apart(values, edges)
        squares, back_of = list[Tensor](), iter(backs)
        for place, layer in self._layers.items():
            seen = [(call.input, next(back_of)) for call in self._calls[place]]
            if pairs := [(x, back) for x, back in seen if back is not None]:
                for name, part in _LAYERS[type(layer)](layer, pairs).items():
                    self._parts[_path(place, name)] = part
                    squares.append(part.squares)
        return sum(squares[1:], start=squares[0]).sqrt() if squares else values.new_zeros(n)

    def add(self, factors: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Add to each gradient, by parameter name, the sum over the samples of their factors, float (n,), times theirs."""
        for name, part in self._parts.items():
            part.add(factors, gradients[name])

    def _hold_uses(self, loss: Node) -> None:
        nodes, found = _uses(loss)
        for place, layer in self._layers.items():
            for name, parameter in _own(layer).items():
                if found[id(parameter)] != sum(call.edge.node in nodes for call in self._calls[place]):
                    raise UserError(
                        "task.model: the layers' books show only a part of the gradient of single samples (of the parameter "
                        f'"{_path(place, name)}"): every parameter must be used by the forward() of its own module and '
                        "nowhere else"
                    )

    def _hold_samples_apart(self, values: Tensor, edges: list[GradientEdge]) -> None:
        """From the losses of every other sample nothing may come back to the others' rows."""
        some = torch.zeros_like(values)
        some[::2] = 1
        backs = torch.autograd.grad(values, edges, some, allow_unused=True)
        size = sum(
            float(back[1::2].abs().sum()) for back in backs if back is not None
        )  # not a number if a loss is not finite
        if size > 0:
            raise UserError(
                "task.model: what the model computes for one sample depends on the other samples of its batch, so that "
                "clipping bounds nothing: keep the samples apart, in the first dimension of every layer"
            )
        if size == 0:
            self._held = True
            _HELD[self._model].add(self._kind)


Pairs = list[tuple[Tensor, Tensor]]
"""For each use of a layer: its input, and the gradient with respect to its output."""

Add = Callable[[Tensor, Tensor], None]
"""Adds to a gradient (second, of the parameter's shape) the sum over samples of factors (first, (n,)) times theirs."""


@dataclass(frozen=True)
class _Part:
    """One parameter of a layer: the squared norm of each sample's gradient, (n,), and what adds to the gradient."""

    squares: Tensor
    add: Add


def _linear(layer: nn.Linear, pairs: Pairs) -> dict[str, _Part]:
    if len(pairs) == 1 and pairs[0][0].ndim == 2:
        ((x, back),) = pairs
        bias = _rows(back)

        def add(factors: Tensor, gradient: Tensor) -> None:
            gradient.addmm_((factors[:, None] * back).T, x)

        return _learning(layer, lambda: _Part(_squares(x).mul_(bias.squares), add), lambda: bias)
    inputs = _one([x.reshape(len(x), -1, layer.in_features) for x, _ in pairs])
    backs = _one([back.reshape(len(back), -1, layer.out_features) for _, back in pairs])
    return _learning(layer, lambda: _products(lambda some: inputs[some], backs), lambda: _rows(backs.sum(1)))


def _convolution(layer: nn.Conv1d | nn.Conv2d, pairs: Pairs) -> dict[str, _Part]:
    """A linear layer at each place of the output, of what that place sees of the input (im2col)."""
    groups, kernel = layer.groups, (1, *layer.kernel_size)[-2:]
    # What is copied goes by runs of numbers that lie side by side: along a row of places where there are few channels.
    by_rows = kernel[1] * layer.in_channels // groups < pairs[0][1].shape[-1]
    views = [_seen(layer, x, by_rows) for x, _ in pairs]
    # (n, out, *places) -> (n, places, out), which is no copy where the channels are last already
    backs = _one([back.flatten(2).transpose(1, 2) for _, back in pairs])

    def columns(some: slice) -> Tensor:
        parts = [view[some].flatten(0, 1) for view in views]
        width = math.prod(kernel) * layer.in_channels // groups
        if by_rows:
            return _one([part.permute(0, 3, 4, 5, 1, 2).reshape(len(part), width, -1) for part in parts], 2).mT
        return _one([part.reshape(len(part), -1, width) for part in parts])

    def weight() -> _Part:
        grouped = backs.reshape(*backs.shape[:2], groups, -1).transpose(1, 2).flatten(0, 1)
        part = _products(columns, grouped, groups)

        def add(factors: Tensor, gradient: Tensor) -> None:
            summed = torch.zeros_like(gradient).reshape(len(gradient), *kernel, -1)
            part.add(factors, summed)
            gradient += summed.movedim(-1, 1).reshape(gradient.shape)

        return _Part(part.squares, add)

    return _learning(layer, weight, lambda: _rows(backs.sum(1)))


def _embedding(layer: nn.Embedding, pairs: Pairs) -> dict[str, _Part]:
    tokens = _one([ids.reshape(len(ids), -1) for ids, _ in pairs])
    backs = _one([back.reshape(len(back), -1, layer.embedding_dim) for _, back in pairs])
    if layer.padding_idx is not None:  # it learns nothing
        backs = backs * (tokens != layer.padding_idx)[..., None]
    same = tokens[:, :, None] == tokens[:, None, :]

    def add(factors: Tensor, gradient: Tensor) -> None:
        gradient.index_add_(0, tokens.flatten(), (factors[:, None, None] * backs).flatten(0, 1))

    return {"weight": _Part((same * (backs @ backs.mT)).sum((1, 2)), add)}


def _norm(layer: nn.GroupNorm | nn.LayerNorm, pairs: Pairs) -> dict[str, _Part]:
    def summed(values: Tensor) -> Tensor:
        """Over the places of each sample: (n, numbers of the weight)."""
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


_LAYERS: dict[type[nn.Module], Callable[[Any, Pairs], dict[str, _Part]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.GroupNorm: _norm,
    nn.LayerNorm: _norm,
}


def _learning(layer: nn.Module, weight: Callable[[], _Part], bias: Callable[[], _Part]) -> dict[str, _Part]:
    """The parts of the parameters that learn."""
    parts, learning = {"weight": weight, "bias": bias}, _own(layer)
    return {name: part() for name, part in parts.items() if name in learning}


def _rows(rows: Tensor) -> _Part:
    """Of single samples' gradients themselves, (n, numbers of the parameter)."""

    def add(factors: Tensor, gradient: Tensor) -> None:
        gradient.view(1, -1).addmm_(factors[None], rows)

    return _Part(_squares(rows), add)


def _products(columns: Callable[[slice], Tensor], backs: Tensor, groups: int = 1) -> _Part:
    """Of gradients that are sums over places of backs x columns: backs (n groups, places, out); columns of some samples,
    (their number x groups, places, in). By Gram matrices over places (ghost norms) where those are the smaller."""
    n, places, out = len(backs) // groups, *backs.shape[1:]
    width = columns(slice(0, 1)).shape[-1]
    each = max(1, _AT_ONCE // (groups * places * width))
    some = [slice(begin, min(begin + each, n)) for begin in range(0, n, each)]
    if groups == 1 and 2 * places * places < out * width:
        grams = [((c := columns(s)) @ c.mT * (backs[s] @ backs[s].mT)).sum((1, 2)) for s in some]

        def add(factors: Tensor, gradient: Tensor) -> None:
            for s in some:
                weighted = factors[s, None, None] * backs[s]
                gradient.view(out, width).addmm_(weighted.flatten(0, 1).T, columns(s).flatten(0, 1))

        return _Part(torch.cat(grams), add)
    made = backs.new_empty(len(backs), out, width)
    for s in some:
        them = slice(s.start * groups, s.stop * groups)
        torch.bmm(backs[them].mT, columns(s), out=made[them])
    return _rows(made.view(n, -1))


def _seen(layer: nn.Conv1d | nn.Conv2d, x: Tensor, by_rows: bool) -> Tensor:
    """What each place of a convolution's output sees, a view: (n, groups, height, width, *kernel, channels of a group);
    height and the kernel's first side are 1 if there is one dimension. In memory the rows come last, or the channels."""
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


def _one(parts: list[Tensor], dim: int = 1) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _squares(rows: Tensor) -> Tensor:
    """The squared norm of each row, (n,)."""
    squares: Tensor = torch.linalg.vecdot(rows, rows)
    return squares


def _uses(loss: Node) -> tuple[set[Node], Counter[int]]:
    """All nodes of the graph that ends in a loss, and how often it uses each parameter, by id."""
    nodes, todo, found = {loss}, [loss], Counter[int]()
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is None:
                continue
            if (variable := getattr(node, "variable", None)) is not None:
                found[id(variable)] += 1
            elif node not in nodes:
                nodes.add(node)
                todo.append(node)
    return nodes, found
