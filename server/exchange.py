"""The exchange: the server speaks to clients, the Flower grid carries messages to nodes; this stands between.

Roll call: every node is asked which clients it hosts, and its code, data, split and the releases of flwr and torch are
compared with the server's.
After that, messages are addressed to clients (`dst_node_id` is the client's partition id), packed into one Flower
message for each node, and the replies unpacked and matched.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid
from meadow.strategies.wire.packing import Answer, NodeReply, Request, pack_requests, unpack_replies
from meadow.strategies.wire.trainings import Trainings

from meadow.arrays.flower import to_record
from meadow.arrays.folding import folded, is_folded, unfolded
from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, cut, spans
from meadow.runtime.errors import RunStopped
from meadow.runtime.identity import code_sha256, versions

log = logging.getLogger("meadow.server")

_PAUSE = 0.05
PATIENCE = 5.0
"""Seconds in which a node that answers the roll call with an error may come to its senses before a run begins."""
_REMOTE_PAUSE = 0.25
"""Seconds between two questions for replies where each is a call to the SuperLink."""
EVEN = 0.02
"""Share of the time by which the last worker may end later before blocks next to each other are parted."""
LEVEL = 0.005
"""Share of the even time by which the last worker may end later before pieces are exchanged."""
DECISIVE = ("flwr", "torch")
"""The libraries of which server and nodes need the same release; its build (+cpu, +cu130) may differ."""


@dataclass
class Exchange:
    """Clients by the node that hosts them, and how to reach them. Made once a server process."""

    grid: Grid
    run_id: str
    base: Arrays
    """Arrays that every client starts from and that do not travel in the rounds."""
    expected: dict[str, str]
    """What every node must have in common with the server: "data" and "split", as hashes."""
    clients: int
    timeout: float
    movable: bool = False
    """Whether any simulated node may train any client: all have the data, and the clients' states are on one machine."""
    sizes: npt.NDArray[np.int64] = field(init=False)
    """Training samples that each client declared at roll call, int64 (clients,): the cap of its weight."""
    idle: float | None = None
    """In the last exchange the share of the nodes' time in which they had nothing to do; None if they do not say."""
    times: dict[str, float] = field(default_factory=dict)
    """In the last exchange the seconds, by phase (`meadow.runtime.clock`), of the node that took longest; all of it
    counts as training where nodes do not say."""
    simulated: bool = True
    """Whether every node so far has said that it is simulated: its secrets are then none."""
    trainings: Trainings = field(default_factory=Trainings)
    """Who trained the clients, by what the nodes say, since it was last taken."""
    _faulty: dict[int, float] = field(default_factory=dict)
    """Since when a node has answered the roll call with an error."""
    _nodes: set[int] = field(default_factory=set)
    _known: list[int] = field(default_factory=list)
    _hosts: npt.NDArray[np.int32] = field(init=False)
    """Each client's place in `_known`, -1 where it has none: four bytes a client, however many there are."""
    _rates: dict[int, float] = field(default_factory=dict)
    """Seconds that a node took for a unit of work, of late."""
    _opened: set[int] = field(default_factory=set)
    """Nodes that have trained before: in its first round a node opens its data as well, which tells nothing of its pace."""

    def __post_init__(self) -> None:
        self.sizes = np.zeros(self.clients, dtype=np.int64)
        self._hosts = np.full(self.clients, -1, dtype=np.int32)

    def host(self, client: int) -> int | None:
        """The node that hosts a client, if one does that is there."""
        place = int(self._hosts[client])
        return self._known[place] if place >= 0 and self._known[place] in self._nodes else None

    def gather(self) -> None:
        """Wait until every client is hosted by some node. Raises RunStopped after the time limit, and if a node cannot."""
        end = time.monotonic() + self.timeout
        while True:
            self.meet()
            missing = np.flatnonzero(self._hosts < 0)
            if not len(missing):
                return
            if time.monotonic() > end:
                raise RunStopped(
                    f"{len(missing)} of {self.clients} clients are hosted by no node after {self.timeout:.0f} s, "
                    f"the first of them client {missing[0]}: start their nodes, or raise cohort.timeout"
                )
            time.sleep(_PAUSE)

    def meet(self) -> None:
        """Call the roll of nodes that are new since the last time; a restarted node takes its clients back."""
        present = set(self.grid.get_node_ids())
        self._nodes &= present
        self._faulty = {node: since for node, since in self._faulty.items() if node in present}
        if new := sorted(present - self._nodes):
            content = RecordDict({"base": to_record(self.base), "config": ConfigRecord({"run": self.run_id})})
            for node, reply in self._carry(dict.fromkeys(new, (MessageType.QUERY, content)), self.timeout).items():
                self._enter(node, reply)

    def send(
        self,
        messages: Sequence[Message],
        whole_blocks: bool = False,
        work: Mapping[int, float] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[list[Answer], dict[tuple[int, ...], WeightedSum]]:
        """Carry client messages and wait for the replies.

        `work`: what each client is expected to take, in any unit; blocks are then dealt to the nodes by it, if they are
        `movable`, and else go where their clients are hosted. `meanwhile`: what to do once all is sent.

        Returns one answer for each message, in the same order, with an error where the client gave none; and, if
        `whole_blocks` allows nodes to add up, the sums of those blocks and spans of blocks, by their clients, that a
        node answered as a whole (their clients' answers then have no "arrays").
        """
        self.meet()
        by_node: dict[int, list[Message]] = {}
        blocks = cut([m.metadata.dst_node_id for m in messages])
        dealt = self._deal(blocks, work) if work is not None and self.movable and self.simulated else {}
        where: dict[int, int] = {}
        for message in messages:
            client = message.metadata.dst_node_id
            if (node := dealt[client] if dealt else self.host(client)) is not None:
                where[client] = node
                by_node.setdefault(node, []).append(message)
        blocks = blocks if whole_blocks else []
        possible = spans(len(blocks))
        requests = {}
        whole: dict[int, dict[Span, tuple[int, ...]]] = {}
        for node, theirs in by_node.items():
            # A node may add up the blocks and spans that it hosts as a whole, and no others: those it is held to below.
            own = {i: b for i, b in enumerate(blocks) if all(where.get(c) == node for c in b)}
            held = [span for span in possible if own.keys() >= set(range(*span))]
            whole[node] = {(i, i + 1): block for i, block in own.items()}
            whole[node] |= {span: tuple(c for i in range(*span) for c in own[i]) for span in held}
            asks = [Request(m.metadata.dst_node_id, m.content) for m in theirs]
            packed = pack_requests(asks, list(own.items()), held)
            requests[node] = (theirs[0].metadata.message_type, packed)
        answers: dict[int, Answer] = {}
        sums: dict[tuple[int, ...], WeightedSum] = {}
        began, busy = time.perf_counter(), dict[int, float]()
        times: dict[int, dict[str, float]] = {}
        replies = self._carry(requests, self.timeout, meanwhile)
        span = time.perf_counter() - began
        for node, reply in replies.items():
            unpacked = _unpack(reply)
            if isinstance(unpacked, str):
                answers |= {c: Answer(c, error=unpacked) for c in (m.metadata.dst_node_id for m in by_node[node])}
                continue
            if 0 < (seconds := sum(unpacked.times.values())) < span and min(unpacked.times.values()) >= 0:
                busy[node], times[node] = seconds, unpacked.times
            self.trainings.merge(unpacked.trainings)
            asked = {m.metadata.dst_node_id for m in by_node[node]}
            sums |= {whole[node][span]: total for span, total in unpacked.sums.items() if span in whole[node]}
            answers |= {answer.client: answer for answer in unpacked.answers if answer.client in asked}
        self.times = times[max(busy, key=busy.__getitem__)] if busy else {"train": span}
        self.idle = 1 - sum(busy.values()) / (span * len(self._nodes)) if busy and self.simulated else None
        if work is not None:
            for node, seconds in busy.items():
                amount = sum(work[m.metadata.dst_node_id] for m in by_node[node])
                if node in self._opened:
                    now, usual = seconds / amount, self._rates.get(node, seconds / amount)
                    self._rates[node] = usual + (now - usual) / 4
            self._opened |= busy.keys()
        clients = [m.metadata.dst_node_id for m in messages]
        return [answers.get(c) or Answer(c, error="no node answered for it") for c in clients], sums

    def _deal(self, blocks: Sequence[tuple[int, ...]], work: Mapping[int, float]) -> dict[int, int]:
        """The node of each client: whole blocks by what they are expected to take on each node."""
        nodes = sorted(self._nodes)
        usual = statistics.fmean(self._rates.values()) if self._rates else 1.0
        rates = [self._rates.get(node, usual) for node in nodes]
        places = deal([sum(work[c] for c in block) for block in blocks], rates)
        return {client: nodes[place] for block, place in zip(blocks, places, strict=True) for client in block}

    def _enter(self, node: int, reply: Message | None) -> None:
        if reply is None:
            log.warning("node %d did not answer the roll call in time", node)
            self._faulty.pop(node, None)
            return
        if reply.has_error():
            reason, now = str(reply.error.reason), time.monotonic()
            waited = now - self._faulty.setdefault(node, now)
            if waited > PATIENCE and bool((self._hosts < 0).any()):  # else the run goes on without it
                last = (reason.strip().splitlines() or ["no reason"])[-1]
                raise RunStopped(
                    f"node {node} answers the roll call with an error: {last}; mend it and start the run again"
                )
            log.warning("node %d answers the roll call with an error: %s", node, reason)
            return
        self._faulty.pop(node, None)
        roll = reply.content.config_records.get("roll", ConfigRecord())
        for what, ours in {"code": code_sha256(), **self.expected}.items():
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
                    "same release on both; another one may speak another protocol, or give other bits"
                )
        self._nodes.add(node)
        self.simulated &= bool(roll.get("simulated", False))
        if node not in self._known:
            self._known.append(node)
        sizes, taken = np.frombuffer(cast(bytes, roll["sizes"]), dtype="<i8"), 0
        bounds = cast(list[int], roll["clients"])
        for first, stop in zip(bounds[::2], bounds[1::2], strict=True):
            self._hosts[first:stop] = self._known.index(node)
            self.sizes[first:stop] = sizes[taken : taken + stop - first]
            taken += stop - first

    def _carry(
        self,
        contents: dict[int, tuple[str, RecordDict]],
        timeout: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[int, Message | None]:
        """One message to each node; the reply of each, None where the time limit passed. Matched by message id."""
        remote = isinstance(self.grid, HttpGrid)
        messages = [
            Message(content=folded(c) if remote else c, message_type=t, dst_node_id=n) for n, (t, c) in contents.items()
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
                time.sleep(_REMOTE_PAUSE if remote else _PAUSE)
        return replies


def deal(work: Sequence[float], rates: Sequence[float]) -> list[int]:
    """Which of several workers (0..len(rates)-1) does each of several pieces of `work`, so that they end together.

    `rates`: the time that each worker takes for a unit. The longest piece comes first and each goes to the worker that
    ends first with it (Graham 1969): that takes at most 4/3 of the shortest time possible. Then the worker that ends last
    gives away a piece, or exchanges one, as long as that helps. But where pieces next to each other can stay together (a
    worker then adds up whole spans of blocks) and the last worker ends at most EVEN later, they do.
    """
    speeds = np.array([1 / rate for rate in rates])
    amount = np.array(work, dtype=np.float64)
    middle = (np.cumsum(amount) - amount / 2) / amount.sum()
    together = np.minimum(np.searchsorted(np.cumsum(speeds) / speeds.sum(), middle), len(speeds) - 1)
    end = (np.bincount(together, amount, len(speeds)) / speeds).max()
    ends, parted = np.zeros(len(speeds)), np.zeros(len(amount), dtype=np.int64)
    for piece in np.argsort(-amount, kind="stable"):
        place = int(np.argmin(ends + amount[piece] / speeds))
        ends[place] += amount[piece] / speeds[place]
        parted[piece] = place
    _level(amount, speeds, ends, parted)
    return [int(place) for place in (together if end <= (1 + EVEN) * ends.max() else parted)]


def _level(
    amount: npt.NDArray[np.float64],
    speeds: npt.NDArray[np.float64],
    ends: npt.NDArray[np.float64],
    places: npt.NDArray[np.int64],
) -> None:
    """Let the worker that ends last give a piece to another one, or exchange two with it, while that makes the later of both
    end earlier, until the last one ends LEVEL after the even share. `ends` and `places` change."""
    even = amount.sum() / speeds.sum()
    while ends.max() > (1 + LEVEL) * even:
        last = int(np.argmax(ends))
        ours, best = np.flatnonzero(places == last), (float(ends[last]), -1, -1, -1)
        for other in set(range(len(speeds))) - {last}:
            theirs = np.flatnonzero(places == other)
            back = np.append(amount[theirs], 0)  # in the last column nothing comes back
            moved = amount[ours][:, None] - back
            later = np.maximum(ends[last] - moved / speeds[last], ends[other] + moved / speeds[other])
            i, j = divmod(int(later.argmin()), len(back))
            best = min(best, (float(later[i, j]), other, int(ours[i]), int(theirs[j]) if j < len(theirs) else -1))
        _, other, given, taken = best
        if other < 0:
            return
        moved = amount[given] - (amount[taken] if taken >= 0 else 0)
        places[given] = other
        places[[taken] if taken >= 0 else []] = last
        ends[last] -= moved / speeds[last]
        ends[other] += moved / speeds[other]


def _release(version: str) -> str:
    return version.partition("+")[0]


def _unfolded(reply: Message) -> Message:
    """A reply with its content unfolded; one that cannot be stays as it came, and cannot be read."""
    if reply.has_content() and is_folded(reply.content):
        try:
            reply.content = unfolded(reply.content)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("the reply of node %d cannot be unfolded: %r", reply.metadata.src_node_id, error)
    return reply


def _unpack(reply: Message | None) -> NodeReply | str:
    """A node's packed reply, or why there is none."""
    if reply is None:
        return "its node did not answer in time"
    if reply.has_error():
        return f"its node failed: {reply.error.reason}"
    try:
        return unpack_replies(reply.content)
    except (KeyError, TypeError, ValueError) as error:
        return f"its node's reply cannot be read: {error!r}"


def as_messages(answers: Iterable[Answer], messages: Iterable[Message]) -> list[Message]:
    """Answers with content as replies to the messages that asked for them: what Flower's strategies take."""
    asked = {message.metadata.dst_node_id: message for message in messages}
    return [Message(a.content, reply_to=asked[a.client]) for a in answers if a.content is not None]


class Cohort(Grid):
    """The grid as a strategy sees it while it configures a round: its node ids are the cohort's clients.

    Flower's own strategies draw from `get_node_ids`; asked for all of these, they get exactly the cohort that the
    server drew from the seed. Messages go through the `Exchange`, never through this.
    """

    def __init__(self, clients: Sequence[int]) -> None:
        self._clients = list(clients)

    def get_node_ids(self) -> list[int]:
        """The cohort's clients, ascending."""
        return sorted(self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not for strategies: they return their messages from `configure_*`."""
        raise RuntimeError("a strategy returns its messages from configure_*; the server's rounds send them")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not for strategies."""
        return self.push_messages(())  # type: ignore[return-value]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not for strategies."""
        return self.push_messages(())  # type: ignore[return-value]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's older way to make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Nothing to set."""

    @property
    def run(self) -> Run:
        """An empty description: a cohort belongs to no Flower run."""
        return Run.create_empty(0)
