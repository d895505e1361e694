"""The Ray engine: actors as nodes. Each hosts an even share of the clients, who always come back to it.

Whatever several messages have in common, above all the global model, is handed over once. Workers on this machine read it
in shared memory (`meadow/arrays/memory.py`), and are called over a connection each (`simulation/connections.py`). Those of a
cluster get it by Ray's object store, and are called through Ray.
"""

import os
import pickle
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from flwr.app import ArrayRecord, Context, Message, RecordDict
from meadow.simulation.connections import RETRIES, Calls, connect
from meadow.simulation.grid import LocalGrid, error_reply, node_context
from meadow.simulation.ray_start import start_ray, stop_ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from meadow.arrays.memory import Address, Place, Segment, Segments
from meadow.config.load import from_flat, to_flat
from meadow.config.schema import Experiment
from meadow.tasks.task import share_task

_WAIT = 0.5
_SOME = 0.001
"""Cores that a worker asks Ray for: hardly any, for how many there are is ours to say; but one that asks for nothing is put
on any machine, wherever it was sent (measured with Ray 2.55.1)."""


class Call(NamedTuple):
    """What a worker on this machine is asked, pickled by the command whose worker it is.

    message and the records that belong into it are places in the segment `sent`; the reply goes into the segment `reply`.
    context: pickled, the same for all calls of a run.
    """

    message: Place
    records: dict[str, Place]
    context: bytes
    sent: Address
    reply: Address


class NodeActor:
    """What runs in a worker: the ClientApp, given messages whose shared records arrive beside them."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._contexts: dict[bytes, Context] = {}

    def home(self) -> str:
        """Ray's id of this worker's machine."""
        return ray.get_runtime_context().get_node_id()

    def share(self, flat: dict[str, Any]) -> str:
        """Put an experiment's data into this machine's common memory: the addresses, "" where it has none."""
        return " ".join(share_task(from_flat(flat)))

    def serve(self, path: str, key: bytes, worker: int) -> None:
        """Answer a connection's calls, one after another, until the command hangs up or is gone."""
        with suppress(EOFError, OSError), connect(path, key, worker) as connection:
            while True:
                connection.send_bytes(self.handle_here(connection.recv_bytes()))

    def handle_here(self, call: bytes) -> bytes:
        """`handle` for a pickled `Call`: where the answer lies, pickled, or why there is none."""
        try:
            return pickle.dumps(self._answer(pickle.loads(call)))
        except Exception:  # a segment that is gone or cannot be had costs this call, not the worker
            return pickle.dumps(traceback.format_exc())

    def _answer(self, given: Call) -> Place:
        if given.context not in self._contexts:
            self._contexts = {given.context: pickle.loads(given.context)}
        segment = self._segment(given.sent)
        message, *records = (segment.read(place) for place in (given.message, *given.records.values()))
        answer = self.handle(message, self._contexts[given.context], list(given.records), *records)
        (place,) = self._segment(given.reply).write([answer])
        return place

    def _segment(self, address: Address) -> Segment:
        if address.number not in self._segments:
            self._segments[address.number] = Segment(address)
        return self._segments[address.number]

    def handle(self, message: Message, context: Context, names: list[str], *records: ArrayRecord) -> Message:
        """Answer a message, with the records put back under their names."""
        from meadow.client.app import app  # imported in the worker, by name, once

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
        self.calls = Calls(count) if on_this_machine and hasattr(os, "memfd_create") else None
        self.serving: list[Any] = []
        """Of workers with a connection what Ray answers when they hang up."""
        self.segments = Segments()
        self.sent: dict[int, Sent] = {}
        """What is on its way, by the call's number; of runs that have ended too, as its segments are in use."""
        remote: Any = ray.remote(NodeActor)
        for number, home in enumerate(_homes(count)):
            # A killed worker comes back (Flower's engine puts it back in its pool dead) and answers what it was asked
            # again: a client's answer is a function of the message and of its stored state, so the bits are the same.
            # If its machine is lost, it comes back on another one.
            where = NodeAffinitySchedulingStrategy(home, soft=True)
            options = remote.options(
                num_cpus=_SOME,
                max_restarts=-1,
                max_task_retries=-1 if self.calls else RETRIES,
                scheduling_strategy=where,
            )
            self.actors.append(options.remote())
            if self.calls is not None:
                self.serving.append(self.actors[-1].serve.remote(self.calls.path, self.calls.key, number))
        self.threads = threads


@contextmanager
def ray_workers(count: int, threads: int, address: str = "") -> Iterator[Workers]:
    """`count` workers (0: one for each of Ray's cores), on Ray as `start_ray` has started it, or now starts it; it is
    stopped at the end."""
    start_ray(count, threads, address)
    try:
        workers = Workers(count or sum(_machines().values()), threads, on_this_machine=not address)
        try:
            yield workers
        finally:
            if workers.calls is not None:
                workers.calls.close()
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


def ray_grid(experiment: Experiment, state: Path, workers: Workers) -> LocalGrid:
    """A node for each worker."""
    if workers.calls is None:
        return ClusterGrid(experiment, state, workers)
    return MachineGrid(experiment, state, workers, workers.calls)


class RayGrid(LocalGrid):
    """A node for each worker. A subclass says how messages get there and back."""

    def __init__(self, experiment: Experiment, state: Path, workers: Workers) -> None:
        nodes = len(workers.actors)
        super().__init__(nodes)
        self._contexts = {n: node_context(experiment, i, nodes, state) for i, n in enumerate(self._node_ids)}

    def _parted(self, messages: Sequence[Message]) -> tuple[list[dict[str, int]], list[ArrayRecord]]:
        """Take the array records out of messages: of each message their names with their places in the list of all, which
        has each record once."""
        records: dict[int, tuple[int, ArrayRecord]] = {}
        places = []
        for message in messages:
            own = {name: record for name, record in message.content.items() if isinstance(record, ArrayRecord)}
            message.content = RecordDict({name: r for name, r in message.content.items() if name not in own})
            places.append({n: records.setdefault(id(r), (len(records), r))[0] for n, r in own.items()})
        return places, [record for _, record in records.values()]


