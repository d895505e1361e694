"""The Ray engine: actors as nodes. Each hosts an even share of the clients, who always come back to it.

Whatever several messages have in common, above all the global model, is handed over once: through shared memory to workers
on this machine (`simulation/mailbox.py`), through Ray's object store to those of a cluster.
"""

import os
import pickle
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from flwr.app import ArrayRecord, Context, Message, RecordDict
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from config.schema import Experiment
from simulation.grid import LocalGrid, error_reply, node_context
from simulation.mailbox import Address, Letter, Slot, Slots
from simulation.ray_start import start_ray, stop_ray
from tasks.task import share_task

_WAIT = 0.5
_SOME = 0.001
"""Cores that a worker asks Ray for: hardly any, for how many there are is ours to say; but one that asks for nothing is put
on any machine, wherever it was sent (measured with Ray 2.55.1)."""
_RETRIES = 2
"""Times that a message is given again to a worker that died of it; then its clients count as failed."""


class Call(NamedTuple):
    """What a worker on this machine is asked, pickled by the command whose worker it is. message and the records that belong
    into it are letters in the slot `sent`; the reply goes into the slot `reply`. context: pickled, the same for all calls of
    a run."""

    message: Letter
    records: dict[str, Letter]
    context: bytes
    sent: Address
    reply: Address


class NodeActor:
    """What runs in a worker: the ClientApp, given messages whose shared records arrive beside them."""

    def __init__(self) -> None:
        self._slots: dict[int, Slot] = {}
        self._contexts: dict[bytes, Context] = {}

    def handle_here(self, call: bytes) -> Letter:
        """`handle` for a pickled `Call`. (Each argument that Ray hands over by itself takes it a tenth of a millisecond.)"""
        given: Call = pickle.loads(call)
        if given.context not in self._contexts:
            self._contexts = {given.context: pickle.loads(given.context)}
        slot = self._slot(given.sent)
        message, *records = (slot.read(letter) for letter in (given.message, *given.records.values()))
        answer = self.handle(message, self._contexts[given.context], list(given.records), *records)
        (letter,) = self._slot(given.reply).write([answer])
        return letter

    def _slot(self, address: Address) -> Slot:
        if address.number not in self._slots:
            self._slots[address.number] = Slot(address)
        return self._slots[address.number]

    def handle(self, message: Message, context: Context, names: list[str], *records: ArrayRecord) -> Message:
        """Answer a message, with the records put back under their names."""
        from client.app import app  # imported in the worker, by name, once

        for name, record in zip(names, records, strict=True):
            message.content[name] = record
        try:
            return app(message, context)
        except Exception:  # a node that fails costs its clients, not the run
            return error_reply(message, traceback.format_exc())


class Workers:
    """Ray actors that outlive a run, so that the runs of a comparison share them."""

    def __init__(self, count: int, threads: int, on_this_machine: bool) -> None:
        self.actors: list[ActorHandle[Any]] = []
        remote: Any = ray.remote(NodeActor)
        for home in _homes(count):
            # A killed worker comes back (Flower's engine puts it back in its pool dead) and answers what it was asked
            # again: a client's answer is a function of the message and of its stored state, so the bits are the same.
            # If its machine is lost, it comes back on another one.
            where = NodeAffinitySchedulingStrategy(home, soft=True)
            options = remote.options(
                num_cpus=_SOME, max_restarts=-1, max_task_retries=_RETRIES, scheduling_strategy=where
            )
            self.actors.append(options.remote())
        self.threads = threads
        self.slots = Slots() if on_this_machine and hasattr(os, "memfd_create") else None


@dataclass
class Sent:
    """A message on its way: what Ray answers for it, and the slots that are its own and its round's."""

    reference: Any
    message: Message
    reply: Slot | None = None
    batch: "Batch | None" = None


@dataclass
class Batch:
    """Messages that were sent together: the slot of what they have in common, and how many are not answered yet."""

    slot: Slot
    waiting: int


