"""Server optimisers: Reddi et al., Adaptive Federated Optimization (ICLR 2021), algorithm 2, and FedAvgM: Hsu et al.,
Measuring the Effects of Non-Identical Data Distribution (2019), section 3.

With Delta = mean(w_k) - w and eta = server_lr, FedAvgM: v <- beta v + Delta, w <- w + eta v. The others:
m <- beta1 m + (1 - beta1) Delta, w <- w + eta m / (sqrt(v) + tau), where v starts at tau^2 and
FedAdagrad: v <- v + Delta^2; FedAdam: v <- beta2 v + (1 - beta2) Delta^2;
FedYogi: v <- v - (1 - beta2) Delta^2 sign(v - Delta^2).
As in the paper, there is no bias correction. Running statistics get the plain mean, because an adaptive step could make
variances negative. Arrays that nobody sent, and their state, stay unchanged.
"""

from functools import partial
from typing import Literal

import numpy as np

from meadow.arrays.named import Arrays, Named, zeros_like
from meadow.arrays.sums import WeightedSum, mean
from meadow.strategies.algorithms.fedavg import FedAvg, changes, stepped
from meadow.strategies.protocol import Algorithm, Setup, State


class Server(FedAvg):
    """Uses the mean change as a gradient for an optimiser, whose state is float64."""

    def __init__(self, setup: Setup, rule: Literal["momentum", "adagrad", "adam", "yogi"]) -> None:
        super().__init__(setup)
        self._rule = rule

    def init(self, model: Arrays) -> State:
        zeros = zeros_like(model, self.setup.roles.learned_together)
        if self._rule == "momentum":
            return {"m": zeros}
        return {"m": zeros, "v": zeros.map(lambda zero: zero + self.setup.settings.tau**2)}

    def update(self, state: State, total: WeightedSum, model: Arrays) -> tuple[Arrays, State]:
        plan, m = self.setup.settings, Named(state["m"])
        delta = changes(total, model).only(m)
        if self._rule == "momentum":
            step = m * plan.server_momentum + delta
            new = {"m": m | step}
        else:
            m_new, v_new = m * plan.beta1 + delta * (1 - plan.beta1), self._second(Named(state["v"]), delta * delta)
            step = m_new / (v_new.map(np.sqrt) + plan.tau)
            new = {"m": m | m_new, "v": Named(state["v"]) | v_new}
        return mean(total, model) | stepped(self.setup, step, {name: model[name] for name in step}), new

    def _second(self, v: Named, square: Named) -> Named:
        """The next v, from the last one and Delta^2."""
        beta2 = self.setup.settings.beta2
        if self._rule == "adagrad":
            return v + square
        if self._rule == "adam":
            return v * beta2 + square * (1 - beta2)
        return v - square * (1 - beta2) * (v - square).map(np.sign)


FEDAVGM = Algorithm(partial(Server, rule="momentum"))
FEDADAGRAD = Algorithm(partial(Server, rule="adagrad"))
FEDADAM = Algorithm(partial(Server, rule="adam"))
FEDYOGI = Algorithm(partial(Server, rule="yogi"))
