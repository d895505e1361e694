"""The base of Meadow's own grids: Flower's `Grid` interface over nodes that this process reaches directly."""

import itertools
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from meadow.arrays.flower import Run, set_message_id, set_task
from meadow.config.load import to_flat
from meadow.config.schema import Experiment

SERVER_NODE = 1
RUN_ID = 1
NODE_FAILED = 0


def become_server() -> None:
    """Let this process create messages."""
    set_task(RUN_ID, SERVER_NODE)


def server_context(experiment: Experiment, out: Path, resume: bool) -> Context:
    """The ServerApp's context on one of Meadow's own grids."""
    config = {**to_flat(experiment), "out": str(out), "resume": resume}
    return Context(RUN_ID, SERVER_NODE, {}, RecordDict(), config)


def node_context(experiment: Experiment, index: int, nodes: int, state: Path) -> Context:
    """The context of the node with the given index (its id is index + 2; 1 is the server)."""
    settings = node_settings(index, nodes, state)
    return Context(RUN_ID, index + SERVER_NODE + 1, settings, RecordDict(), to_flat(experiment))


def node_settings(index: int, nodes: int, state: Path) -> dict[str, bool | float | int | str]:
    """A simulated node's configuration: its share of the clients, and the folder of their state."""
    return {"partition-id": index, "num-partitions": nodes, "state": str(state), "simulated": True}


def error_reply(message: Message, reason: str) -> Message:
    """The reply that stands for a node that failed."""
    return Message(Error(code=NODE_FAILED, reason=reason), reply_to=message)


class LocalGrid(Grid):
    """`nodes` nodes, numbered from 2. A subclass starts messages and collects their replies."""

    def __init__(self, nodes: int) -> None:
        self._node_ids = range(SERVER_NODE + 1, SERVER_NODE + 1 + nodes)
        self._next_id = itertools.count(1)

    def open(self) -> None:
        """Prepare what the server and the nodes share."""

    @abstractmethod
    def start(self, messages: Sequence[Message]) -> None:
        """Start to process messages, whose ids are set."""

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that have arrived; may wait a moment for one."""

    def get_node_ids(self) -> list[int]:
        """The nodes' ids."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to their nodes; returns their ids, in order."""
        batch = list(messages)
        for message in batch:
            set_message_id(message, str(next(self._next_id)))
        self.start(batch)
        return [message.metadata.message_id for message in batch]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for their replies, at most `timeout` seconds."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting and time.monotonic() < end:
            arrived = self.pull_messages(list(waiting))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        return replies

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's older way to make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Do nothing: the grid serves only one run."""

    @property
    def run(self) -> Run:
        """An empty description of the one run."""
        return Run.create_empty(RUN_ID)
