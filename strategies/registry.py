"""Finds algorithms by name."""

from typing import Any

from flwr.serverapp.strategy import Strategy

from meadow.config.algorithms import ALGORITHMS
from meadow.runtime.errors import UserError
from meadow.runtime.objects import user_object
from meadow.strategies.adaptors.flower import FlowerServer, flower
from meadow.strategies.protocol import Algorithm, ServerAlgorithm, Setup


def algorithm(name: str) -> Algorithm:
    """The algorithm of `strategy.name`: one of `meadow.config.algorithms`, or a user's "module:object", which may be a
    strategy of Flower. Raises UserError if it does not exist or is not an algorithm."""
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
    """The server of the algorithm `strategy.name`; a Flower strategy is adapted."""
    server = algorithm(setup.settings.name).server(setup)
    return FlowerServer(setup, server) if isinstance(server, Strategy) else server
