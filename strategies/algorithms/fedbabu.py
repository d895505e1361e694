"""FedBABU: Oh, Kim and Yun, Toward Enhanced Representation for Federated Image Classification (ICLR 2022), algorithm 1.

The body alone is trained and averaged; every client has the same random head, which no optimiser ever sees
(`meadow.strategies.roles.roles`). After training a client fine-tunes the whole model: `evaluate.fine_tune_epochs`.
"""

from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult


class Client(ClientAlgorithm):
    """Training in which only the trained names (the body) learn."""

    def train(self, context: ClientContext) -> ClientResult:
        body = frozenset(context.roles.trained)
        fitted = context.fit(learns=body.__contains__)
        return ClientResult(context.arrays(), fitted)


FEDBABU = Algorithm(FedAvg, Client())
