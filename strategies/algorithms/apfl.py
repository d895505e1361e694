"""APFL: Deng, Kamani and Mahdavi, Adaptive Personalized Federated Learning (2020), algorithm 1.

Client i, on each batch xi, with vbar = a v + (1 - a) w:  w <- w - eta grad f(w; xi);  v <- v - eta a grad f(vbar; xi)
(the gradient in v of f at the mixture); and with mix_lr > 0 (equation 10)  a <- a - mix_lr <v - w, grad f(vbar; xi)>,
kept in 0..1. All three use the old v and w. Server: FedAvg over w. The client uses the mixture of its v and the
received w.
"""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from meadow.arrays.named import Arrays, Named
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import watch
from meadow.strategies.protocol import Algorithm, Batch, ClientAlgorithm, ClientContext, ClientResult


class Client(ClientAlgorithm):
    """The loop trains w; a second optimiser of the same kind updates v on the same batches."""

    def train(self, context: ClientContext) -> ClientResult:
        own = copy.deepcopy(context.model)
        state = context.initial() | context.memory.get("own", {})
        own.load_state_dict({name: torch.from_numpy(state[name]) for name in own.state_dict()})
        mixed = copy.deepcopy(own).train()  # v's running statistics are those of this model
        optimizer = context.optimizer(own)
        mix = _mix(context)
        batches: list[Batch] = []

        def step_own(learning: Mapping[str, nn.Parameter]) -> None:
            nonlocal mix
            v, between = dict(own.named_parameters()), dict(mixed.named_parameters())
            for name, parameter in context.model.named_parameters():
                with torch.no_grad():
                    between[name].copy_(mix * v[name] + (1 - mix) * parameter)
                between[name].requires_grad_(name in learning)
                v[name].grad = None
            names = list(learning)
            found = torch.autograd.grad(
                context.loss(mixed, batches[-1]), [between[n] for n in names], allow_unused=True
            )
            along = 0.0
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    along += float(((v[name] - learning[name]).detach() * gradient).sum())
                    v[name].grad = mix * gradient
            optimizer.step()
            mix = min(1.0, max(0.0, mix - context.settings.mix_lr * along))

        fitted = context.fit(term=watch(batches), correct=step_own)
        state = {n: t.numpy(force=True).copy() for n, t in own.state_dict().items()}
        state |= {n: b.numpy(force=True).copy() for n, b in mixed.named_buffers() if n in state}
        memory = {"own": state, "mix": {"": np.array([mix])}}  # float64 (1,)
        return ClientResult(context.arrays(), fitted, memory=memory)

    def used(self, context: ClientContext) -> Arrays:
        start, own = context.start(), context.memory.get("own", {})
        if not own:
            return start
        mix = _mix(context)
        mixed = Named(own) * mix + Named(start) * (1 - mix)
        used = {n: v if n in context.roles.buffers else mixed[n].astype(v.dtype) for n, v in own.items()}
        return start | used  # a frozen trunk is not in `own`


def _mix(context: ClientContext) -> float:
    """The client's a from its last round, at first `strategy.mix`."""
    return float(context.memory["mix"][""][0]) if "mix" in context.memory else context.settings.mix


APFL = Algorithm(FedAvg, Client(), own_start=True, averages=True, steps_itself=True)