@contextmanager
def ray_workers(count: int, threads: int, address: str = "") -> Iterator[Workers]:
    """`count` workers (0: one for each of Ray's cores), on Ray as `start_ray` has started it, or now starts it; it is
    stopped at the end."""
    start_ray(count, threads, address)
    try:
        yield Workers(count or sum(_machines().values()), threads, on_this_machine=not address)
    finally:
        stop_ray()


def _machines() -> dict[str, int]:
    """The cores of each machine that is there, by its id in Ray."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]}
    return {node: count for node, count in cores.items() if count} or dict.fromkeys(cores, 1)


def _homes(count: int) -> list[str]:
    """The machine of each of `count` workers, in proportion to the machines' cores; a machine's workers are next to each
    other, as their clients are."""
    cores = _machines()
    taken = dict.fromkeys(cores, 0)
    for _ in range(count):
        taken[min(cores, key=lambda node: ((taken[node] + 1) / cores[node], node))] += 1
    return [node for node, workers in taken.items() for _ in range(workers)]


class RayGrid(LocalGrid):
    """A node for each worker."""

    def __init__(self, experiment: Experiment, state: Path, workers: Workers) -> None:
        nodes = len(workers.actors)
        super().__init__(nodes)
        self._actors = dict(zip(self._node_ids, workers.actors, strict=True))
        self._contexts = {n: node_context(experiment, i, nodes, state) for i, n in enumerate(self._node_ids)}
        self._experiment = experiment
        self._running: dict[str, Sent] = {}
        self._slots = workers.slots

    def open(self) -> None:
        """Share the data with the workers of this machine, before the server opens it too."""
        if self._slots is not None:
            addresses = " ".join(share_task(self._experiment))
            for context in self._contexts.values():
                context.node_config["data"] = addresses

    def start(self, messages: Sequence[Message]) -> None:
        """Hand each message to its worker; array records are handed over once for all of them."""
        shared = []
        for message in messages:
            content = message.content
            shared.append({name: record for name, record in content.items() if isinstance(record, ArrayRecord)})
            message.content = RecordDict({name: r for name, r in content.items() if name not in shared[-1]})
        records = list({id(record): record for each in shared for record in each.values()}.values())
        number = {id(record): i for i, record in enumerate(records)}
        if self._slots is None:
            stored = [ray.put(record) for record in records]
            for message, own in zip(messages, shared, strict=True):
                node, theirs = message.metadata.dst_node_id, [stored[number[id(record)]] for record in own.values()]
                reference: Any = self._actors[node].handle.remote(message, self._contexts[node], list(own), *theirs)
                self._running[message.metadata.message_id] = Sent(reference, message)
            return
        batch = Batch(self._slots.take(), len(messages))
        letters = batch.slot.write([*records, *messages])
        for message, own, letter in zip(messages, shared, letters[len(records) :], strict=True):
            node, reply = message.metadata.dst_node_id, self._slots.take()
            records_of = {name: letters[number[id(record)]] for name, record in own.items()}
            call = Call(letter, records_of, pickle.dumps(self._contexts[node]), batch.slot.address, reply.address)
            reference = self._actors[node].handle_here.remote(pickle.dumps(call))
            self._running[message.metadata.message_id] = Sent(reference, message, reply, batch)

    def collect(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; waits up to half a second for the first."""
        waiting = {self._running[i].reference: i for i in message_ids if i in self._running}
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=_WAIT) if waiting else ([], [])
        more, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if done else ([], [])
        replies = []
        for reference in more:
            replies.append(self._reply(self._running.pop(waiting[reference])))
        return replies

    def _reply(self, sent: Sent) -> Message:
        """The reply that is there; its slots may be used again then. Those of a message that nobody asks for are not."""
        try:
            answer = ray.get(sent.reference)
            reply: Message = answer if sent.reply is None else sent.reply.read(answer)
        except RayError as error:
            reply = error_reply(sent.message, f"the worker was lost: {type(error).__name__}")
        if self._slots is not None and sent.reply is not None and sent.batch is not None:
            self._slots.give_back(sent.reply)
            sent.batch.waiting -= 1
            if not sent.batch.waiting:
                self._slots.give_back(sent.batch.slot)
        return reply
