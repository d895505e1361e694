"""The algorithms by name."""

from typing import Any

from flwr.serverapp.strategy import Strategy
from meadow.strategies.adaptors.flower import FlowerServer, flower
from meadow.strategies.protocol import Algorithm, ServerAlgorithm, Setup

from meadow.config.algorithms import ALGORITHMS
from meadow.runtime.errors import UserError
from meadow.runtime.objects import user_object


def algorithm(name: str) -> Algorithm:
    """What `strategy.name` stands for: one of `meadow.config.algorithms`, or a user's own "module:object" on the
    current path, which may also be a strategy of Flower.

    Raises UserError if there is no such object, or if it is no algorithm.
    """
    found = user_object("strategy.name", ALGORITHMS.get(name, name))
    if isinstance(found, Strategy):
        return flower(lambda setup: found)
    if not isinstance(found, Algorithm):
        raise UserError(
            f'strategy.name = "{name}" is a {type(found).__name__}; it must be a meadow.strategies.protocol.Algorithm '
            "(docs/strategies.md shows one)"
        )
    return found


def server_of(setup: Setup) -> ServerAlgorithm[Any]:
    """The server's part of the algorithm that `strategy.name` asks for; one that makes a strategy of Flower is
    adapted."""
    server = algorithm(setup.settings.name).server(setup)
    return FlowerServer(setup, server) if isinstance(server, Strategy) else server
