"""The carrier: sends one Flower message to each node over the grid and collects the replies."""

import logging
import time
from collections.abc import Callable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from meadow.arrays.flower import is_remote
from meadow.arrays.folding import folded, is_folded, unfolded

log = logging.getLogger("meadow.server")

_PAUSE = 0.05
_REMOTE_PAUSE = 0.25
"""Seconds between two polls for replies, where each poll is a call to the SuperLink."""


class Carrier:
    """Carries contents to nodes. They travel folded over HTTP, where each record would cost a call of its own."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._remote = is_remote(grid)

    def carry(
        self,
        contents: dict[int, tuple[str, RecordDict]],
        timeout: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[int, Message | None]:
        """Send each node its (message type, content); return each node's reply, None after `timeout` seconds.

        Replies are matched by message id. `meanwhile` is called once everything is sent.
        """
        messages = [
            Message(content=folded(c) if self._remote else c, message_type=t, dst_node_id=n)
            for n, (t, c) in contents.items()
        ]
        waiting = dict(zip(self.grid.push_messages(messages), contents, strict=True)) if messages else {}
        meanwhile()
        replies: dict[int, Message | None] = dict.fromkeys(contents)
        end = time.monotonic() + timeout
        while waiting and time.monotonic() < end:
            arrived = list(self.grid.pull_messages(list(waiting)))
            for reply in arrived:
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    replies[node] = _unfolded(reply)
            if waiting and not arrived:
                time.sleep(_REMOTE_PAUSE if self._remote else _PAUSE)
        return replies


def _unfolded(reply: Message) -> Message:
    """Unfold a reply's content. A reply that cannot be unfolded stays as it is; reading it will fail."""
    if reply.has_content() and is_folded(reply.content):
        try:
            reply.content = unfolded(reply.content)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("the reply of node %d cannot be unfolded: %r", reply.metadata.src_node_id, error)
    return reply