class ClusterGrid(RayGrid):
    """Workers of a cluster, reached through Ray. The data is held once for those of a machine."""

    def __init__(self, experiment: Experiment, state: Path, workers: Workers) -> None:
        super().__init__(experiment, state, workers)
        self._experiment = experiment
        self._actors = dict(zip(self._node_ids, workers.actors, strict=True))
        self._running: dict[str, tuple[Any, Message]] = {}

    def open(self) -> None:
        """Let the first worker of each machine share the data with the others there; on this one, this process."""
        here, flat = ray.get_runtime_context().get_node_id(), to_flat(self._experiment)
        limit = self._experiment.cohort.timeout
        try:
            places: list[str] = ray.get([actor.home.remote() for actor in self._actors.values()], timeout=limit)
            homes = dict(zip(self._node_ids, places, strict=True))
            first = {home: node for node, home in reversed(homes.items()) if home != here}
            calls: dict[str, Any] = {home: self._actors[node].share.remote(flat) for home, node in first.items()}
            addresses = {home: str(ray.get(call, timeout=limit)) for home, call in calls.items()}
        except RayError:  # each worker then reads the data by itself, and says in the roll call what is wrong
            return
        addresses[here] = " ".join(share_task(self._experiment))
        for node, home in homes.items():
            self._contexts[node].node_config["data"] = addresses[home]

    def start(self, messages: Sequence[Message]) -> None:
        """Hand each message to its worker; array records are handed over once for all of them."""
        places, records = self._parted(messages)
        stored = [ray.put(record) for record in records]
        for message, own in zip(messages, places, strict=True):
            node, theirs = message.metadata.dst_node_id, [stored[place] for place in own.values()]
            reference: Any = self._actors[node].handle.remote(message, self._contexts[node], list(own), *theirs)
            self._running[message.metadata.message_id] = reference, message

    def collect(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; waits up to half a second for the first."""
        waiting = {self._running[i][0]: i for i in message_ids if i in self._running}
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=_WAIT) if waiting else ([], [])
        more, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if done else ([], [])
        return [self._reply(*self._running.pop(waiting[reference])) for reference in more]

    def _reply(self, reference: Any, message: Message) -> Message:
        try:
            reply: Message = ray.get(reference)
            return reply
        except RayError as error:
            return error_reply(message, f"the worker was lost: {type(error).__name__}")


@dataclass
class Batch:
    """Messages that were sent together: the segment of what they have in common, and how many are not answered yet."""

    segment: Segment
    waiting: int


class Sent(NamedTuple):
    """A message on its way, with the segment of its reply and its batch."""

    message: Message
    reply: Segment
    batch: Batch


class MachineGrid(RayGrid):
    """Workers of this machine, each at the end of a connection. The data is held once for all of them and the server."""

    def __init__(self, experiment: Experiment, state: Path, workers: Workers, calls: Calls) -> None:
        super().__init__(experiment, state, workers)
        self._experiment, self._workers, self._calls = experiment, workers, calls
        self._ours = set[int]()
        self._arrived: dict[str, Message] = {}

    def open(self) -> None:
        """Share the data with the workers, before the server opens it too."""
        addresses = " ".join(share_task(self._experiment))
        for context in self._contexts.values():
            context.node_config["data"] = addresses

    def start(self, messages: Sequence[Message]) -> None:
        """Hand each message to its worker; array records are handed over once for all of them."""
        segments = self._workers.segments
        numbers, records = self._parted(messages)
        batch = Batch(segments.take(), len(messages))
        places = batch.segment.write([*records, *messages])
        for message, own, place in zip(messages, numbers, places[len(records) :], strict=True):
            node, reply = message.metadata.dst_node_id, segments.take()
            theirs, context = {name: places[number] for name, number in own.items()}, pickle.dumps(self._contexts[node])
            call = Call(place, theirs, context, batch.segment.address, reply.address)
            number = self._calls.call(self._node_ids.index(node), pickle.dumps(call))
            self._workers.sent[number] = Sent(message, reply, batch)
            self._ours.add(number)

    def collect(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; waits up to half a second for the first."""
        asked = list(message_ids)
        there = any(each in self._arrived for each in asked)
        found = self._calls.answers(0 if there else _WAIT)
        if not found and not there:
            serving = self._workers.serving
            ended, _ = ray.wait(serving, num_returns=len(serving), timeout=0)
            found = [lost for reference in ended for lost in self._calls.lose(serving.index(reference))]
        for number, answer in found:
            reply = self._reply(self._workers.sent.pop(number), answer)
            if number in self._ours:  # else it was for a run that has ended
                self._ours.remove(number)
                self._arrived[reply.metadata.reply_to_message_id] = reply
        return [self._arrived.pop(each) for each in asked if each in self._arrived]

    def _reply(self, sent: Sent, answer: bytes | None) -> Message:
        """The reply in a message's segment; its segments may then be used again."""
        said = "the worker was lost" if answer is None else pickle.loads(answer)
        reply: Message = error_reply(sent.message, said) if isinstance(said, str) else sent.reply.read(said)
        segments = self._workers.segments
        segments.give_back(sent.reply)
        sent.batch.waiting -= 1
        if not sent.batch.waiting:
            segments.give_back(sent.batch.segment)
        return reply
