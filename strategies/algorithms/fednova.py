"""FedNova: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization
(NeurIPS 2020), equation 6 and algorithm 1.

Client i does tau_i local steps, and its move is eta times a sum of gradients with weights a_i. The server normalises
it: d_i = (x - y_i) / |a_i|_1, and x <- x - tau_eff sum_i p_i d_i with tau_eff = sum_i p_i |a_i|_1, so that clients with
more steps do not count more.

Clients report their number of steps; the server checks it against `[local]` and the declared number of samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meadow.arrays.named import Arrays, Float64
from meadow.strategies.algorithms.fedavg import stepped
from meadow.strategies.protocol import Algorithm, ClientUpdate, ServerAlgorithm, State, steps_of


def normaliser(steps: int, momentum: float) -> float:
    """|a|_1 of `steps` steps of SGD: the number of gradients in a move (section 4.1 of the paper).

    Without momentum that is `steps`. With momentum rho, torch's velocity v <- rho v + g gives the gradient of step k
    the weight 1 + rho + ... + rho^(steps - k), together (steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho).
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


class Server(ServerAlgorithm[Sequence[ClientUpdate]]):
    """The normalised average; running statistics, which no step changes, get the plain average."""

    sums_only = False

    def judge(self, metrics: Mapping[str, Any], size: int) -> str:
        steps, most = metrics.get("steps"), steps_of(self.setup.local, size)
        if not isinstance(steps, int) or not 1 <= steps <= most:
            return f"steps is {steps!r}; with {size} training samples it must be a whole number from 1 to {most}"
        return ""

    def update(self, state: State, total: Sequence[ClientUpdate], model: Arrays) -> tuple[Arrays, State]:
        moves: dict[str, list[tuple[float, float, Float64]]] = {}
        for reply in total:
            a = normaliser(reply.metrics["steps"], self.setup.local.momentum)
            for name, value in reply.arrays.items():
                scale = 1.0 if name in self.setup.roles.buffers else a
                moves.setdefault(name, []).append(
                    (reply.weights[name], scale, value.astype("f8") - model[name].astype("f8"))
                )
        steps = dict[str, Float64]()
        for name, of_clients in moves.items():
            weights = sum(weight for weight, _, _ in of_clients)
            effective = sum(weight * a for weight, a, _ in of_clients) / weights
            steps[name] = np.asarray(effective * sum(weight / a * move for weight, a, move in of_clients) / weights)
        return stepped(self.setup, steps, model), state


FEDNOVA = Algorithm(Server, trains_once=False, needs_plain_sgd=True)  # the server must know the number of steps
