"""Ditto: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization (ICML 2021), algorithm 1.

Client k trains the shared model as in FedAvg, and beside it a model of its own, v_k, on
F_k(v) + lambda/2 |v - w^t|^2, w^t being the shared model as received. v_k starts from the state before the first round.
It never feeds what is shared. Server: the average of FedAvg.
"""

from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import pull
from meadow.strategies.protocol import Algorithm, Half, Outcome, Turn

from meadow.arrays.named import Arrays, beside, of_kind

KIND = "own"


class Client(Half):
    """Two trainings on the same batches; v_k is the client's memory, and the model that it would use."""

    def train(self, turn: Turn) -> Outcome:
        fitted = turn.fit()
        model = turn.arrays()
        turn.load(turn.initial() | of_kind(KIND, turn.memory))
        turn.fit(correct=pull(turn, turn.received, turn.settings.pull), leaves=False)
        return Outcome(model, fitted, memory=beside(KIND, turn.arrays()))

    def used(self, turn: Turn) -> Arrays:
        return turn.start() | of_kind(KIND, turn.memory)


DITTO = Algorithm(FedAvg, Client(), own_start=True)
