"""The exchange: the server speaks to clients, the Flower grid carries messages to nodes; this stands between.

Requests are addressed to clients, packed into one content for each node, and the replies unpacked and matched.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from meadow.server.dealing import Paces
from meadow.server.rollcall import RollCall
from meadow.strategies.wire.packing import Answer, NodeReply, Record, Request, pack_requests, unpack_replies
from meadow.strategies.wire.trainings import Trainings

from meadow.arrays.sums import Span, WeightedSum, cut, spans

Sums = dict[tuple[int, ...], WeightedSum]
"""Of blocks and spans of blocks, by their clients."""


@dataclass
class Exchange:
    """How to reach clients, through the nodes that the roll call found. Made once a server process."""

    roll: RollCall
    movable: bool = False
    """Whether any simulated node may train any client: all have the data, and the clients' states are on one machine."""
    idle: float | None = None
    """In the last exchange the share of the nodes' time in which they had nothing to do; None if they do not say."""
    times: dict[str, float] = field(default_factory=dict)
    """In the last exchange the seconds, by phase (`meadow.runtime.clock`), of the node that took longest; all of it
    counts as training where nodes do not say."""
    trainings: Trainings = field(default_factory=Trainings)
    """Who trained the clients, by what the nodes say, since it was last taken."""
    _paces: Paces = field(default_factory=Paces)

    def send(
        self,
        kind: str,
        requests: Sequence[Request],
        whole_blocks: bool = False,
        work: Mapping[int, float] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[list[Answer], Sums]:
        """Carry requests of a kind ("train" or "evaluate") and wait for the answers.

        `work`: what each client is expected to take, in any unit; blocks are then dealt to the nodes by it, if they are
        `movable`, and else go where their clients are hosted. `meanwhile`: what to do once all is sent.

        Returns one answer for each request, in the same order, with an error where the client gave none; and, if
        `whole_blocks` allows nodes to add up, the sums of those blocks and spans of blocks that a node answered as a
        whole (their clients' answers then have no "arrays").
        """
        self.roll.meet()
        blocks = cut([request.client for request in requests])
        where = self._hosts(requests, blocks, work)
        asked: dict[int, list[Request]] = {}
        for request in requests:
            if request.client in where:
                asked.setdefault(where[request.client], []).append(request)
        contents: dict[int, tuple[str, RecordDict]] = {}
        whole: dict[int, dict[Span, tuple[int, ...]]] = {}
        possible, made = spans(len(blocks)) if whole_blocks else [], dict[int, Record]()
        for node, theirs in asked.items():
            whole[node] = _whole(node, blocks, possible, where) if whole_blocks else {}
            single = [(first, clients) for (first, stop), clients in whole[node].items() if stop - first == 1]
            contents[node] = kind, pack_requests(theirs, single, [s for s in whole[node] if s[1] - s[0] > 1], made)
        began = time.perf_counter()
        replies = self.roll.carrier.carry(contents, self.roll.timeout, meanwhile)
        lasted = time.perf_counter() - began
        found = {node: _unpack(reply) for node, reply in replies.items()}
        self._note_times(found, lasted, asked, work)
        answers, sums = _sorted(found, asked, whole)
        for reply in found.values():
            if isinstance(reply, NodeReply):
                self.trainings.merge(reply.trainings)
        return [answers.get(r.client) or Answer(r.client, error="no node answered for it") for r in requests], sums

    def _hosts(
        self, requests: Sequence[Request], blocks: Sequence[tuple[int, ...]], work: Mapping[int, float] | None
    ) -> dict[int, int]:
        """The node that is to answer for each client; a client without one is left out."""
        if work is not None and requests and self.movable and self.roll.simulated:
            return self._paces.places(self.roll.nodes, blocks, work)
        hosts = {request.client: self.roll.host(request.client) for request in requests}
        return {client: node for client, node in hosts.items() if node is not None}

    def _note_times(
        self,
        found: Mapping[int, NodeReply | str],
        lasted: float,
        asked: Mapping[int, Sequence[Request]],
        work: Mapping[int, float] | None,
    ) -> None:
        """Take in how long nodes say that they worked, where that can be within the time that the exchange lasted."""
        said = {node: reply.times for node, reply in found.items() if isinstance(reply, NodeReply) and reply.times}
        busy = {n: sum(t.values()) for n, t in said.items() if 0 < sum(t.values()) < lasted and min(t.values()) >= 0}
        self.times = said[max(busy, key=busy.__getitem__)] if busy else {"train": lasted}
        self.idle = 1 - sum(busy.values()) / (lasted * len(self.roll.nodes)) if busy and self.roll.simulated else None
        if work is not None:
            self._paces.learn(busy, {node: sum(work[r.client] for r in asked[node]) for node in busy})


def _whole(
    node: int, blocks: Sequence[tuple[int, ...]], possible: Sequence[Span], where: Mapping[int, int]
) -> dict[Span, tuple[int, ...]]:
    """The blocks and possible spans of blocks that a node hosts as a whole, each with its clients. It may add up these, and
    no others: it is held to them when it answers."""
    own = {i: block for i, block in enumerate(blocks) if all(where.get(c) == node for c in block)}
    held = [span for span in possible if own.keys() >= set(range(*span))]
    return {(i, i + 1): block for i, block in own.items()} | {
        span: tuple(c for i in range(*span) for c in own[i]) for span in held
    }


def _sorted(
    found: Mapping[int, NodeReply | str],
    asked: Mapping[int, Sequence[Request]],
    whole: Mapping[int, Mapping[Span, tuple[int, ...]]],
) -> tuple[dict[int, Answer], Sums]:
    """The answers of the clients that each node was asked for, and the sums that it may answer with."""
    answers: dict[int, Answer] = {}
    sums: Sums = {}
    for node, reply in found.items():
        clients = {request.client for request in asked[node]}
        if isinstance(reply, str):
            answers |= {client: Answer(client, error=reply) for client in clients}
            continue
        sums |= {whole[node][span]: total for span, total in reply.sums.items() if span in whole[node]}
        answers |= {answer.client: answer for answer in reply.answers if answer.client in clients}
    return answers, sums


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
