"""The exchange: roll call, nodes that fail, restart or lie, and clients that are addressed by their partition id."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from helpers.refusals import refused
from meadow.arrays.named import Arrays
from meadow.arrays.sums import weighted_sum
from meadow.runtime.clock import PHASES
from meadow.runtime.errors import RunStopped
from meadow.runtime.identity import code_sha256, versions
from meadow.server.assignment import assign
from meadow.server.exchange import Exchange
from meadow.server.rollcall import PATIENCE, Carrier, RollCall
from meadow.simulation.grid import LocalGrid, become_server, error_reply
from meadow.strategies.wire.packing import Answer, NodeReply, Request, pack_replies, unpack_requests

ROLL = {"code": code_sha256(), "data": "d", "split": "s", "versions": json.dumps(versions())}


SENT: Arrays = {"w": np.asarray([0], dtype=np.float32)}


class FakeGrid(LocalGrid):
    """Nodes that answer by the functions given; a node without one never answers."""

    def __init__(self, nodes: dict[int, Callable[[Message], RecordDict]]) -> None:
        become_server()
        super().__init__(0)
        self.nodes = nodes
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def start(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.sent.append(message)
            try:
                reply = Message(self.nodes[message.metadata.dst_node_id](message), reply_to=message)
            except TimeoutError:
                continue
            except Exception as error:
                reply = error_reply(message, str(error))
            self._replies[message.metadata.message_id] = reply

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]


def node(clients: Sequence[int], fault: str = "", **roll: Any) -> Callable[[Message], RecordDict]:
    """A node that hosts clients, each of 10 samples, and answers every one of them with one array of its number."""

    def answer(message: Message) -> RecordDict:
        if message.metadata.message_type == "query":
            sizes = np.full(len(clients), 10, dtype="<i8").tobytes()
            ranges = [bound for client in clients for bound in (client, client + 1)]
            return RecordDict({"roll": ConfigRecord(ROLL | {"clients": ranges, "sizes": sizes} | roll)})
        if fault == "silent":
            raise TimeoutError
        if fault == "raises":
            raise OSError("no disk")
        if fault == "garbage":
            return RecordDict({"x": ConfigRecord({"y": 1})})
        requests, _ = unpack_requests(message.content)
        answers = [reply(r.client, r.client) for r in requests]
        if fault == "lies":
            extra = weighted_sum([(1e6, {"w": np.asarray([666], dtype=np.float32)})])
            answers.append(reply(0, 666))
            return pack_replies(NodeReply(answers, {(0, 1): extra, (0, 2): extra, (7, 8): extra}))
        return pack_replies(NodeReply(answers))

    return answer


def reply(client: int, value: int) -> Answer:
    return Answer(client, {"metrics": {"num-examples": 10}}, {"w": np.asarray([value], dtype=np.float32)})


def exchange(nodes: dict[int, Callable[[Message], RecordDict]], clients: int, timeout: float = 0.3) -> Exchange:
    return Exchange(roll(nodes, clients, timeout))


def roll(
    nodes: dict[int, Callable[[Message], RecordDict]], clients: int, timeout: float = 0.3, patience: float = PATIENCE
) -> RollCall:
    return RollCall(Carrier(FakeGrid(nodes)), "run", {}, {"data": "d", "split": "s"}, clients, timeout, patience)


def ask(found: Exchange, clients: Sequence[int], whole_blocks: bool = False) -> tuple[dict[int, str | float], Any]:
    replies, sums = found.send("train", [Request(c, SENT, {"round": 1}) for c in clients], whole_blocks)
    assert [r.client for r in replies] == list(clients)
    answers = {r.client: r.error if r.arrays is None else float(r.arrays["w"][0]) for r in replies}
    return answers, sums


def test_clients_are_addressed_and_nodes_get_one_message() -> None:
    found = exchange({5: node([0, 2]), 9: node([1, 3])}, 4)
    found.roll.gather()
    assert ask(found, [0, 1, 2, 3])[0] == {0: 0, 1: 1, 2: 2, 3: 3}
    grid = found.roll.carrier.grid
    assert isinstance(grid, FakeGrid)
    assert [m.metadata.message_type for m in grid.sent] == ["query", "query", "train", "train"]


@pytest.mark.parametrize(
    ("fault", "words"), [("silent", "in time"), ("raises", "no disk"), ("garbage", "cannot be read")]
)
def test_a_failing_node_costs_its_own_clients(fault: str, words: str) -> None:
    found = exchange({5: node([0, 2], fault), 9: node([1])}, 3)
    found.roll.gather()
    answers, _ = ask(found, [0, 1, 2])
    assert answers[1] == 1
    assert words in str(answers[0]) and words in str(answers[2])


def test_a_node_speaks_for_its_own_clients_only() -> None:
    found = exchange({5: node([0, 1]), 9: node([2], "lies")}, 3)
    found.roll.gather()
    answers, sums = ask(found, [0, 1, 2], whole_blocks=True)
    assert answers == {0: 0, 1: 1, 2: 2}
    assert sums == {}


def test_a_restarted_node_takes_its_clients_back() -> None:
    nodes = {5: node([0]), 9: node([1])}
    found = exchange(nodes, 2)
    found.roll.gather()
    del nodes[9]
    answers, _ = ask(found, [0, 1])
    assert answers[0] == 0 and isinstance(answers[1], str)
    nodes[11] = node([1])
    assert ask(found, [0, 1])[0] == {0: 0, 1: 1}


def test_missing_clients_stop_the_run() -> None:
    with refused("1 of 3", "client 2", "cohort.timeout", kind=RunStopped):
        roll({5: node([0, 1])}, 3).gather()


@pytest.mark.parametrize("what", ["code", "data", "split"])
def test_a_node_of_another_kind_is_refused(what: str) -> None:
    with refused("node 5", what, kind=RunStopped):
        roll({5: node([0], **{what: "other"})}, 1).gather()


def test_a_node_that_cannot_open_its_clients_is_not_waited_for() -> None:
    """A first error may pass; one that stays ends the run with its reason, long before `cohort.timeout`."""
    errors = 2

    def hesitant(message: Message) -> RecordDict:
        nonlocal errors
        if errors and message.metadata.message_type == "query":
            errors -= 1
            raise OSError("no data\nunder /data")
        return node([0])(message)

    roll({5: hesitant}, 1, timeout=60).gather()
    found, errors = roll({5: hesitant, 6: node([1])}, 2, patience=0), 1
    found.meet()
    del cast(FakeGrid, found.carrier.grid).nodes[5]
    found.meet()
    cast(FakeGrid, found.carrier.grid).nodes[5], errors = hesitant, 1
    found.meet()  # it was gone meanwhile: this is its first error again
    errors = 10**9
    with refused("node 5", "under /data", kind=RunStopped):
        roll({5: hesitant}, 1, timeout=60, patience=0).gather()


@pytest.mark.parametrize("name", ["flwr", "torch"])
def test_a_node_with_another_release_of_a_library_is_refused(name: str) -> None:
    other = json.dumps(versions() | {name: "1.2.3"})
    with refused("node 5", f"{name} 1.2.3", versions()[name], kind=RunStopped):
        roll({5: node([0], versions=other)}, 1).gather()


def test_another_build_of_the_same_torch_is_welcome() -> None:
    build = versions()["torch"].partition("+")[0] + "+cu130"
    roll({5: node([0], versions=json.dumps(versions() | {"torch": build}))}, 1).gather()


@given(
    st.lists(st.floats(0.1, 1000), min_size=1, max_size=40),
    st.lists(st.floats(0.5, 2), min_size=1, max_size=5),
)
def test_work_is_dealt_so_that_the_last_worker_ends_early(work: list[float], rates: list[float]) -> None:
    """No later than the mean by 3%, or else than when the last worker was free and took its last piece (Graham 1969)."""
    places = assign(work, rates)
    assert len(places) == len(work) and set(places) <= set(range(len(rates)))
    ends = [rates[k] * sum(w for w, p in zip(work, places, strict=True) if p == k) for k in range(len(rates))]
    level = sum(work) / sum(1 / r for r in rates)  # if all ended together
    mean = sum(ends) / len(ends)
    assert max(ends) <= max(1.03 * mean + 1e-9, level + max(work) * max(rates))


def test_equal_work_stays_together_and_uneven_work_is_parted() -> None:
    assert assign([1.0] * 10, [1.0, 1.0]) == assign([1.0] * 10, [1.0, 1.1]) == [0] * 5 + [1] * 5
    assert assign([5.0, 1.0, 1.0, 4.0, 1.0], [1.0, 1.0]) in ([0, 0, 1, 1, 1], [0, 1, 0, 1, 1], [0, 1, 1, 1, 0])
    assert assign([1.0, 1.0, 1.0], [1.0, 0.5]) == [0, 1, 1]


def test_the_last_worker_gives_away_what_helps() -> None:
    """Of these ten, longest first alone leaves one worker with 277 and the other with 257."""
    work = [113.0, 48.0, 26.0, 54.0, 39.0, 51.0, 45.0, 42.0, 73.0, 43.0]
    places = assign(work, [1.0, 1.0])
    assert sum(w for w, place in zip(work, places, strict=True) if place) in (266.0, 267.0, 268.0)


def test_a_nodes_first_round_tells_nothing_of_its_pace() -> None:
    """It opens its data in it. Of forty equal clients each node then has two blocks, and later the faster one has more."""
    dealt: list[dict[int, int]] = []
    paces = {5: iter([0.05, 0.01, 0.01]), 9: iter([0.005, 0.03, 0.03])}

    def timed(number: int) -> Callable[[Message], RecordDict]:
        roll = node([], simulated=True) if number == 9 else node(range(40), simulated=True)

        def answer(message: Message) -> RecordDict:
            if message.metadata.message_type == "query":
                return roll(message)
            requests, _ = unpack_requests(message.content)
            dealt[-1][number] = len(requests)
            time.sleep(0.06)
            times = dict.fromkeys(PHASES, 0.0) | {"train": next(paces[number]) * len(requests) / 20}
            return pack_replies(NodeReply([reply(r.client, r.client) for r in requests], times=times))

        return answer

    found = Exchange(roll({5: timed(5), 9: timed(9)}, 40, 1.0), movable=True)
    found.roll.gather()
    for _ in range(3):
        dealt.append({})
        found.send("train", [Request(c, SENT, {"round": 1}) for c in range(40)], work=dict.fromkeys(range(40), 1.0))
    assert dealt == [{5: 20, 9: 20}, {5: 20, 9: 20}, {5: 30, 9: 10}]


class RestartingGrid(FakeGrid):
    """A grid that starts its workers again."""

    def abandon(self, message_ids: Iterable[str]) -> None:
        """All replies are there at once."""


def test_a_node_that_was_lost_gets_clients_only_after_it_answers_the_roll_call() -> None:
    """Any node may train any client here, so none is lost in the meantime."""
    well, lost, got = node(range(40), simulated=True), set[int](), dict[int, int]()

    def mortal(number: int) -> Callable[[Message], RecordDict]:
        def answer(message: Message) -> RecordDict:
            if number in lost:
                raise OSError("the worker was lost")
            if message.metadata.message_type == "train":
                got[number] = len(unpack_requests(message.content)[0])
            return well(message)

        return answer

    nodes = RollCall(
        Carrier(RestartingGrid({5: mortal(5), 9: mortal(9)})), "run", {}, {"data": "d", "split": "s"}, 40, 1.0
    )
    found, dealt = Exchange(nodes, movable=True), []
    found.roll.gather()
    for gone in ({9}, {9}, {5, 9}, {5, 9}, set[int]()):
        lost.clear()
        lost |= gone
        got.clear()
        answers, _ = found.send(
            "train", [Request(c, SENT, {"round": 1}) for c in range(40)], work=dict.fromkeys(range(40), 1.0)
        )
        dealt.append((dict(got), sum(bool(answer.error) for answer in answers)))
    assert dealt == [({5: 20}, 20), ({5: 40}, 0), ({}, 40), ({}, 40), ({5: 20, 9: 20}, 0)]
