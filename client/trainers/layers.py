"""The layers of `client/trainers/direct.py`: forward and backward operations that update their parameters on the way back.

Images are `channels_last`, and a sensor window is an image of one row, so that oneDNN's convolutions and torch's
normalisation are vectorised.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meadow.client.trainers.network import Layer, Network
from meadow.config.schema import Local
from meadow.native import pooling
from meadow.tasks.models.networks import BoundedFeatures
from meadow.tasks.numerics import keeps_float32

ONEDNN_FROM = 2**21
"""Matrix products of at least this many multiplications go to oneDNN; smaller ones do not repay the overhead. (A 784 x 200
layer takes 59 microseconds forward with batches of 20, and torch's own product 74; with batches of 8, 40 and 38.)"""

_aten: Any = torch.ops.aten
_relu_back: Any = _aten.threshold_backward.default
_tanh_back: Any = _aten.tanh_backward.default
_pooled: Any = _aten.max_pool2d_with_indices.default
_pooled_back: Any = _aten.max_pool2d_with_indices_backward.default
_convolution_back: Any = _aten.convolution_backward.default
_norm: Any = _aten.native_group_norm.default
_norm_back: Any = _aten.native_group_norm_backward.default
_nll: Any = _aten.nll_loss_forward.default
_nll_back: Any = _aten.nll_loss_backward.default
_log_softmax_back: Any = _aten._log_softmax_backward_data.default


class Descent:
    """SGD as in `torch.optim.SGD` (momentum, Nesterov, weight decay); updates an array as soon as its gradient is known."""

    def __init__(self, plan: Local) -> None:
        self._plan, self._plain = plan, not plan.momentum and not plan.weight_decay
        self._rates: Mapping[str, float] = {}
        self._moments: dict[str, Tensor] = {}
        self.values: Mapping[str, Tensor] = {}
        """The parameters as they are now."""
        self._values: Mapping[str, Tensor] = {}

    def begin(self, start: Mapping[str, Tensor], values: Mapping[str, Tensor], rates: Mapping[str, float]) -> bool:
        """Start to train `values` from `start`. Returns whether the caller must first copy `start` into `values`; else the
        first step reads `start` and writes `values`, which saves the copy."""
        self._rates, self._moments, self._values = rates, {}, values
        copied = not self._plain or any(name not in rates for name in values)
        self.values = values if copied else start
        return copied

    def stepped(self) -> None:
        """Called at the end of a step, when each array has had its gradient."""
        self.values = self._values

    def learns(self, name: str) -> bool:
        return name in self._rates

    def move(self, name: str, gradient: Tensor) -> None:
        """Update the array by its gradient."""
        value, plan, rate = self._values[name], self._plan, self._rates[name]
        if self._plain:
            torch.add(self.values[name], gradient.view_as(value), alpha=-rate, out=value)
            return
        gradient = gradient.view_as(value)
        if plan.weight_decay:
            gradient = gradient.add(value, alpha=plan.weight_decay)
        if plan.momentum:
            if name in self._moments:
                moment = self._moments[name].mul_(plan.momentum).add_(gradient)
            else:
                moment = self._moments[name] = gradient.clone()
            gradient = gradient.add(moment, alpha=plan.momentum) if plan.nesterov else moment
        value.add_(gradient, alpha=-rate)

    def move_by_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """`move` by the gradient left^T right; a plain step adds the product directly to the array."""
        _set_backend(left.numel() * right.shape[1])
        if self._plain:
            value = self._values[name]
            torch.addmm(self.values[name], left.t(), right, alpha=-self._rates[name], out=value)
        else:
            self.move(name, left.t().mm(right))


def _set_backend(multiplications: int) -> None:
    """Choose oneDNN or torch's own code for the next matrix product. `Direct.train` restores the setting."""
    torch.set_float32_matmul_precision("medium" if multiplications >= ONEDNN_FROM and keeps_float32() else "highest")


class Operation(ABC):
    """A layer or an activation. Its `forward` keeps what `backward` needs."""

    names: tuple[str, ...] = ()
    """Names of the arrays that may learn."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The output for input x."""

    @abstractmethod
    def backward(self, back: Tensor, further: bool) -> Tensor:
        """Update the arrays, given the gradient of the output; returns the gradient of the input if `further`."""


class Linear(Operation):
    """y = x w^T + b; x: (n, features)."""

    def __init__(self, layer: Layer, sgd: Descent) -> None:
        self._weight, self._bias, self._sgd = layer.weight, layer.bias, sgd
        self.names = (layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._x, values = x, self._sgd.values
        weight = values[self._weight]
        _set_backend(len(x) * weight.numel())
        return F.linear(x, weight, values.get(self._bias))

    def backward(self, back: Tensor, further: bool) -> Tensor:
        sgd, weight = self._sgd, self._sgd.values[self._weight]
        found = back
        if further:
            _set_backend(len(back) * weight.numel())
            found = back.mm(weight)
        if sgd.learns(self._bias):
            sgd.move(self._bias, back.sum(0))
        if sgd.learns(self._weight):
            sgd.move_by_product(self._weight, back, self._x)
        return found


class Convolution(Operation):
    """Stride 1; x: (n, c, h, w), channels_last. A 1-D convolution has a kernel of one row."""

    def __init__(self, layer: Layer, sgd: Descent) -> None:
        self._weight, self._bias, self._sgd, self._padding = layer.weight, layer.bias, sgd, list(layer.padding)
        self._channels = [layer.after[0]] if layer.bias else None
        self.names = (layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._x, values = x, self._sgd.values
        return F.conv2d(x, _as_2d(values[self._weight]), values.get(self._bias), 1, self._padding)

    def backward(self, back: Tensor, further: bool) -> Tensor:
        sgd, weight = self._sgd, _as_2d(self._sgd.values[self._weight])
        need = [further, *map(sgd.learns, self.names)]
        found, *gradients = _convolution_back(
            back, self._x, weight, self._channels, [1, 1], self._padding, [1, 1], False, [0, 0], 1, need
        )
        for name, gradient in zip(self.names, gradients, strict=True):
            if sgd.learns(name):
                sgd.move(name, gradient)
        return found  # type: ignore[no-any-return]


def _as_2d(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight.unsqueeze(2)


class Norm(Operation):
    """GroupNorm; x: (n, c, h, w)."""

    def __init__(self, layer: Layer, sgd: Descent) -> None:
        self._layer, self._sgd = layer, sgd
        self.names = (layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._x, values, (c, h, w) = x, self._sgd.values, self._layer.before
        weight, bias = (values[name] for name in self.names)
        out, *self._statistics = _norm(x, weight, bias, len(x), c, h * w, self._layer.groups, self._layer.eps)
        return out  # type: ignore[no-any-return]

    def backward(self, back: Tensor, further: bool) -> Tensor:
        x, sgd, (c, h, w) = self._x, self._sgd, self._layer.before
        weight = sgd.values[self._layer.weight]
        # torch 2.13 crashes on channels_last activations if the first is False.
        need = [True, True, True]
        found, *gradients = _norm_back(back, x, *self._statistics, weight, len(x), c, h * w, self._layer.groups, need)
        for name, gradient in zip(self.names, gradients, strict=True):
            if sgd.learns(name):
                sgd.move(name, gradient)
        return found  # type: ignore[no-any-return]


class Relu(Operation):
    def forward(self, x: Tensor) -> Tensor:
        self._out = torch.relu(x)
        return self._out

    def backward(self, back: Tensor, further: bool) -> Tensor:
        return _relu_back(back, self._out, 0)  # type: ignore[no-any-return]


class Tanh(Operation):
    def forward(self, x: Tensor) -> Tensor:
        self._out = torch.tanh(x)
        return self._out

    def backward(self, back: Tensor, further: bool) -> Tensor:
        return _tanh_back(back, self._out)  # type: ignore[no-any-return]


class Pool(Operation):
    """Max pooling without overlap, followed by ReLU if `relu`. Compiled code (`pooling.c`) if available, else torch, with
    the same bits."""

    def __init__(self, layer: Layer, relu: bool = False, native: bool = True) -> None:
        self._relu = Relu() if relu else None
        self._size, self._ceil, (c, *after) = list(layer.kernel), layer.ceil, layer.after
        self._native = native and pooling.available()
        self._numbers = [*layer.before[1:], c, *after, *layer.kernel]

    def forward(self, x: Tensor) -> Tensor:
        self._x = x = x.contiguous(memory_format=torch.channels_last)
        if not self._native:
            out, self._places = _pooled(x, self._size, self._size, [0, 0], [1, 1], self._ceil)
            return self._relu.forward(out) if self._relu else out
        _, _, c, h, w, *_ = self._numbers
        out, self._places = x.new_empty(len(x), h, w, c), torch.empty(len(x), h, w, c, dtype=torch.int32)
        pooling.pool_forward(x, out, self._places, self._numbers, self._relu is not None)
        return out.permute(0, 3, 1, 2)

    def backward(self, back: Tensor, further: bool) -> Tensor:
        back = back.contiguous(memory_format=torch.channels_last)
        if not self._native:
            back = self._relu.backward(back, further) if self._relu else back
            return _pooled_back(back, self._x, self._size, self._size, [0, 0], [1, 1], self._ceil, self._places)  # type: ignore[no-any-return]
        found = torch.empty_like(self._x)
        pooling.pool_backward(back, self._places, found, self._numbers)
        return found


class Flatten(Operation):
    def forward(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        return x.flatten(1)

    def backward(self, back: Tensor, further: bool) -> Tensor:
        return back.reshape(self._shape).contiguous(memory_format=torch.channels_last)


class OverTime(Operation):
    """`meadow.tasks.models.networks.MeanAndMaximum`; equal maxima share the gradient, as in torch's `amax`."""

    def forward(self, x: Tensor) -> Tensor:
        self._steps = x.permute(0, 2, 3, 1).flatten(1, 2)
        self._most = self._steps.amax(1)
        return torch.cat([self._steps.mean(1), self._most], 1)

    def backward(self, back: Tensor, further: bool) -> Tensor:
        steps, (mean, most) = self._steps, back.chunk(2, 1)
        there = steps == self._most[:, None]
        found = there * (most / there.sum(1))[:, None]
        found += (mean / steps.shape[1])[:, None]
        return found.permute(0, 2, 1).unsqueeze(2)


class Bounded(Operation):
    """`meadow.tasks.models.networks.BoundedFeatures`, by autograd."""

    def __init__(self) -> None:
        self._module = BoundedFeatures()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            self._out = self._module(self._x)
        return self._out.detach()  # type: ignore[no-any-return]

    def backward(self, back: Tensor, further: bool) -> Tensor:
        return torch.autograd.grad(self._out, self._x, back)[0]


class CrossEntropy:
    """The mean over a batch of the cross-entropy of logits (n, classes), times the target's `importance`."""

    def __init__(self, importance: float) -> None:
        self._importance = torch.tensor(importance)

    def of(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mean without `importance`, and the gradient of the logits with it."""
        logs = torch.log_softmax(logits, 1)
        loss, count = _nll(logs, y, None, 1, -100)
        back = _nll_back(self._importance, logs, y, None, 1, -100, count)
        return loss, _log_softmax_back(back, logs, 1, torch.float32)


def operations(network: Network, sgd: Descent) -> list[Operation]:
    """The network's operations in order, the head last. ReLU moves behind a following pooling: the result is the same, and
    it has a quarter of the numbers to process."""
    found: list[Operation] = []
    activations = {"relu": Relu, "tanh": Tanh}
    for i, layer in enumerate(network.layers):
        after_relu = bool(i) and network.layers[i - 1].activation == "relu"
        found.append(Pool(layer, after_relu) if layer.kind == "pool" else _operation(layer, sgd))
        pooled = layer.activation == "relu" and [after.kind for after in network.layers[i + 1 : i + 2]] == ["pool"]
        if layer.activation and not pooled:
            found.append(activations[layer.activation]())
    weight, bias = network.heads[0]
    head = Layer("linear", (network.features, 1, 1), (network.targets[0].size, 1, 1), weight, bias)
    return [*found, Linear(head, sgd)]


def _operation(layer: Layer, sgd: Descent) -> Operation:
    learning: dict[str, Callable[[Layer, Descent], Operation]] = {"linear": Linear, "conv": Convolution, "norm": Norm}
    if layer.kind in learning:
        return learning[layer.kind](layer, sgd)
    others: dict[str, type[Operation]] = {"flatten": Flatten, "over time": OverTime, "bounded": Bounded}
    return others[layer.kind]()


def first_learning(found: list[Operation], learning: Collection[str]) -> int:
    """Index of the first operation that learns; no operation before it needs a gradient."""
    return next(i for i, operation in enumerate(found) if {*operation.names} & {*learning})
