"""The nodes: a carrier brings messages to them, and the roll call asks which clients each one hosts.

A node's code, data, split and versions must match the server's.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from meadow.arrays.flower import is_remote, to_record
from meadow.arrays.folding import folded, is_folded, unfolded
from meadow.arrays.named import Arrays
from meadow.runtime.errors import RunStopped
from meadow.runtime.identity import code_sha256, versions
from meadow.runtime.logs import printable

log = logging.getLogger("meadow.server")

PATIENCE = 5.0
"""Grace period, in seconds, for a node whose roll call fails before round 1; then the run stops."""
DECISIVE = ("flwr", "torch")
"""Libraries whose release must be the same on server and nodes; the build (+cpu, +cu130) may differ."""
_START = 60.0
"""Seconds, on top of the limit for replies, in which workers may start."""
_PAUSE = 0.05
_REMOTE_PAUSE = 0.25
"""Seconds between two polls for replies, where each poll is a call to the SuperLink."""


@runtime_checkable
class Restarting(Protocol):
    """A grid whose workers give each client `cohort.timeout` from its turn on, and are started again if they end."""

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Expect no reply to these messages any more, and end their workers."""


class Carrier:
    """Carries contents to nodes. They travel folded over HTTP, where each record would cost a call of its own."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.restarting = grid if isinstance(grid, Restarting) else None
        self.start_time = _START if self.restarting is not None else 0.0
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
        if self.restarting is not None:
            self.restarting.abandon(waiting)
        return replies


def _unfolded(reply: Message) -> Message:
    """Unfold a reply's content. A reply that cannot be unfolded stays as it is; reading it will fail."""
    if reply.has_content() and is_folded(reply.content):
        try:
            reply.content = unfolded(reply.content)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("the reply of node %d cannot be unfolded: %r", reply.metadata.src_node_id, error)
    return reply


@dataclass
class RollCall:
    """Which node hosts each client, and what the nodes reported about themselves."""

    carrier: Carrier
    run_id: str
    base: Arrays
    """Arrays that every client starts from and that are not sent again in the rounds."""
    expected: dict[str, str]
    """The hashes of "data" and "split" that every node must have, too."""
    clients: int
    timeout: float
    patience: float = PATIENCE
    sizes: npt.NDArray[np.int64] = field(init=False)
    """The training samples that each client declared, int64 (clients,): the cap on its weight."""
    simulated: bool = True
    """Whether every node so far is simulated; simulated secrets are not secret."""
    keeps: bool = False
    """Whether some node reports that its clients keep state from round to round."""
    _faulty: dict[int, float] = field(default_factory=dict)
    """When each node that answers with an error first did so."""
    _nodes: set[int] = field(default_factory=set)
    _known: list[int] = field(default_factory=list)
    _hosts: npt.NDArray[np.int32] = field(init=False)
    """Each client's index into `_known`, or -1. An array, because it takes only four bytes per client."""

    def __post_init__(self) -> None:
        self.sizes = np.zeros(self.clients, dtype=np.int64)
        self._hosts = np.full(self.clients, -1, dtype=np.int32)

    @property
    def nodes(self) -> list[int]:
        """The nodes that are present, ascending."""
        return sorted(self._nodes)

    def host(self, client: int) -> int | None:
        """The present node that hosts a client, or None."""
        place = int(self._hosts[client])
        return self._known[place] if place >= 0 and self._known[place] in self._nodes else None

    def lose(self, nodes: Iterable[int]) -> None:
        """Treat nodes as new: they get no clients until they answer the roll call."""
        self._nodes -= {*nodes}

    def gather(self) -> None:
        """Wait until some node hosts each client. Raises RunStopped after the time limit, or if a node cannot take part."""
        end = time.monotonic() + self.timeout + self.carrier.start_time
        while True:
            self.meet()
            missing = np.flatnonzero(self._hosts < 0)
            if not len(missing):
                return
            if time.monotonic() > end:
                raise RunStopped(
                    f"no node hosts {len(missing)} of {self.clients} clients (the first is client {missing[0]}) after "
                    f"cohort.timeout = {self.timeout:.0f} s: start their nodes, or raise cohort.timeout"
                )
            time.sleep(_PAUSE)

    def meet(self) -> None:
        """Query the nodes that are new since the last call; a restarted node gets its clients back."""
        present = set(self.carrier.grid.get_node_ids())
        self._nodes &= present
        self._faulty = {node: since for node, since in self._faulty.items() if node in present}
        if new := sorted(present - self._nodes):
            content = RecordDict({"base": to_record(self.base), "config": ConfigRecord({"run": self.run_id})})
            asked = dict.fromkeys(new, (MessageType.QUERY, content))
            limit = self.timeout + self.carrier.start_time
            for node, reply in self.carrier.carry(asked, limit).items():
                if reply is None:
                    log.warning("node %d did not answer the roll call in time", node)
                    self._faulty.pop(node, None)
                elif reply.has_error():
                    self._note_fault(node, reply)
                else:
                    self._faulty.pop(node, None)
                    self._enter(node, reply.content.config_records.get("roll", ConfigRecord()))

    def _note_fault(self, node: int, reply: Message) -> None:
        reason, now = printable(str(reply.error.reason)), time.monotonic()
        waited = now - self._faulty.setdefault(node, now)
        if waited > self.patience and bool((self._hosts < 0).any()):  # else the run goes on without it
            last = (reason.strip().splitlines() or ["no reason"])[-1]
            raise RunStopped(
                f"node {node} answers the roll call with an error: {last}; fix the node and start the run again"
            )
        log.warning("node %d answers the roll call with an error: %s", node, reason)

    def _enter(self, node: int, roll: ConfigRecord) -> None:
        _refuse_mismatch(node, roll, self.expected)
        self._nodes.add(node)
        self.simulated &= bool(roll.get("simulated", False))
        self.keeps |= bool(roll.get("keeps", True))
        if node not in self._known:
            self._known.append(node)
        sizes, taken = np.frombuffer(cast(bytes, roll["sizes"]), dtype="<i8"), 0
        bounds = cast(list[int], roll["clients"])
        for first, stop in zip(bounds[::2], bounds[1::2], strict=True):
            self._hosts[first:stop] = self._known.index(node)
            self.sizes[first:stop] = sizes[taken : taken + stop - first]
            taken += stop - first


def _refuse_mismatch(node: int, roll: ConfigRecord, expected: dict[str, str]) -> None:
    """Raise RunStopped if a node's code, data, split or library releases differ from the server's."""
    for what, ours in {"code": code_sha256(), **expected}.items():
        if roll.get(what) != ours:
            raise RunStopped(
                f"node {node} has another {what} than the server (SHA-256 {roll.get(what)!s:.12}, here {ours:.12}; "
                f"its versions: {roll.get('versions')!s}): install the same Meadow and the same data on both"
            )
    theirs = json.loads(str(roll.get("versions", "{}")))
    for name in DECISIVE:
        if _release(theirs.get(name, "missing")) != _release(versions()[name]):
            raise RunStopped(
                f"node {node} has {name} {theirs.get(name, 'missing')}, the server has {versions()[name]}: install the "
                "same release on both; releases can differ in their protocol or in the bits of their results"
            )


def _release(version: str) -> str:
    return version.partition("+")[0]
