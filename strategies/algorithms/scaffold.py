"""SCAFFOLD: Karimireddy et al., Stochastic Controlled Averaging for Federated Learning (ICML 2020), algorithm 1.

Client i: y <- y - eta (g(y) - c_i + c), K times; then, option II, c_i+ = c_i - c + (x - y) / (K eta).
Server: x <- x + eta_g mean(y_i - x); c <- c + (1/N) sum over the cohort of (c_i+ - c_i), N being all clients.

K counts steps, not epochs. With momentum rho the move x - y is no longer eta times the sum of the K gradients but a
weighted sum, whose weights add up to `normaliser`; that takes the place of K, so that (x - y) / (K eta) stays a mean
gradient. An array that only some clients train (a head) has these as its N, because the others never move it.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.algorithms.fednova import normaliser
from meadow.strategies.corrections import gradient_of, tensors
from meadow.strategies.protocol import Algorithm, Half, Outcome, Setup, Turn
from torch import nn

from meadow.arrays.named import Arrays, beside, doubles, of_kind
from meadow.arrays.sums import WeightedSum

KIND = "c"
"""The server's c travels as "c@name", and the change of the client's comes back under the same name."""


class Client(Half):
    """Steps corrected by c - c_i; c_i is the client's memory."""

    def train(self, turn: Turn) -> Outcome:
        theirs, before = doubles(of_kind(KIND, turn.extra)), doubles(turn.received)
        ours = {n: np.zeros_like(c) for n, c in theirs.items()} | doubles(of_kind(KIND, turn.memory))
        parameters = dict(turn.model.named_parameters())
        difference = tensors({n: (c - ours[n]).astype(turn.received[n].dtype) for n, c in theirs.items()}, parameters)
        moved: set[str] = set()

        def correct(learning: Mapping[str, nn.Parameter]) -> None:
            for name in learning.keys() & difference.keys():
                gradient_of(learning[name]).add_(difference[name])
                moved.add(name)

        fitted = turn.fit(correct=correct)
        model = turn.arrays()
        after = doubles(model)
        steps = normaliser(fitted.steps, turn.local.momentum)
        memory, change = {}, {}
        for name, c in theirs.items():
            mean = (before[name] - after[name]) / (steps * turn.rate(name))
            new = ours[name] - c + mean if name in moved else ours[name]
            memory[name] = new.astype(model[name].dtype)
            change[name] = (memory[name].astype(np.float64) - ours[name]).astype(model[name].dtype)
        return Outcome(model, fitted, beside(KIND, change), beside(KIND, memory))


class Server(FedAvg):
    """The plain mean of the models, and c."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._c: dict[str, npt.NDArray[np.float64]] = {}

    def extra(self, arrays: Arrays) -> Arrays:
        for name in self.setup.roles.learned_together:
            self._c.setdefault(name, np.zeros(arrays[name].shape, np.float64))
        return beside(KIND, {name: c.astype(arrays[name].dtype) for name, c in self._c.items()})

    def combine(self, total: WeightedSum, before: Arrays) -> Arrays:
        for name, change in doubles(of_kind(KIND, total.sums)).items():
            self._c[name] = self._c[name] + change / self.setup.holders[name]
        return super().combine(total, before)

    def state(self) -> Arrays:
        return beside(KIND, self._c)

    def load_state(self, arrays: Arrays) -> None:
        self._c = doubles(of_kind(KIND, arrays))


SCAFFOLD = Algorithm(Server, Client())
