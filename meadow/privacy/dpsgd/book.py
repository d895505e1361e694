"""Book-keeping (Bu et al. 2023): compute per-example gradient norms and the clipped sum in one backward pass.

    book = Book(model)                  # until book.close()
    values = losses(index)              # records each learning layer's inputs
    norms = book.norms(values)          # backward to the layers' outputs, without gradients of weights
    book.add(factors, gradients)        # gradients[name] += sum over samples of factor times the sample's gradient

A layer's gradient for a sample is a product of its input and the gradient of its output. The norm follows from two small
products without the gradient itself (Goodfellow 2015; Li et al. 2022, "ghost"). Where the gradient is the smaller one, as
in convolutions over many places, it is computed once for both norm and sum.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward, get_gradient_edge

from meadow.privacy.dpsgd.layers import LAYERS, Part, own
from meadow.privacy.dpsgd.mechanism import ClippedSum, Mechanism, Sums
from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import cached

_CHECKED: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()
"""Models checked to keep samples apart, with the sets of learning layers for which this was checked."""


def covers(model: nn.Module) -> bool:
    """Whether every parameter that learns belongs to exactly one layer, of a covered kind."""
    learning = [(module, name, p) for module in model.modules() for name, p in own(module).items()]
    if len({id(p) for _, _, p in learning}) < len(learning):
        return False
    return all(
        # A subclass of a layer may compute something else.
        type(m) in LAYERS and name in ("weight", "bias") and not (isinstance(m, nn.Embedding) and _unusual(m))
        for m, name, _ in learning
    )


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name."""
    return cached(model, "modules by place", lambda: dict(model.named_modules()))


class _Call(NamedTuple):
    """One use of a layer: its input, the input's version at that time, and the graph's edge at its output."""

    input: Tensor
    version: int
    edge: GradientEdge


def _writing(forward: Callable[[Tensor], Tensor], calls: list[_Call]) -> Callable[[Tensor], Tensor]:
    """Wrap a layer's forward so that it records every call with an output that requires a gradient."""

    def written(input: Tensor) -> Tensor:
        output = forward(input)
        if output.requires_grad:
            calls.append(_Call(input.detach(), input._version, get_gradient_edge(output)))
        return output

    return written


