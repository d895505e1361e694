"""The inline engine: one node in this process, so that a debugger can stop in client code."""

import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flwr.app import Context, Message

from meadow.client.app import app
from meadow.config.schema import Experiment
from meadow.simulation.grid import LocalGrid, error_reply, node_context


class InlineGrid(LocalGrid):
    """A node that answers each message before `push_messages` returns. client_app: what answers."""

    def __init__(
        self, experiment: Experiment, state: Path, client_app: Callable[[Message, Context], Message] = app
    ) -> None:
        super().__init__(nodes=1)
        self._client_app = client_app
        self._context = node_context(experiment, 0, 1, state)
        self._replies: dict[str, Message] = {}

    def start(self, messages: Sequence[Message]) -> None:
        """Let the ClientApp answer."""
        for message in messages:
            try:
                reply = self._client_app(message, self._context)
            except Exception:  # a node that fails costs its clients, not the run
                reply = error_reply(message, traceback.format_exc())
            self._replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies, all of which are ready."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]
