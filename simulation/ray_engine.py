"""The Ray engine: each actor is a node and hosts an even share of the clients, who always return to it.

Data that several messages share, above all the global model, is handed over once. Workers on this machine read it from
shared memory (`meadow/arrays/memory.py`) and are called over connections (`simulation/connections.py`). Workers of a cluster
get it from Ray's object store and are called through Ray.
"""

import os
import pickle
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from flwr.app import ArrayRecord, Message, RecordDict
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from meadow.arrays.memory import Segment, Segments
from meadow.config.load import to_flat
from meadow.config.schema import Experiment
from meadow.simulation.connections import Calls
from meadow.simulation.grid import LocalGrid, error_reply, node_context
from meadow.simulation.ray_start import start_ray, stop_ray
from meadow.simulation.worker import Call
from meadow.simulation.worker import NodeActor as NodeActor
from meadow.tasks.task import share_task

_WAIT = 0.5
_NUM_CPUS = 0.001
"""`num_cpus` of each actor. Tiny, because Meadow decides how many workers run; not zero, because Ray 2.55.1 ignores the node
affinity of actors that request nothing."""
_DEATHS = 20
"""How often a worker of a cluster may die of a message; then its clients are lost. Most of them are answered long before,
because it leaves out a client that it died of twice."""


class Workers:
    """Ray actors that outlive a run, so that all runs of a comparison share them."""

    def __init__(self, count: int, threads: int, on_this_machine: bool) -> None:
        self.actors: list[ActorHandle[Any]] = []
        self.calls = Calls(count) if on_this_machine and hasattr(os, "memfd_create") else None
        self.serving: list[Any] = []
        """Ray's reference to each `serve` call, which ends when the worker is lost for good."""
        self.segments = Segments()
        self.sent: dict[int, Sent] = {}
        """Unanswered messages by the call's number, including those of runs that ended: their segments are still in use."""
        remote: Any = ray.remote(NodeActor)
        for number, home in enumerate(_machine_of_each(count)):
            # Ray restarts a killed worker, which then repeats its calls (Flower's engine returns it to its pool, dead).
            # A client's answer depends only on the message and its stored state, so the bits are the same. If the machine
            # is lost, the worker restarts on another one.
            where = NodeAffinitySchedulingStrategy(home, soft=True)
            options = remote.options(
                num_cpus=_NUM_CPUS,
                max_restarts=-1,
                max_task_retries=-1 if self.calls else _DEATHS,
                scheduling_strategy=where,
            )
            self.actors.append(options.remote())
            if self.calls is not None:
                self.serving.append(self.actors[-1].serve.remote(self.calls.path, self.calls.key, number))
        self.threads = threads


@contextmanager
def ray_workers(count: int, threads: int, address: str = "") -> Iterator[Workers]:
    """`count` workers (0: one per core of Ray's). Starts Ray unless `start_ray` already did; stops it at the end."""
    start_ray(count, threads, address)
    try:
        workers = Workers(count or sum(_cores().values()), threads, on_this_machine=not address)
        try:
            yield workers
        finally:
            if workers.calls is not None:
                workers.calls.close()
    finally:
        stop_ray()