def _path(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _unusual(layer: nn.Embedding) -> bool:
    """Whether the layer changes its own weight, or its gradient is sparse or depends on token counts of the batch."""
    return layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse


class Book:
    """The books of a model that `covers` accepts, until `close`. Its `requires_grad` flags must not change meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        some = cached(model, "layers", lambda: {place: m for place, m in modules_of(model).items() if m._parameters})
        self._layers = {place: layer for place, layer in some.items() if own(layer)}
        self._kind = tuple(self._layers)
        self._checked = self._kind in _CHECKED.setdefault(model, set())
        self._model = model
        self._calls: dict[str, list[_Call]] = {place: [] for place in self._layers}
        self._parts: dict[str, Part] = {}
        # `forward` runs before hooks that add to the layer's output (LoRA, adapters), so the layer's own output is recorded;
        # a hook for this would cost several times as much.
        self._before = {place: layer.__dict__.get("forward") for place, layer in self._layers.items()}
        for place, layer in self._layers.items():
            layer.__dict__["forward"] = _writing(layer.forward, self._calls[place])

    def close(self) -> None:
        """Restore the layers."""
        for place, layer in self._layers.items():
            del layer.__dict__["forward"]
            if (before := self._before[place]) is not None:
                layer.__dict__["forward"] = before

    def forget(self) -> None:
        """Drop the records of the last pass."""
        for calls in self._calls.values():
            calls.clear()
        self._parts.clear()

    def norms(self, values: Tensor) -> Tensor:
        """The norm of each sample's gradient, float (n,), of losses (n,) that the model has just computed.

        The first pass for a set of learning layers checks that only its own layer uses a parameter, and that no sample's
        loss depends on another sample's activations. Raises UserError if not.
        """
        n = len(values)
        if values.grad_fn is None:
            return values.new_zeros(n)
        if not self._checked:
            self._check_uses(values.grad_fn)
        calls = [call for some in self._calls.values() for call in some]
        if not calls:
            return values.new_zeros(n)
        for call in calls:
            if call.input._version != call.version:
                raise UserError(
                    "task.model: a layer's input is changed in place after its use; make a new tensor instead, or write "
                    'privacy.grad_sample = "loop", which is slow and always works'
                )
            if call.input.shape[0] != n:
                raise UserError(
                    f"task.model: a layer sees {call.input.shape[0]} rows of a batch of {n}, so that single samples "
                    'cannot be told apart: keep the samples first, or write privacy.grad_sample = "hooks"'
                )
        edges = [call.edge for call in calls]
        check = not self._checked and n > 1
        # torch.autograd.grad without its checks, which take as long as the backward pass of a small network.
        whole, unused = (torch.ones_like(values),), True
        backs = _engine_run_backward((values,), whole, check, False, tuple(edges), unused, accumulate_grad=False)
        if check:
            self._check_independence(values, edges)
        squares, back_of = list[Tensor](), iter(backs)
        for place, layer in self._layers.items():
            seen = [(call.input, next(back_of)) for call in self._calls[place]]
            if pairs := [(x, back) for x, back in seen if back is not None]:
                for name, part in LAYERS[type(layer)](layer, pairs).items():
                    self._parts[_path(place, name)] = part
                    squares.append(part.squares)
        return sum(squares[1:], start=squares[0]).sqrt() if squares else values.new_zeros(n)

    def add(self, factors: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Add to each gradient, by parameter name, the samples' gradients weighted by factors, float (n,)."""
        for name, part in self._parts.items():
            part.add(factors, gradients[name])

    def _check_uses(self, loss: Node) -> None:
        nodes, found = _uses(loss)
        for place, layer in self._layers.items():
            for name, parameter in own(layer).items():
                if found[id(parameter)] != sum(call.edge.node in nodes for call in self._calls[place]):
                    raise UserError(
                        "task.model: the layers' books show only a part of the gradient of single samples (of the parameter "
                        f'"{_path(place, name)}"): every parameter must be used by the forward() of its own module and '
                        'nowhere else, or write privacy.grad_sample = "loop", which is slow and always works'
                    )

    def _check_independence(self, values: Tensor, edges: list[GradientEdge]) -> None:
        """Raise UserError if the losses of even samples have gradients in the rows of odd samples."""
        some = torch.zeros_like(values)
        some[::2] = 1
        backs = torch.autograd.grad(values, edges, some, allow_unused=True)
        # Not a number if a loss is not finite.
        size = sum(float(back[1::2].abs().sum()) for back in backs if back is not None)
        if size > 0:
            raise UserError(
                "task.model: what the model computes for one sample depends on the other samples of its batch, so that "
                "clipping bounds nothing: keep the samples apart, in the first dimension of every layer"
            )
        if size == 0:
            self._checked = True
            _CHECKED[self._model].add(self._kind)


class BookSum(ClippedSum):
    """The clipped sum by book-keeping: by far the fastest, for the layers that `covers` accepts."""

    def __init__(self, model: nn.Module, learning: Mapping[str, nn.Parameter], mechanism: Mechanism) -> None:
        super().__init__(model, learning, mechanism)
        # Per-example gradients of linear layers and embeddings are never computed.
        free = cached(model, ("free", frozenset(learning)), lambda: _in_linear_layers(model))
        self.numbers_per_sample -= free
        self._book = Book(model)
        self.undo.callback(self._book.close)

    def add(self, values: Tensor, into: Sums) -> Tensor | None:
        norms = self._book.norms(values)
        if math.isfinite(norms.sum()):
            self._book.add(self.weights(norms), into())
            return None
        return torch.isfinite(norms)

    def forget(self) -> None:
        self._book.forget()


def _in_linear_layers(model: nn.Module) -> int:
    """Number of learning parameters in layers that need no per-example gradients."""
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    return sum(p.numel() for m in layers for p in m.parameters(recurse=False) if p.requires_grad)


def _uses(loss: Node) -> tuple[set[Node], Counter[int]]:
    """All nodes of a loss's graph, and how often it uses each parameter, by id."""
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
