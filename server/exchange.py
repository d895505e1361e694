"""The exchange translates between clients, which the server addresses, and nodes, which the Flower grid reaches.

It packs the requests to clients into one message for each node, unpacks the replies, and matches them to clients.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict

from meadow.arrays.sums import Span, WeightedSum, cut, spans
from meadow.runtime.logs import printable
from meadow.server.assignment import Paces
from meadow.server.rollcall import RollCall
from meadow.server.states import require_states
from meadow.strategies.wire.packing import Answer, NodeReply, Record, Request, pack_requests, unpack_replies
from meadow.strategies.wire.trainings import Trainings

Sums = dict[tuple[int, ...], WeightedSum]
"""Sums of blocks and of spans of blocks, by their clients."""


@dataclass
class Exchange:
    """Reaches clients through the nodes that the roll call found. One for each server process."""

    roll: RollCall
    movable: bool = False
    """Whether any simulated node may train any client: every node has the data, and all client states are on one machine."""
    idle: float | None = None
    """The nodes' idle share of the time of the last exchange; None if they do not report their times."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of the slowest node in the last exchange, by phase (`meadow.runtime.clock`); all count as training if nodes
    do not report their times."""
    trainings: Trainings = field(default_factory=Trainings)
    """Which trainers the nodes report to have used, since the last `take`."""
    _paces: Paces = field(default_factory=Paces)

    def send(
        self,
        kind: str,
        requests: Sequence[Request],
        whole_blocks: bool = False,
        work: Mapping[int, float] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[list[Answer], Sums]:
        """Send requests of a kind ("train" or "evaluate") and wait for the answers.

        `work`: the expected work of each client, in any unit. If clients are `movable`, blocks are assigned to nodes by
        it; otherwise each client's request goes to the node that hosts it. `meanwhile`: called once everything is sent.

        Returns one answer for each request, in the same order, with an error if the client did not answer; and, if
        `whole_blocks` lets nodes add up updates, the sums of the blocks and spans of blocks that one node answered
        entirely (their clients' answers then have no arrays). Raises RunStopped if a client has lost its state.
        """
        self.roll.meet()
        blocks = cut([request.client for request in requests])
        where = self._nodes_of(requests, blocks, work)
        asked: dict[int, list[Request]] = {}
        for request in requests:
            if request.client in where:
                asked.setdefault(where[request.client], []).append(request)
        contents: dict[int, tuple[str, RecordDict]] = {}
        whole: dict[int, dict[Span, tuple[int, ...]]] = {}
        possible, made = spans(len(blocks)) if whole_blocks else [], dict[int, Record]()
        for node, theirs in asked.items():
            whole[node] = _allowed_sums(node, blocks, possible, where) if whole_blocks else {}
            single = [(first, clients) for (first, stop), clients in whole[node].items() if stop - first == 1]
            contents[node] = kind, pack_requests(theirs, single, [s for s in whole[node] if s[1] - s[0] > 1], made)
        began = time.perf_counter()
        replies = self.roll.carrier.carry(contents, self._limit(asked), meanwhile)
        lasted = time.perf_counter() - began
        found = {node: _unpack(reply) for node, reply in replies.items()}
        self._note_times(found, lasted, asked, work)
        if self.roll.carrier.restarting is not None:
            self.roll.lose(node for node, reply in replies.items() if reply is None or reply.has_error())
        answers, sums = _accepted(found, asked, whole)
        for reply in [reply for reply in found.values() if isinstance(reply, NodeReply)]:
            self.trainings.merge(reply.trainings)
        whose = [answers.get(r.client) or Answer(r.client, error="no node that hosts it answered") for r in requests]
        require_states(whose)
        return whose, sums

    def _limit(self, asked: Mapping[int, Sequence[Request]]) -> float:
        """Seconds to wait for the nodes: `cohort.timeout`; of workers that end themselves, what they may take at most."""
        if self.roll.carrier.restarting is None:
            return self.roll.timeout
        return self.roll.carrier.start_time + self.roll.timeout * (2 + max(map(len, asked.values()), default=0))

    def _nodes_of(
        self, requests: Sequence[Request], blocks: Sequence[tuple[int, ...]], work: Mapping[int, float] | None
    ) -> dict[int, int]:
        """The node that each client's request goes to; clients without a node are omitted."""
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
        """Note how long each node worked. Reported times that exceed the duration of the exchange are ignored."""
        reported = {node: reply.times for node, reply in found.items() if isinstance(reply, NodeReply) and reply.times}
        busy = {
            n: sum(t.values()) for n, t in reported.items() if 0 < sum(t.values()) < lasted and min(t.values()) >= 0
        }
        self.times = reported[max(busy, key=busy.__getitem__)] if busy else {"train": lasted}
        self.idle = 1 - sum(busy.values()) / (lasted * len(self.roll.nodes)) if busy and self.roll.simulated else None
        if work is not None:
            self._paces.learn(busy, {node: sum(work[r.client] for r in asked[node]) for node in busy})


def _allowed_sums(
    node: int, blocks: Sequence[tuple[int, ...]], possible: Sequence[Span], where: Mapping[int, int]
) -> dict[Span, tuple[int, ...]]:
    """The blocks and spans of blocks whose clients are all on this node, each with its clients. The node may send sums of
    these; any other sum in its reply is ignored."""
    own = {i: block for i, block in enumerate(blocks) if all(where.get(c) == node for c in block)}
    return {(i, i + 1): block for i, block in own.items()} | {
        span: tuple(c for i in range(*span) for c in own[i]) for span in possible if own.keys() >= set(range(*span))
    }


def _accepted(
    found: Mapping[int, NodeReply | str],
    asked: Mapping[int, Sequence[Request]],
    whole: Mapping[int, Mapping[Span, tuple[int, ...]]],
) -> tuple[dict[int, Answer], Sums]:
    """The answers of clients that each node was asked for, and the sums that it was allowed to send."""
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
    """A node's unpacked reply, or the reason why there is none."""
    if reply is None:
        return "its node did not answer in time"
    if reply.has_error():
        return f"its node failed: {printable(str(reply.error.reason))}"
    try:
        return unpack_replies(reply.content)
    except (KeyError, TypeError, ValueError) as error:
        return f"its node's reply cannot be read: {error!r}"
