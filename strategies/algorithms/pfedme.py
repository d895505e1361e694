"""pFedMe: Dinh, Tran and Nguyen, Personalized Federated Learning with Moreau Envelopes (NeurIPS 2020), algorithm 1.

Client i, on each batch: theta is found by `inner_steps` steps of rate `inner_lr` on f(theta; batch) + lambda/2
|theta - w|^2, from where it last stood, at first from w; then w <- w - eta lambda (w - theta), eta = local.lr.
The model used is theta. Server: w <- (1 - beta) w + beta mean(w_i), beta = server_lr.
"""

from collections.abc import Mapping

import torch
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import watch
from meadow.strategies.protocol import Algorithm, Batch, Half, Outcome, Turn
from torch import nn

from meadow.arrays.named import Arrays, beside, of_kind

KIND = "own"


class Client(Half):
    """Each step of the loop is one w-step; theta is in the model while the loop runs, w beside it."""

    def train(self, turn: Turn) -> Outcome:
        plan, model = turn.settings, turn.model
        trained = set(turn.roles.trained)
        w = {n: p.detach().clone() for n, p in model.named_parameters() if n in trained}
        batches: list[Batch] = []

        def step(learning: Mapping[str, nn.Parameter]) -> None:
            for k in range(plan.inner_steps):
                if k > 0:
                    model.zero_grad(set_to_none=True)
                    turn.loss(model, batches[-1]).backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for name, theta in learning.items():
                        slope = plan.pull * (theta - w[name])
                        slope += 0 if theta.grad is None else theta.grad
                        theta.sub_(slope, alpha=plan.inner_lr or turn.rate(name))
            for name, theta in learning.items():
                w[name] -= turn.rate(name) * plan.pull * (w[name] - theta.detach())
                theta.grad = None  # so that the optimiser leaves theta where it is

        fitted = turn.fit(term=watch(batches), correct=step)
        own = turn.arrays()
        shared = own | {name: value.numpy(force=True).copy() for name, value in w.items()}
        return Outcome(shared, fitted, memory=beside(KIND, own))

    def used(self, turn: Turn) -> Arrays:
        return turn.start() | of_kind(KIND, turn.memory)


PFEDME = Algorithm(FedAvg, Client())
