"""Ditto: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization (ICML 2021), algorithm 1.

Client k trains the shared model as in FedAvg, and a personal model v_k on F_k(v) + lambda/2 |v - w^t|^2, where w^t is
the received model. v_k starts from the state before the first round and never affects the shared model. Server: FedAvg.
"""

from meadow.arrays.named import Arrays
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import pull
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult


class Client(ClientAlgorithm):
    """Two trainings on the same batches; v_k is the client's memory and the model that it uses."""

    def train(self, context: ClientContext) -> ClientResult:
        fitted = context.fit()
        model = context.arrays()
        context.load(context.initial() | context.memory.get("own", {}))
        context.fit(correct=pull(context, context.received, context.settings.pull), leaves=False)
        return ClientResult(model, fitted, memory={"own": context.arrays()})

    def used(self, context: ClientContext) -> Arrays:
        return context.start() | context.memory.get("own", {})


DITTO = Algorithm(FedAvg, Client(), own_start=True, own_model=True, trains_once=True, averages=True)
