"""Adapts Flower's strategies to server algorithms. Only this module creates Flower's messages to a strategy.

A Flower strategy keeps its state in attributes. Each `update` loads the state into a fresh copy of the strategy and
reads it back afterwards, so a resumed run is bit-identical to an uninterrupted one. Attributes may be arrays, numbers,
strings, and lists, dictionaries and objects of these. `[cohort]` selects the clients; the strategy's `fraction_train`
is ignored.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.named import Arrays, split_auxiliary
from meadow.arrays.sums import as_before
from meadow.runtime.errors import RunStopped, UserError
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientUpdate, ServerAlgorithm, Setup, State

_EVERY_ROUND = ("Received %s results", "Sampled %s nodes")
logging.getLogger("flwr").addFilter(lambda line: not any(text in str(line.msg) for text in _EVERY_ROUND))


def flower(make: Callable[[Setup], Strategy], client: ClientAlgorithm | None = None, **traits: Any) -> Algorithm:
    """An algorithm whose server is the Flower strategy that `make` returns; traits: other arguments of `Algorithm`."""
    return Algorithm(lambda setup: FlowerServer(setup, make(setup)), client or ClientAlgorithm(), **traits)


class FlowerServer(ServerAlgorithm[Sequence[ClientUpdate]]):
    """Passes each client's arrays and metrics to a Flower strategy's `aggregate_train`."""

    sums_only = False

    def __init__(self, setup: Setup, strategy: Strategy) -> None:
        super().__init__(setup)
        self._fresh = strategy

    def update(self, state: State, total: Sequence[ClientUpdate], model: Arrays) -> tuple[Arrays, State]:
        """Raises RunStopped if the strategy needs more clients than replied, and UserError if its state cannot be saved
        or it would send clients another model."""
        strategy, kept = copy.deepcopy(self._fresh), state.get("flower", {})
        if kept:
            _restore(strategy, json.loads(bytes(kept["structure"].tobytes())), kept)
        if (least := getattr(strategy, "min_available_nodes", 0)) > len(total):
            raise RunStopped(
                f"round {total[0].round}: {len(total)} valid replies, and {type(strategy).__name__} waits for "
                f"{least}: write cohort.quorum = {least}, or give it min_available_nodes = {len(total)}"
            )
        round_, sent = total[0].round, to_record(_ordered(model))
        clients = [reply.client for reply in total]
        grid: Any = SimpleNamespace(get_node_ids=lambda: clients)  # strategies need no more: Meadow sends the messages
        for message in strategy.configure_train(round_, sent, ConfigRecord(), grid):
            if message.content.get("arrays") not in (None, sent):
                raise UserError(
                    f"{type(strategy).__name__} sends clients other arrays than the model; write the server as a "
                    "ServerAlgorithm, and return additional arrays from `auxiliary` (docs/strategies.md)"
                )
        replies = [(_ordered(split_auxiliary(reply.arrays)[0]), self._metrics(reply)) for reply in total]
        found = aggregated(strategy, round_, replies, clients)
        new = {name: as_before(np.asarray(found[name]), old) if name in found else old for name, old in model.items()}
        arrays: Arrays = {}
        structure = json.dumps(_attributes(strategy, self._fresh, arrays)).encode()
        return new, {"flower": arrays | {"structure": np.frombuffer(structure, np.uint8)}}

    def _metrics(self, reply: ClientUpdate) -> Mapping[str, Any]:
        return {**reply.metrics, "num-examples": 1} if self.setup.equal_weights else reply.metrics


def _ordered(arrays: Arrays) -> Arrays:
    """Sort by name, because strategies keep lists in this order, and checkpoints change the order."""
    return {name: arrays[name] for name in sorted(arrays)}


def aggregated(
    strategy: Strategy,
    round_: int,
    replies: Iterable[tuple[Arrays, Mapping[str, Any]]],
    clients: Sequence[int] = (),
) -> Arrays:
    """Let a Flower strategy aggregate replies (arrays, metrics). Returns {} if it returns nothing."""
    messages = []
    for place, (arrays, metrics) in enumerate(replies):
        asked = Message(RecordDict(), clients[place] if clients else place, MessageType.TRAIN)
        content = RecordDict({"arrays": to_record(arrays), "metrics": MetricRecord(dict(metrics))})
        messages.append(Message(content, reply_to=asked))
    found, _ = strategy.aggregate_train(round_, messages)
    return {} if found is None else from_record(found)


def _attributes(thing: Any, fresh: Any, arrays: Arrays) -> dict[str, Any]:
    """An object's attributes as JSON; adds their arrays to `arrays`, which the JSON refers to by name."""

    def written(value: Any, before: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.ndarray | np.generic | bytes):
            is_bytes, name = isinstance(value, bytes), str(len(arrays))
            arrays[name] = np.frombuffer(value, np.uint8) if is_bytes else np.asarray(value)
            return {"bytes" if is_bytes else "array" if isinstance(value, np.ndarray) else "number": name}
        if isinstance(value, ArrayRecord):
            return {"record": written(from_record(value), None, where)}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [written(each, None, where) for each in value]}
        if isinstance(value, dict):
            pairs = [[written(key, None, where), written(each, None, where)] for key, each in value.items()]
            return {"dict": pairs}
        if callable(value) and not isinstance(value, Strategy):
            return {"as made": ""}
        if type(value) is type(before) and hasattr(value, "__dict__"):
            return {"object": {name: written(each, vars(before).get(name), name) for name, each in vars(value).items()}}
        _refuse(thing, where, value)

    return {name: written(value, vars(fresh).get(name), name) for name, value in vars(thing).items()}


def _refuse(thing: Any, name: str, value: Any) -> NoReturn:
    raise UserError(
        f"{type(thing).__name__}.{name} is a {type(value).__name__}, which checkpoints cannot contain: keep arrays, "
        "numbers and strings, or write the server as a ServerAlgorithm (docs/strategies.md)"
    )


def _restore(thing: Any, structure: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Invert `_attributes`, into a fresh object."""

    def read(value: Any, old: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "as made":
            return old
        if kind == "object":
            _restore(old, inner, arrays)
            return old
        if kind == "dict":
            return {read(key, None): read(each, None) for key, each in inner}
        if kind == "record":
            return to_record(read(inner, None))
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(read(each, None) for each in inner)
        return {"array": lambda a: a.copy(), "number": lambda a: a[()], "bytes": lambda a: a.tobytes()}[kind](
            arrays[inner]
        )

    for name, value in structure.items():
        setattr(thing, name, read(value, getattr(thing, name, None)))
