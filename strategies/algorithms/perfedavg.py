"""Per-FedAvg: Fallah, Mokhtari and Ozdaglar, Personalized Federated Learning: A Model-Agnostic Meta-Learning Approach
(NeurIPS 2020), algorithm 1, with the two approximations of section 5.

Client, for local.steps or epochs: on a batch D, w' = w - alpha grad f(w; D); on the next batch, v = grad f(w'; D');
first order (FO): w <- w - beta v. Hessian-free (HF), on a third batch D'': w <- w - beta (v - alpha d),  d = (grad
f(w + delta v; D'') - grad f(w - delta v; D'')) / (2 delta). alpha is `inner_lr` (0: local.lr), beta local.lr. Each step
of w takes two (HF: three) steps of the loop, one per batch. Server: FedAvg. The client uses the received model after
one step with rate alpha on all its training samples.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.config.schema import Local, Strategy
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import watch
from meadow.strategies.protocol import Algorithm, Batch, ClientAlgorithm, ClientContext, ClientResult, steps_of

DELTA = 1e-3
"""The half width of the finite difference along v."""


class Client(ClientAlgorithm):
    """Groups the loop's steps by two or three; the optimiser updates w only in the last one of a group."""

    def __init__(self, batches: int) -> None:
        self._batches = batches

    def train(self, context: ClientContext) -> ClientResult:
        w: dict[str, Tensor] = {}
        v: dict[str, Tensor] = {}
        seen: list[Batch] = []
        count = 0

        def step(learning: Mapping[str, nn.Parameter]) -> None:
            nonlocal count
            place, count = count % self._batches, count + 1
            gradients = _gradients(learning)
            if place == 0:
                w.update({n: p.detach().clone() for n, p in learning.items()})
                for name, parameter in learning.items():
                    _put(parameter, w[name] - (context.settings.inner_lr or context.rate(name)) * gradients[name])
            elif place == 1 and self._batches == 3:
                v.update(gradients)
                for name, parameter in learning.items():
                    _put(parameter, w[name] + DELTA * v[name])
            elif place == 1:
                for name, parameter in learning.items():
                    _put(parameter, w[name], gradients[name])
            else:
                for name, parameter in learning.items():
                    _put(parameter, w[name] - DELTA * v[name])
                context.model.zero_grad(set_to_none=True)
                context.loss(context.model, seen[-1]).backward()  # type: ignore[no-untyped-call]
                below = _gradients(learning)
                for name, parameter in learning.items():
                    alpha = context.settings.inner_lr or context.rate(name)
                    _put(parameter, w[name], v[name] - alpha * (gradients[name] - below[name]) / (2 * DELTA))

        fitted = context.fit(repeat=self._batches, term=watch(seen), correct=step)
        return ClientResult(context.arrays(), fitted)

    def steps(self, settings: Strategy, local: Local, size: int) -> int:
        return self._batches * steps_of(local, size)

    def used(self, context: ClientContext) -> Arrays:
        start = context.start()
        context.load(start)
        model, trained = context.model.eval(), set(context.roles.trained)
        learning = {n: p for n, p in model.named_parameters() if n in trained}
        for parameter in learning.values():
            parameter.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        context.loss(model, context.batch()).backward()  # type: ignore[no-untyped-call]
        for name, gradient in _gradients(learning).items():
            _put(learning[name], learning[name].detach() - (context.settings.inner_lr or context.rate(name)) * gradient)
        return context.arrays()


def _gradients(learning: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in learning.items()}


def _put(parameter: nn.Parameter, value: Tensor, gradient: Tensor | None = None) -> None:
    """Set a parameter; the optimiser skips it if it has no gradient."""
    with torch.no_grad():
        parameter.copy_(value)
    parameter.grad = gradient


FIRST_ORDER = Algorithm(FedAvg, Client(batches=2), averages=True, steps_itself=True)
HESSIAN_FREE = Algorithm(FedAvg, Client(batches=3), averages=True, steps_itself=True)
