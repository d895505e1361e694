"""APFL: Deng, Kamani and Mahdavi, Adaptive Personalized Federated Learning (2020), algorithm 1.

Client i, on each batch xi, with vbar = a v + (1 - a) w:  w <- w - eta grad f(w; xi);  v <- v - eta a grad f(vbar; xi)
(the gradient in v of f at the mixture); and with mix_lr > 0 (equation 10)  a <- a - mix_lr <v - w, grad f(vbar; xi)>,
kept in 0..1. All three use v and w from before the step. Server: the average of FedAvg over w.
The model used is the mixture of the client's v and the received w.
"""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import watch
from meadow.strategies.protocol import Algorithm, Batch, Half, Outcome, Turn
from torch import nn

from meadow.arrays.named import Arrays, beside, doubles, of_kind

KIND = "own"
MIX = "mix@"
"""The client's a, float64 (1,)."""


class Client(Half):
    """The loop trains w; v takes its step beside it, by an optimiser of the same kind, on the same batch."""

    def train(self, turn: Turn) -> Outcome:
        own, mixed = copy.deepcopy(turn.model), copy.deepcopy(turn.model)
        _fill(own, turn.initial() | of_kind(KIND, turn.memory))
        _fill(mixed, turn.initial() | of_kind(KIND, turn.memory))  # whose running statistics are those of v's model
        mixed.train()
        optimizer = turn.optimizer(own)
        mix = _mix(turn)
        batches: list[Batch] = []

        def step_own(learning: Mapping[str, nn.Parameter]) -> None:
            nonlocal mix
            v, between = dict(own.named_parameters()), dict(mixed.named_parameters())
            for name, parameter in turn.model.named_parameters():
                with torch.no_grad():
                    between[name].copy_(mix * v[name] + (1 - mix) * parameter)
                between[name].requires_grad_(name in learning)
                v[name].grad = None
            names = list(learning)
            found = torch.autograd.grad(turn.loss(mixed, batches[-1]), [between[n] for n in names], allow_unused=True)
            along = 0.0
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    along += float(((v[name] - learning[name]).detach() * gradient).sum())
                    v[name].grad = mix * gradient
            optimizer.step()
            mix = min(1.0, max(0.0, mix - turn.settings.mix_lr * along))

        fitted = turn.fit(term=watch(batches), correct=step_own)
        state = {n: t.numpy(force=True).copy() for n, t in own.state_dict().items()}
        state |= {n: b.numpy(force=True).copy() for n, b in mixed.named_buffers() if n in state}
        memory = beside(KIND, state) | {MIX: np.array([mix])}
        return Outcome(turn.arrays(), fitted, memory=memory)

    def used(self, turn: Turn) -> Arrays:
        start, own = turn.start(), of_kind(KIND, turn.memory)
        if not own:
            return start
        mix, theirs = _mix(turn), doubles(start)
        mixed = {n: mix * v + (1 - mix) * theirs[n] for n, v in doubles(own).items()}
        return {n: own[n] if n in turn.roles.buffers else mixed[n].astype(v.dtype) for n, v in start.items()}


def _mix(turn: Turn) -> float:
    return float(turn.memory[MIX][0]) if MIX in turn.memory else turn.settings.mix


def _fill(model: nn.Module, state: Arrays) -> None:
    """Load those arrays that the model has (a view of a model with a frozen trunk has the heads alone)."""
    model.load_state_dict({name: torch.from_numpy(state[name]) for name in model.state_dict()})


APFL = Algorithm(FedAvg, Client(), own_start=True)
