"""SCAFFOLD: Karimireddy et al., Stochastic Controlled Averaging for Federated Learning (ICML 2020), algorithm 1.

Client i: y <- y - eta (g(y) - c_i + c), K times; then, option II, c_i+ = c_i - c + (x - y) / (K eta).
Server: x <- x + eta_g mean(y_i - x); c <- c + (1/N) sum over the cohort of (c_i+ - c_i) for N clients in all.

K counts steps, not epochs. With momentum, x - y is eta times a weighted sum of gradients; the sum of the weights,
`normaliser`, then replaces K, so that (x - y) / (K eta) stays a mean gradient. If only some clients train an array (a
head), N is their number.
"""

from meadow.arrays.named import Arrays, Kinds, Named, of_kind, zeros_like
from meadow.arrays.sums import WeightedSum
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.algorithms.fednova import normaliser
from meadow.strategies.corrections import Shift
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult, State


class Client(ClientAlgorithm):
    """Adds c - c_i to the gradients; stores c_i and sends its change."""

    def train(self, context: ClientContext) -> ClientResult:
        c, x = Named(context.auxiliary["c"]), Named(context.received)
        c_i = zeros_like(c, c) | context.memory.get("c", {})
        correction = Shift(context, (c - c_i).like(context.received))
        fitted = context.fit(correct=correction)
        y = context.arrays()
        k_eta = {name: normaliser(fitted.steps, context.local.momentum) * context.rate(name) for name in c}
        new = (c_i - c + (x - Named(y)) / k_eta).where(correction.moved, c_i).like(y)
        return ClientResult(y, fitted, auxiliary={"c": (Named(new) - c_i).like(y)}, memory={"c": new})


class Server(FedAvg):
    """The mean of the models, and c."""

    def init(self, model: Arrays) -> State:
        return {"c": zeros_like(model, self.setup.roles.learned_together)}

    def auxiliary(self, state: State, model: Arrays) -> Kinds:
        return {"c": Named(state["c"]).like(model)}

    def update(self, state: State, total: WeightedSum, model: Arrays) -> tuple[Arrays, State]:
        c, changed = Named(state["c"]), Named(of_kind("c", total.sums))
        x, _ = super().update(state, total, model)
        return x, {"c": c | (c + changed / self.setup.holders)}


SCAFFOLD = Algorithm(
    Server,
    Client(),
    trains_once=True,
    sends={"c": "control variates"},
    equal_weights=True,
    needs_plain_sgd=True,
)
