"""Server optimisers: Reddi et al., Adaptive Federated Optimization (ICLR 2021), algorithm 2, and FedAvgM: Hsu et al.,
Measuring the Effects of Non-Identical Data Distribution (2019), section 3.

Delta = mean(w_k) - w is the server's step; server_lr is eta. FedAvgM: v <- beta v + Delta, w <- w + eta v. The others:
m <- beta1 m + (1 - beta1) Delta, w <- w + eta m / (sqrt(v) + tau), with v starting at tau^2 and
FedAdagrad: v <- v + Delta^2; FedAdam: v <- beta2 v + (1 - beta2) Delta^2;
FedYogi: v <- v - (1 - beta2) Delta^2 sign(v - Delta^2).
There is no bias correction, as in the paper. Running statistics are no parameters: they take the plain mean, because an
adaptive step would make variances negative. An array that nobody sent, and what is kept for it, stays as it was.
"""

from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from meadow.strategies.algorithms.fedavg import FedAvg, changes
from meadow.strategies.protocol import Algorithm, Setup

from meadow.arrays.named import Arrays, beside, doubles, of_kind
from meadow.arrays.sums import WeightedSum, mean

Float64 = npt.NDArray[np.float64]


class Server(FedAvg):
    """The average as a gradient for an optimiser; its state is float64."""

    def __init__(self, setup: Setup, rule: Literal["momentum", "adagrad", "adam", "yogi"]) -> None:
        super().__init__(setup)
        self._rule = rule
        self._m: dict[str, Float64] = {}
        self._v: dict[str, Float64] = {}

    def combine(self, total: WeightedSum, before: Arrays) -> Arrays:
        steps = {}
        for name, delta in changes(total, before).items():
            if name in self.setup.roles.learned_together:
                steps[name] = self._momentum(name, delta) if self._rule == "momentum" else self._adaptive(name, delta)
        return mean(total, before) | self.stepped(steps, {name: before[name] for name in steps})

    def _momentum(self, name: str, delta: Float64) -> Float64:
        m: Float64 = self.setup.settings.server_momentum * self._m.get(name, np.zeros_like(delta)) + delta
        self._m[name] = m
        return m

    def _adaptive(self, name: str, delta: Float64) -> Float64:
        plan, square = self.setup.settings, np.square(delta)
        m: Float64 = plan.beta1 * self._m.get(name, np.zeros_like(delta)) + (1 - plan.beta1) * delta
        v: Float64 = self._v.get(name, np.full_like(delta, plan.tau**2))
        if self._rule == "adagrad":
            v = v + square
        elif self._rule == "adam":
            v = plan.beta2 * v + (1 - plan.beta2) * square
        else:
            v = v - (1 - plan.beta2) * square * np.sign(v - square)
        self._m[name], self._v[name] = m, v
        step: Float64 = m / (np.sqrt(v) + plan.tau)
        return step

    def state(self) -> Arrays:
        return beside("m", self._m) | beside("v", self._v)

    def load_state(self, arrays: Arrays) -> None:
        self._m, self._v = doubles(of_kind("m", arrays)), doubles(of_kind("v", arrays))


FEDAVGM = Algorithm(partial(Server, rule="momentum"))
FEDADAGRAD = Algorithm(partial(Server, rule="adagrad"))
FEDADAM = Algorithm(partial(Server, rule="adam"))
FEDYOGI = Algorithm(partial(Server, rule="yogi"))
