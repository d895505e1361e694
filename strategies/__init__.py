"""How updates are shared and combined: which arrays travel, how they are packed, and one file for each algorithm."""

from flwr.serverapp.strategy import Strategy
from meadow.strategies.protocol import Algorithm, Setup

from meadow.config.algorithms import ALGORITHMS
from meadow.runtime.errors import UserError
from meadow.runtime.objects import user_object


def algorithm(name: str) -> Algorithm:
    """What `strategy.name` stands for: one of `meadow.config.algorithms`, or a user's own "module:object" on the
    current path.

    Raises UserError if there is no such object, or if it is no `Algorithm`.
    """
    found = user_object("strategy.name", ALGORITHMS.get(name, name))
    if not isinstance(found, Algorithm):
        raise UserError(
            f'strategy.name = "{name}" is a {type(found).__name__}; it must be a meadow.strategies.protocol.Algorithm '
            "(docs/strategies.md shows one)"
        )
    return found


def make_strategy(setup: Setup) -> Strategy:
    """The server's half of the algorithm that `strategy.name` asks for."""
    return algorithm(setup.settings.name).server(setup)
