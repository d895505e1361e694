"""pFedMe: Dinh, Tran and Nguyen, Personalized Federated Learning with Moreau Envelopes (NeurIPS 2020), algorithm 1.

Client i, on each batch: `inner_steps` steps with rate `inner_lr` on f(theta; batch) + lambda/2 |theta - w|^2 update
theta, which starts at w; then w <- w - eta lambda (w - theta), eta = local.lr. The client uses theta. Server: w <- (1 -
beta) w + beta mean(w_i), beta = server_lr.
"""

from collections.abc import Mapping

import torch
from torch import nn

from meadow.arrays.named import Arrays
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import watch
from meadow.strategies.protocol import Algorithm, Batch, ClientAlgorithm, ClientContext, ClientResult


class Client(ClientAlgorithm):
    """Each step of the loop is one step of w; the model contains theta while the loop runs."""

    def train(self, context: ClientContext) -> ClientResult:
        plan, model = context.settings, context.model
        trained = set(context.roles.trained)
        w = {n: p.detach().clone() for n, p in model.named_parameters() if n in trained}
        batches: list[Batch] = []

        def step(learning: Mapping[str, nn.Parameter]) -> None:
            for k in range(plan.inner_steps):
                if k > 0:
                    model.zero_grad(set_to_none=True)
                    context.loss(model, batches[-1]).backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for name, theta in learning.items():
                        gradient = plan.pull * (theta - w[name])
                        gradient += 0 if theta.grad is None else theta.grad
                        theta.sub_(gradient, alpha=plan.inner_lr or context.rate(name))
            for name, theta in learning.items():
                w[name] -= context.rate(name) * plan.pull * (w[name] - theta.detach())
                theta.grad = None  # so that the optimiser does not change theta

        fitted = context.fit(term=watch(batches), correct=step)
        own = context.arrays()
        shared = own | {name: value.numpy(force=True).copy() for name, value in w.items()}
        return ClientResult(shared, fitted, memory={"own": own})

    def used(self, context: ClientContext) -> Arrays:
        return context.start() | context.memory.get("own", {})


PFEDME = Algorithm(FedAvg, Client(), averages=True, steps_itself=True)
