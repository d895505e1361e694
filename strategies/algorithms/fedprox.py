"""FedProx: Li et al., Federated Optimization in Heterogeneous Networks (MLSys 2020), algorithm 2.

Client: minimise F_k(w) + mu/2 |w - w^t|^2 (equation 2) for the received w^t. Server: FedAvg.
"""

from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import pull
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult


class Client(ClientAlgorithm):
    """Adds the proximal term's gradient mu (w - w^t) to the gradients of the shared arrays."""

    def train(self, context: ClientContext) -> ClientResult:
        fitted = context.fit(correct=pull(context, context.received, context.settings.mu))
        return ClientResult(context.arrays(), fitted)


FEDPROX = Algorithm(FedAvg, Client(), trains_once=True, averages=True)
