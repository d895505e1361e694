"""How updates are shared and combined: which arrays travel, how they are packed, and one file for each algorithm."""

from flwr.serverapp.strategy import Strategy

from config.schema import Experiment
from strategies.fedavg import FedAvg

REGISTRY: dict[str, type[FedAvg]] = {"fedavg": FedAvg}
"""Strategy names of the experiment file and the class each stands for; a new algorithm is one file and one line here."""


def make_strategy(experiment: Experiment) -> Strategy:
    """The strategy that `strategy.name` asks for."""
    return REGISTRY[experiment.strategy.name]()
