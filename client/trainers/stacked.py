"""The `stacked` trainer: trains the clients of several blocks at once on a GPU, with products batched over clients.

Launching kernels for one small client at a time leaves a GPU idle. A convolution is im2col and one batched product (a
grouped convolution is slower). Samples stay on the device. Clients have unequal sizes: absent samples of a batch are masked
out of the loss, and a client that has finished is not updated, by momentum or weight decay either. On a GPU a step is
recorded once as a CUDA graph and replayed. Parameters and gradients are float32; `engine.precision = "bfloat16"` computes
the products in half precision (torch.autocast).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.client.trainers.job import Job, beyond_plain_steps, first_of
from meadow.client.trainers.kernel import Member, Result
from meadow.client.trainers.network import Layer, Network
from meadow.config.schema import Experiment
from meadow.tasks.data import MISSING

WARM_UP = 3
"""Steps before recording, as torch's documentation of CUDA graphs advises."""


@dataclass
class Step:
    """The tensors that a step of all clients reads and changes, on the device; they stay in place from step to step.

    parameters, moments: (clients, *shape) by name. index: positions of samples in the store, int64 (clients, batch). mask: 1
    for samples that count, (clients, batch). active: 1 for clients that take the step, (clients,). losses: summed so far,
    (clients, targets). weights: of classes, by target, (clients, classes) or None.
    """

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    index: Tensor
    mask: Tensor
    active: Tensor
    rates: dict[str, Tensor]
    losses: Tensor
    weights: list[Tensor | None]