def _cores() -> dict[str, int]:
    """The number of cores of each live machine, by Ray's id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]}
    return {node: count for node, count in cores.items() if count} or dict.fromkeys(cores, 1)


def _machine_of_each(count: int) -> list[str]:
    """The machine of each of `count` workers, in proportion to the machines' cores. A machine's workers are adjacent, and so
    are their clients."""
    cores = _cores()
    taken = dict.fromkeys(cores, 0)
    for _ in range(count):
        taken[min(cores, key=lambda node: ((taken[node] + 1) / cores[node], node))] += 1
    return [node for node, workers in taken.items() for _ in range(workers)]


def ray_grid(experiment: Experiment, state: Path, workers: Workers) -> LocalGrid:
    """A grid with a node for each worker."""
    if workers.calls is None:
        return ClusterGrid(experiment, state, workers)
    return MachineGrid(experiment, state, workers, workers.calls)


class RayGrid(LocalGrid):
    """A grid with a node for each worker. A subclass transports the messages."""

    def __init__(self, experiment: Experiment, state: Path, workers: Workers) -> None:
        nodes = len(workers.actors)
        super().__init__(nodes)
        self._contexts = {n: node_context(experiment, i, nodes, state) for i, n in enumerate(self._node_ids)}

    @abstractmethod
    def abandon(self, message_ids: Iterable[str]) -> None:
        """Expect no reply to these messages any more; end their workers, which are then started again."""

    def _take_records(self, messages: Sequence[Message]) -> tuple[list[dict[str, int]], list[ArrayRecord]]:
        """Remove the array records from messages. Returns each message's records as {name: index}, and the list of distinct
        records that these indices refer to."""
        records: dict[int, tuple[int, ArrayRecord]] = {}
        places = []
        for message in messages:
            own = {name: record for name, record in message.content.items() if isinstance(record, ArrayRecord)}
            message.content = RecordDict({name: r for name, r in message.content.items() if name not in own})
            places.append({n: records.setdefault(id(r), (len(records), r))[0] for n, r in own.items()})
        return places, [record for _, record in records.values()]


class ClusterGrid(RayGrid):
    """Workers of a cluster, reached through Ray. Workers of one machine share one copy of the data."""

    def __init__(self, experiment: Experiment, state: Path, workers: Workers) -> None:
        super().__init__(experiment, state, workers)
        self._experiment = experiment
        self._actors = dict(zip(self._node_ids, workers.actors, strict=True))
        self._running: dict[str, tuple[Any, Message]] = {}

    def open(self) -> None:
        """Let one process of each machine share the data with its workers: this process here, elsewhere the first worker."""
        here, flat = ray.get_runtime_context().get_node_id(), to_flat(self._experiment)
        limit = self._experiment.cohort.timeout
        try:
            places: list[str] = ray.get([actor.home.remote() for actor in self._actors.values()], timeout=limit)
            homes = dict(zip(self._node_ids, places, strict=True))
            first = {home: node for node, home in reversed(homes.items()) if home != here}
            calls: dict[str, Any] = {home: self._actors[node].share.remote(flat) for home, node in first.items()}
            addresses = {home: str(ray.get(call, timeout=limit)) for home, call in calls.items()}
        except RayError:  # each worker then reads the data itself and reports errors in the roll call
            return
        addresses[here] = " ".join(share_task(self._experiment))
        for node, home in homes.items():
            self._contexts[node].node_config["data"] = addresses[home]

    def start(self, messages: Sequence[Message]) -> None:
        """Send each message to its worker; array records are handed over once for all messages."""
        places, records = self._take_records(messages)
        stored = [ray.put(record) for record in records]
        for message, own in zip(messages, places, strict=True):
            node, theirs = message.metadata.dst_node_id, [stored[place] for place in own.values()]
            reference: Any = self._actors[node].handle.remote(message, self._contexts[node], list(own), *theirs)
            self._running[message.metadata.message_id] = reference, message

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived; waits up to half a second for the first."""
        waiting = {self._running[i][0]: i for i in message_ids if i in self._running}
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=_WAIT) if waiting else ([], [])
        more, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if done else ([], [])
        return [self._reply(*self._running.pop(waiting[reference])) for reference in more]

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Expect no reply to these messages any more; end their workers, which are then started again."""
        for each in message_ids:
            _, message = self._running.pop(each)
            ray.kill(self._actors[message.metadata.dst_node_id], no_restart=False)

    def _reply(self, reference: Any, message: Message) -> Message:
        try:
            reply: Message = ray.get(reference)
            return reply
        except RayError as error:
            return error_reply(message, f"the worker was lost: {type(error).__name__}")


@dataclass
class Batch:
    """Messages that were sent together: the segment with their content, and the number of unanswered ones."""

    segment: Segment
    waiting: int


class Sent(NamedTuple):
    """An unanswered message, with the segment for its reply and its batch."""

    message: Message
    reply: Segment
    batch: Batch


class MachineGrid(RayGrid):
    """Workers of this machine, each called over a connection. They share one copy of the data with the server."""

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
        """Send each message to its worker; array records are handed over once for all messages."""
        segments = self._workers.segments
        numbers, records = self._take_records(messages)
        batch = Batch(segments.take(), len(messages))
        places = batch.segment.write([*records, *messages])
        for message, own, place in zip(messages, numbers, places[len(records) :], strict=True):
            node, reply = message.metadata.dst_node_id, segments.take()
            theirs, context = {name: places[number] for name, number in own.items()}, pickle.dumps(self._contexts[node])
            call = Call(place, theirs, context, batch.segment.address, reply.address)
            number = self._calls.call(self._node_ids.index(node), pickle.dumps(call))
            self._workers.sent[number] = Sent(message, reply, batch)
            self._ours.add(number)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived; waits up to half a second for the first."""
        asked = list(message_ids)
        ready = any(each in self._arrived for each in asked)
        found = self._calls.answers(0 if ready else _WAIT)
        if not found and not ready:
            self._calls.kill_frozen()
            serving = self._workers.serving
            ended, _ = ray.wait(serving, num_returns=len(serving), timeout=0)
            found = [lost for reference in ended for lost in self._calls.fail(serving.index(reference))]
        for number, answer in found:
            reply = self._reply(self._workers.sent.pop(number), answer)
            if number in self._ours:  # otherwise it belongs to a run that has ended
                self._ours.remove(number)
                self._arrived[reply.metadata.reply_to_message_id] = reply
        return [self._arrived.pop(each) for each in asked if each in self._arrived]

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Expect no reply to these messages any more; end their workers, which are then started again.

        Their segments are not used again: a worker may still write.
        """
        gone = {*message_ids}
        for number in [n for n in self._ours if self._workers.sent[n].message.metadata.message_id in gone]:
            self._ours.remove(number)
            del self._workers.sent[number]
            self._calls.drop(number)

    def _reply(self, sent: Sent, answer: bytes | None) -> Message:
        """The reply to a message; its segments are given back for reuse."""
        place = "the worker was lost" if answer is None else pickle.loads(answer)  # or a traceback
        reply: Message = error_reply(sent.message, place) if isinstance(place, str) else sent.reply.read(place)
        segments = self._workers.segments
        segments.give_back(sent.reply)
        sent.batch.waiting -= 1
        if not sent.batch.waiting:
            segments.give_back(sent.batch.segment)
        return reply
