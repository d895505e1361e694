"""The training loop without its tape: for known layers, the operations that autograd would run, called one after another.

A small model's step costs autograd and the modules' calls a third of its time. Here each layer's forward and backward
operations are called as the loop would have them called, on parameters that lie in one vector, so that the bits are the
loop's (tests/test_direct.py) and it makes no difference which of the two trains a client. It covers one class target whose
labels are all known, without weights of the classes; the loop trains all else.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

from client.kernels import Layer, Member, Network, Outcome, Sums, Unknown
from client.training import taken
from config.durable import Arrays
from config.schema import Local
from tasks.data import MISSING, Data
from tasks.networks import BoundedFeatures

LANES = 16
"""Arrays begin at multiples of 64 bytes, as torch's own do: kernels choose their path by alignment."""
_AT_ONCE = 2**15
"""Numbers that are added up at once: what is between stays in a core's cache."""

Operation = tuple[str, Layer]
"""A layer's kind, or its activation, and the layer."""

_aten: Any = torch.ops.aten


class Direct:
    """`client.kernels.Kernels` with the loop's bits, for the network of `model`. Raises Unknown for other targets."""

    title = "direct"
    blocks_at_once = 1
    keeps_samples = False

    def __init__(self, network: Network, model: nn.Module, plan: Local) -> None:
        if len(network.targets) > 1 or network.targets[0].kind != "class":
            raise Unknown("there is not one target of classes")
        self.network, self._plan, self._bounded = network, plan, BoundedFeatures()
        self._places: dict[str, tuple[int, int]] = {}
        size = 0
        state = model.state_dict(keep_vars=True)
        for name, tensor in state.items():
            self._places[name] = (size, size + tensor.numel())
            size = -(-(size + tensor.numel()) // LANES) * LANES
        # Of a batch of images the loop's weights may lie by pixels (`tasks.numerics.laid_out`): so they do here.
        self._start, self._work = torch.zeros(size), torch.zeros(size)
        self._strides = {name: tensor.stride() for name, tensor in state.items()}
        self._parameters = self._views(self._work)
        self._received = {name: view.numpy() for name, view in self._views(self._start).items()}
        self._operations = operations(network)
        self._one = torch.tensor(network.importance[0])
        self._term = np.empty(_AT_ONCE)

    def covers(self, labels: Sequence[Tensor], weights: Sequence[Tensor | None]) -> bool:
        """Whether all labels are known, and no class has a weight of its own."""
        return weights[0] is None and not bool((labels[0] == MISSING).any())

    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Outcome:
        """As `client.kernels.Kernels.train`."""
        for name, view in self._received.items():
            np.copyto(view, start[name])
        losses, arrays, totals = list[list[float]](), list[Arrays](), list[Sums | None]()
        trained = self._work.numpy()
        for number, block in enumerate(blocks):
            total, finite = np.empty(len(trained)), True
            for place, member in enumerate(block):
                self._work.copy_(self._start)
                losses.append([self._member(member, rates)])
                if weights is None:
                    arrays.append({name: view.numpy().copy() for name, view in self._parameters.items()})
                elif finite := finite and _finite(trained):
                    self._add(total, trained, weights[number][place], first=place == 0)
            if weights is not None:
                views = self._views(torch.from_numpy(total))
                totals.append({n: np.ascontiguousarray(v.numpy()) for n, v in views.items()} if finite else None)
        return Outcome(losses, arrays, totals)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat.as_strided(self.network.shapes[name], self._strides[name], begin)
            for name, (begin, _) in self._places.items()
        }

    def _add(
        self, total: npt.NDArray[np.float64], what: npt.NDArray[np.float32], weights: Mapping[str, float], first: bool
    ) -> None:
        """total += weight times what was trained, or is that for the first; neighbours of the same weight in one piece."""
        for weight, names in groupby(self._places, key=weights.__getitem__):
            several = list(names)
            begin, end = self._places[several[0]][0], self._places[several[-1]][1]
            for at in range(begin, end, _AT_ONCE):
                stop = min(at + _AT_ONCE, end)
                term = total[at:stop] if first else self._term[: stop - at]
                np.multiply(what[at:stop], weight, out=term, dtype=np.float64)
                if not first:
                    total[at:stop] += term

    @torch.no_grad()
    def _member(self, member: Member, rates: Mapping[str, float]) -> float:
        """Train `_work` in place; the loss, summed over the samples seen."""
        target, plan = self.network.targets[0].name, self._plan
        samples = Data(member.x, {target: member.y[0]})
        by_rate: dict[float, list[str]] = {}
        for name in self._parameters:
            if name in rates:
                by_rate.setdefault(rates[name], []).append(name)
        moving: dict[float, list[Tensor | None]] = {rate: [None] * len(names) for rate, names in by_rate.items()}
        an_epoch = -(-len(samples) // member.batch)
        seen = []
        for step in range(member.steps):
            epoch, position = divmod(step, an_epoch)
            if position == 0:
                batches = taken(samples, member.order[epoch], member.batch, at_least_two=False)
            _, batch = next(batches)
            loss, gradients = self._gradients(batch.x, batch.y[target], rates.keys())
            seen.append((len(batch), loss))
            for rate, names in by_rate.items():
                sgd(
                    [self._parameters[name] for name in names],
                    [gradients[name] for name in names],
                    moving[rate],
                    foreach=False,
                    weight_decay=plan.weight_decay,
                    momentum=plan.momentum,
                    lr=rate,
                    dampening=0.0,
                    nesterov=plan.nesterov,
                    maximize=False,
                )
        return math.fsum(count * float(loss) for count, loss in seen)

    def _gradients(self, x: Tensor, y: Tensor, learning: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and its gradient by each parameter that learns."""
        at = x if self.network.image else x.flatten(1)
        passed = []
        for operation in self._operations:
            out, beside = self._forward(operation, at)
            passed.append((operation, at, out, beside))
            at = out
        logs = torch.log_softmax(at, 1)
        loss, count = _aten.nll_loss_forward(logs, y, None, 1, -100)
        back = _aten.nll_loss_backward(self._one, logs, y, None, 1, -100, count)
        back = _aten._log_softmax_backward_data(back, logs, 1, torch.float32)
        gradients: dict[str, Tensor] = {}
        lowest = next(i for i, (kind, layer) in enumerate(self._operations) if _learns(kind, layer, learning))
        for i in range(len(passed) - 1, lowest - 1, -1):
            back = self._backward(back, *passed[i], learning, gradients, further=i > lowest)
        return loss, gradients

    def _forward(self, operation: Operation, x: Tensor) -> tuple[Tensor, Any]:
        """What an operation makes of x, and what else its way back needs."""
        kind, layer = operation
        weight: Any = self._parameters.get(layer.weight)
        bias = self._parameters.get(layer.bias)
        if kind == "linear":
            return F.linear(x, weight, bias), None
        if kind == "conv":
            return F.conv2d(x, weight, bias, 1, layer.padding), None
        if kind == "relu":
            return torch.relu(x), None
        if kind == "tanh":
            return torch.tanh(x), None
        if kind == "pool":
            pooled, places = _aten.max_pool2d_with_indices(x, layer.kernel, layer.kernel, 0, 1, layer.ceil)
            return pooled, places
        if kind == "flatten":
            return x.flatten(1), None
        if kind == "norm":
            n, (c, h, w) = len(x), layer.before
            out, *beside = _aten.native_group_norm(x, weight, bias, n, c, h * w, layer.groups, layer.eps)
            return out, beside
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return (out := self._bounded(x)).detach(), (x, out)

    def _backward(
        self,
        back: Tensor,
        operation: Operation,
        x: Tensor,
        out: Tensor,
        beside: Any,
        learning: Collection[str],
        gradients: dict[str, Tensor],
        further: bool,
    ) -> Tensor:
        """From the gradient by what came out (`back`) those by the operation's parameters, and, to go `further`, by x."""
        kind, layer = operation
        names, weight = (layer.weight, layer.bias), self._parameters.get(layer.weight)
        need = [further, *(name in learning for name in names)]
        found: tuple[Tensor, ...]
        if kind == "linear":
            found = back.mm(weight) if further and weight is not None else back, back.t().mm(x), back.sum(0)
        elif kind == "conv":
            sizes = [layer.after[0]] if layer.bias else None
            found = _aten.convolution_backward(
                back, x, weight, sizes, [1, 1], layer.padding, [1, 1], False, [0, 0], 1, need
            )
        elif kind == "norm":
            n, (c, h, w) = len(x), layer.before
            found = _aten.native_group_norm_backward(back, x, *beside, weight, n, c, h * w, layer.groups, need)
        elif kind == "relu":
            found = (_aten.threshold_backward(back, out, 0),)
        elif kind == "tanh":
            found = (_aten.tanh_backward(back, out),)
        elif kind == "pool":
            size = layer.kernel
            found = (_aten.max_pool2d_with_indices_backward(back, x, size, size, [0, 0], [1, 1], layer.ceil, beside),)
        elif kind == "flatten":
            found = (back.reshape(x.shape),)
        else:
            found = torch.autograd.grad(beside[1], beside[0], back)
        gradients |= {name: g for name, g in zip(names, found[1:], strict=False) if name in learning}
        return found[0]


def operations(network: Network) -> list[Operation]:
    """The network as operations, one after another, the head the last one; ReLU behind the pooling that follows its layer:
    the bits are those of ReLU first, and it is a quarter of the numbers."""
    found: list[Operation] = []
    for i, layer in enumerate(network.layers):
        found.append((layer.kind, layer))
        pooled = layer.activation == "relu" and [after.kind for after in network.layers[i + 1 : i + 2]] == ["pool"]
        if layer.activation and not pooled:
            found.append((layer.activation, layer))
        if layer.kind == "pool" and (before := network.layers[i - 1]).activation == "relu":
            found.append(("relu", before))
    weight, bias = network.heads[0]
    head = Layer("linear", (network.features, 1, 1), (network.targets[0].size, 1, 1), weight, bias)
    return [*found, ("linear", head)]


def _learns(kind: str, layer: Layer, learning: Collection[str]) -> bool:
    return kind == layer.kind and bool({layer.weight, layer.bias} & {*learning})


def _finite(values: npt.NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(values, values))) or bool(np.isfinite(values).all())
