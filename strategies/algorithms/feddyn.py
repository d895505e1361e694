"""FedDyn: Acar et al., Federated Learning Based on Dynamic Regularization (ICLR 2021), algorithm 1.

Client k: theta_k minimises L_k(theta) - <h_k, theta> + alpha/2 |theta - theta^{t-1}|^2, h_k being its last gradient;
then h_k <- h_k - alpha (theta_k - theta^{t-1}).
Server: h <- h - (alpha / m) sum over the cohort of (theta_k - theta^{t-1}), m being all clients;
theta^t = mean over the cohort of theta_k, minus h / alpha.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from meadow.strategies.algorithms.fedavg import FedAvg, changes
from meadow.strategies.corrections import gradient_of, pull, tensors
from meadow.strategies.protocol import Algorithm, Half, Outcome, Setup, Turn
from torch import nn

from meadow.arrays.named import Arrays, beside, doubles, of_kind
from meadow.arrays.sums import WeightedSum, mean

KIND = "h"


class Client(Half):
    """Gradients with - h_k + alpha (theta - theta^{t-1}) added; h_k is the client's memory."""

    def train(self, turn: Turn) -> Outcome:
        alpha, before = turn.settings.alpha, turn.received
        h = {n: np.zeros_like(before[n]) for n in turn.roles.learned_together} | of_kind(KIND, turn.memory)
        minus = tensors(h, dict(turn.model.named_parameters()))
        prox = pull(turn, {name: before[name] for name in h}, alpha)

        def correct(learning: Mapping[str, nn.Parameter]) -> None:
            prox(learning)
            for name in learning.keys() & minus.keys():
                gradient_of(learning[name]).sub_(minus[name])

        fitted = turn.fit(correct=correct)
        model = turn.arrays()
        now, then = doubles(model), doubles(before)
        new = {n: (old - alpha * (now[n] - then[n])).astype(model[n].dtype) for n, old in doubles(h).items()}
        return Outcome(model, fitted, memory=beside(KIND, new))


class Server(FedAvg):
    """The plain mean of the models, shifted by h."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._h: dict[str, npt.NDArray[np.float64]] = {}

    def combine(self, total: WeightedSum, before: Arrays) -> Arrays:
        alpha, moved, result = self.setup.settings.alpha, changes(total, before), mean(total, before)
        for name in self.setup.roles.learned_together:
            if name in moved:
                share = total.weights[name] / self.setup.holders[name]
                h = self._h.get(name, np.zeros(before[name].shape, np.float64)) - alpha * share * moved[name]
                self._h[name] = h
                result[name] = (before[name].astype(np.float64) + moved[name] - h / alpha).astype(before[name].dtype)
        return result

    def state(self) -> Arrays:
        return beside(KIND, self._h)

    def load_state(self, arrays: Arrays) -> None:
        self._h = doubles(of_kind(KIND, arrays))


FEDDYN = Algorithm(Server, Client())
