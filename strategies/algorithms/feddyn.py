"""FedDyn: Acar et al., Federated Learning Based on Dynamic Regularization (ICLR 2021), algorithm 1.

Client k: theta_k minimises L_k(theta) - <h_k, theta> + alpha/2 |theta - theta^{t-1}|^2, where h_k is its last gradient;
then h_k <- h_k - alpha (theta_k - theta^{t-1}).
Server: h <- h - (alpha / m) sum over the cohort of (theta_k - theta^{t-1}) for m clients in all;
theta^t = mean over the cohort of theta_k, minus h / alpha.
"""

from collections.abc import Mapping

from torch import nn

from meadow.arrays.named import Arrays, Named, zeros_like
from meadow.arrays.sums import WeightedSum, mean
from meadow.config.rules.rule import Rule
from meadow.strategies.algorithms.fedavg import FedAvg, changes
from meadow.strategies.corrections import Shift, pull
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult, State


class Client(ClientAlgorithm):
    """Adds -h_k + alpha (theta - theta^{t-1}) to the gradients; h_k is the client's memory."""

    def train(self, context: ClientContext) -> ClientResult:
        alpha, received = context.settings.alpha, context.received
        h = zeros_like(received, context.roles.learned_together) | context.memory.get("h", {})
        minus_h = Shift(context, (h * -1).like(received))
        prox = pull(context, {name: received[name] for name in h}, alpha)

        def correct(learning: Mapping[str, nn.Parameter]) -> None:
            prox(learning)
            minus_h(learning)

        fitted = context.fit(correct=correct)
        theta = context.arrays()
        new = h - (Named(theta) - Named(received)) * alpha
        return ClientResult(theta, fitted, memory={"h": new.like(theta)})


class Server(FedAvg):
    """The mean of the models, shifted by h."""

    def init(self, model: Arrays) -> State:
        return {"h": zeros_like(model, self.setup.roles.learned_together)}

    def update(self, state: State, total: WeightedSum, model: Arrays) -> tuple[Arrays, State]:
        alpha, h, moved = self.setup.settings.alpha, Named(state["h"]), changes(total, model)
        share = {name: alpha * (total.weights[name] / self.setup.holders[name]) for name in moved}
        new = h - moved * share
        theta = Named(model) + moved - new / alpha
        return mean(total, model) | theta.like(model), {"h": h | new}


FEDDYN = Algorithm(
    Server,
    Client(),
    trains_once=True,
    equal_weights=True,
    rules=(
        Rule(
            ("strategy.server_lr", "strategy.name"),
            lambda e: e.strategy.server_lr != 1,
            "its server's step has no learning rate",
            "leave it out",
            ("strategy.name=feddyn", "strategy.server_lr=0.5"),
            ("strategy.name=feddyn",),
        ),
    ),
)