class Stacked:
    """A `meadow.client.trainers.kernel.Kernel` for a GPU; on a CPU only if `engine.trainer` names it."""

    name = "stacked"
    blocks_at_once = 10
    keeps_samples = True

    def __init__(self, network: Network, experiment: Experiment) -> None:
        engine = experiment.engine
        self.network, self._plan = network, experiment.local
        self._device = torch.device(engine.device)
        self._half = engine.precision == "bfloat16"
        self._x: Tensor | None = None
        self._y: list[Tensor] = []
        self._places: dict[int, tuple[Tensor, int]] = {}
        self._kept: dict[tuple[int, int, bool], tuple[Step, Callable[[], None]]] = {}

    @staticmethod
    def why_not(job: Job) -> str:
        engine, network = job.experiment.engine, job.network
        auto, windows = engine.trainer == "auto", not isinstance(network, str) and network.windows
        return beyond_plain_steps(job) or first_of(
            {
                f'engine.device = "{engine.device}": it needs a GPU': auto and engine.device == "cpu",
                "engine.exact = true": auto and engine.exact,
                "it does not support sensor windows": windows,
            }
        )

    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Result:
        members = [member for block in blocks for member in block]
        self._store(members)
        step, run = self._step(members)
        for name, parameter in step.parameters.items():
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(start[name]).to(self._device).expand_as(parameter))
        for name, moment in step.moments.items():
            moment.zero_()
            step.rates[name].fill_(rates.get(name, 0.0))
        for kept, given in zip(step.weights, _stacked_weights(members), strict=True):
            if kept is not None and given is not None:
                kept.copy_(given)
        step.losses.zero_()
        index, mask, active = (part.to(self._device) for part in self._schedule(members))
        for t in range(len(index)):
            step.index.copy_(index[t])
            step.mask.copy_(mask[t])
            step.active.copy_(active[t])
            run()
        return self._outcome(step, [len(block) for block in blocks], weights)

    def _store(self, members: Sequence[Member]) -> None:
        """Copy new members' samples to the device; `_places` has the position of each client's first sample."""
        new = [m for m in members if m.client not in self._places or self._places[m.client][0] is not m.x]
        if not new:
            return
        at = 0 if self._x is None else len(self._x)
        for member in new:
            self._places[member.client] = (member.x, at)
            at += len(member.x)
        xs = [m.x.to(self._device) for m in new]
        ys = [[m.y[i].to(self._device) for m in new] for i in range(len(self.network.targets))]
        self._x = torch.cat([*([] if self._x is None else [self._x]), *xs])
        self._y = [torch.cat([*self._y[i : i + 1], *y]) for i, y in enumerate(ys)]
        self._kept.clear()  # the recorded graphs read the old store

    def _schedule(self, members: Sequence[Member]) -> tuple[Tensor, Tensor, Tensor]:
        """`Step.index`, `mask` and `active` of all steps, each with steps as its first dimension."""
        steps, batch = max(m.steps for m in members), max(m.batch for m in members)
        index = np.zeros((steps, len(members), batch), np.int64)
        mask = np.zeros((steps, len(members), batch), np.float32)
        for row, m in enumerate(members):
            order, per = m.order.numpy() + self._places[m.client][1], -(-len(m.x) // m.batch)
            for t in range(m.steps):
                part = order[t // per, t % per * m.batch :][: m.batch]
                index[t, row, : len(part)], mask[t, row, : len(part)] = part, 1
        active = torch.tensor([[float(t < m.steps) for m in members] for t in range(steps)])
        return torch.from_numpy(index), torch.from_numpy(mask), active

    def _step(self, members: Sequence[Member]) -> tuple[Step, Callable[[], None]]:
        """The tensors for this number of clients and batch size, and the function that takes one step on them."""
        clients, batch = len(members), max(m.batch for m in members)
        weighted = _stacked_weights(members)
        key = clients, batch, any(w is not None for w in weighted)
        if key not in self._kept:
            shapes, width = self.network.shapes.items(), len(self.network.targets)
            step = Step(
                {name: self._zeros(clients, *shape).requires_grad_() for name, shape in shapes},
                {name: self._zeros(clients, *shape) for name, shape in shapes},
                self._zeros(clients, batch).long(),
                self._zeros(clients, batch),
                self._zeros(clients),
                {name: self._zeros() for name, _ in shapes},
                self._zeros(clients, width),
                [None if w is None else w.to(self._device) for w in weighted],
            )
            self._kept[key] = step, self._recorded(step)
        return self._kept[key]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self._device)

    def _recorded(self, step: Step) -> Callable[[], None]:
        """A function that takes one step: on a GPU the replay of a CUDA graph."""
        if self._device.type != "cuda":
            return lambda: self._take(step)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._take(step)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._take(step)
        return graph.replay

    def _take(self, step: Step) -> None:
        """Forward, backward, and an SGD step of the active clients."""
        assert self._x is not None
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            outputs = self._forward(step.parameters, self._x[step.index])
        total = self._loss(step, outputs)
        gradients = torch.autograd.grad(total, list(step.parameters.values()))
        plan = self._plan
        with torch.no_grad():
            for (name, p), g in zip(step.parameters.items(), gradients, strict=True):
                on = step.active.view(-1, *[1] * (p.ndim - 1))
                g = g + plan.weight_decay * p if plan.weight_decay else g
                if plan.momentum:
                    moment = step.moments[name]
                    moment.copy_(torch.where(on > 0, plan.momentum * moment + g, moment))
                    g = g + plan.momentum * moment if plan.nesterov else moment
                p.sub_(step.rates[name] * on * g)

    def _forward(self, p: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
        """Each head's outputs (clients, batch, size) for samples (clients, batch, *shape)."""
        if not self.network.image:
            x = x.flatten(2)
        for layer in self.network.layers:
            x = _output(layer, p, x)
            x = torch.relu(x) if layer.activation == "relu" else torch.tanh(x) if layer.activation == "tanh" else x
        return [_product(x, p[weight], p[bias]) for weight, bias in self.network.heads]

    def _loss(self, step: Step, outputs: Sequence[Tensor]) -> Tensor:
        """The sum over clients of their batches' weighted losses, as in `meadow.tasks.losses.losses`."""
        total = torch.zeros((), device=self._device)
        sizes = step.mask.sum(1)
        for number, (target, importance) in enumerate(zip(self.network.targets, self.network.importance, strict=True)):
            output, y = outputs[number].float(), self._y[number][step.index]
            if target.kind == "class":
                known = (y != MISSING) * step.mask
                each = F.cross_entropy(output.flatten(0, 1), y.flatten(), ignore_index=MISSING, reduction="none")
                each = each.view_as(known)
                if (weights := step.weights[number]) is not None:
                    each = each * weights.gather(1, y.clamp(min=0))
            else:
                known = ~torch.isnan(y) * step.mask
                each = (output.squeeze(-1) - (torch.nan_to_num(y) - target.offset) / target.scale) ** 2
            losses = (each * known).sum(1) / known.sum(1).clamp(min=1)
            step.losses[:, number] += losses.detach() * sizes
            total = total + importance * losses.sum()
        return total

    def _outcome(
        self, step: Step, sizes: Sequence[int], weights: Sequence[Sequence[Mapping[str, float]]] | None
    ) -> Result:
        losses = step.losses.cpu().tolist()
        whole = {name: value.detach() for name, value in step.parameters.items()}
        if weights is None:
            rows = {name: value.cpu().numpy() for name, value in whole.items()}
            return Result(losses, [{n: value[i].copy() for n, value in rows.items()} for i in range(sum(sizes))])
        totals, parts = [], {name: torch.split(value, list(sizes)) for name, value in whole.items()}
        for number, given in enumerate(weights):
            part = {name: values[number] for name, values in parts.items()}
            finite = torch.stack([torch.isfinite(value).all() for value in part.values()]).all()
            total = {}
            for name, value in part.items():
                weight = torch.tensor([each[name] for each in given], dtype=torch.float64, device=self._device)
                total[name] = torch.tensordot(weight, value.double(), 1).cpu().numpy()
            totals.append(total if finite else None)
        return Result(losses, [], totals)


def _stacked_weights(members: Sequence[Member]) -> list[Tensor | None]:
    """The class weights of each target, (clients, classes), or None."""
    columns = zip(*(member.weights for member in members), strict=True)
    return [None if any(w is None for w in c) else torch.stack([w for w in c if w is not None]) for c in columns]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of each client: x (clients, batch, in), weight (clients, out, in), bias (clients, out)."""
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _conv(layer: Layer, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    clients, batch = x.shape[:2]
    columns = F.unfold(x.flatten(0, 1), layer.kernel, padding=layer.padding)
    columns = columns.view(clients, batch, *columns.shape[1:]).transpose(1, 2).flatten(2)
    out = torch.bmm(p[layer.weight].flatten(2), columns)
    if layer.bias:
        out = out + p[layer.bias][:, :, None]
    oc, oh, ow = layer.after
    return out.view(clients, oc, batch, oh, ow).transpose(1, 2)


def _output(layer: Layer, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The output of a layer, before its activation."""
    match layer.kind:
        case "linear":
            return _product(x, p[layer.weight], p[layer.bias] if layer.bias else None)
        case "conv":
            return _conv(layer, p, x)
        case "pool":
            out = F.max_pool2d(x.flatten(0, 1), layer.kernel, ceil_mode=layer.ceil)
            return out.view(*x.shape[:2], *layer.after)
        case "norm":
            out = F.group_norm(x.flatten(0, 1), layer.groups, eps=layer.eps).view(x.shape)
            return out * p[layer.weight][:, None, :, None, None] + p[layer.bias][:, None, :, None, None]
        case "bounded":
            return F.layer_norm(x, (layer.after[0],), eps=layer.eps) * layer.scale
        case _:
            return x.flatten(2)
