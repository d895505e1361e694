"""FedProx: Li et al., Federated Optimization in Heterogeneous Networks (MLSys 2020), algorithm 2.

Client: minimise F_k(w) + mu/2 |w - w^t|^2 (equation 2), w^t what was received. Server: the average of FedAvg.
"""

from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import pull
from meadow.strategies.protocol import Algorithm, Half, Outcome, Turn


class Client(Half):
    """Local training with the proximal term's gradient mu (w - w^t) added to the gradients of the shared arrays."""

    def train(self, turn: Turn) -> Outcome:
        fitted = turn.fit(correct=pull(turn, turn.received, turn.settings.mu))
        return Outcome(turn.arrays(), fitted)


FEDPROX = Algorithm(FedAvg, Client())
