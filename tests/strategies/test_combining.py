"""Sharing, blocks, packing and admission: sums by hand, equal bits however they are grouped, and what is turned away."""

import itertools
import pickle
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rounding import close
from meadow.arrays.flower import Kept
from meadow.arrays.named import Arrays, arrays_sha256
from meadow.arrays.sums import BLOCK, FAN, add, cut, fault, mean, parts, spans, weighted_sum
from meadow.server.admission import Sums, Verdict, admit
from meadow.server.evaluation import over_clients
from meadow.server.rounds import round_sum
from meadow.simulation.grid import become_server
from meadow.strategies import server_of
from meadow.strategies.check import load
from meadow.strategies.protocol import Roles, Setup
from meadow.strategies.roles import roles
from meadow.strategies.wire.packing import (
    Answer,
    NodeReply,
    Request,
    Values,
    add_spans,
    pack_replies,
    pack_requests,
    unpack_replies,
    unpack_requests,
)

NAMES = ("trunk.0.weight", "trunk.0.bias", "heads.digit.weight", "heads.digit.bias")


def arrays_of(seed: int) -> Arrays:
    draw = np.random.default_rng(seed)
    return {"trunk.w": draw.normal(size=(3, 2)).astype(np.float32), "heads.b": draw.normal(size=4).astype(np.float32)}


def reply(client: int, arrays: Arrays | None, **metrics: Any) -> Answer:
    """A client's reply as the server sees it."""
    return Answer(client, {"metrics": {"num-examples": 10, "steps": 1} | metrics}, arrays)


def admitted(replies: list[Answer], sums: Sums, sent: Arrays, sizes: dict[int, Any]) -> Verdict:
    """The verdict where all clients were sent the same."""
    return admit(replies, sums, dict.fromkeys([reply.client for reply in replies], sent), sizes)


def test_two_clients_one_to_three() -> None:
    block = weighted_sum(
        [(1, {"w": np.array([4, 8], dtype=np.float32)}), (3, {"w": np.array([8, 0], dtype=np.float32)})]
    )
    found = mean(add([block]), {"w": np.zeros(2, np.float32)})
    assert found["w"].tolist() == [7, 2] and found["w"].dtype == np.float32


def test_three_blocks_average_to_the_weighted_mean() -> None:
    draw = np.random.default_rng(1)
    values = draw.normal(size=(2 * BLOCK + 3, 50)).astype(np.float32)
    weights = draw.integers(1, 90, len(values)).astype(float)
    blocks = [weighted_sum((weights[c], {"w": values[c]}) for c in b) for b in cut(range(len(values)))]
    assert len(blocks) == 3
    found = mean(add(blocks), {"w": np.zeros(50, np.float64)})["w"]
    exact, sizes = (np.average(v.astype(np.float64), axis=0, weights=weights) for v in (values, np.abs(values)))
    close(found, exact, 2 * len(values), sizes, dtype=np.float64)


def test_each_name_is_averaged_over_those_who_sent_it() -> None:
    before: Arrays = {
        "a": np.array([1], dtype=np.float32),
        "b": np.array([2], dtype=np.float32),
        "c": np.array([3], dtype=np.float32),
        "n": np.array([7], dtype=np.int64),
    }
    block = weighted_sum(
        [
            (1, {"a": np.array([10], dtype=np.float32), "n": np.array([8], dtype=np.int64)}),
            (
                3,
                {
                    "a": np.array([2], dtype=np.float32),
                    "b": np.array([5], dtype=np.float32),
                    "n": np.array([9], dtype=np.int64),
                },
            ),
        ]
    )
    found = mean(add([block]), before)
    assert {k: v.tolist() for k, v in found.items()} == {"a": [4], "b": [5], "c": [3], "n": [9]}
    assert found["n"].dtype == np.int64


@pytest.mark.parametrize(
    ("share", "trainable", "shared", "personal"),
    [
        ("all", "all", NAMES, ()),
        ("all", "head", NAMES, ()),
        ("none", "all", (), NAMES),
        ("none", "head", (), NAMES[2:]),
        ("body", "all", NAMES[:2], NAMES[2:]),
        ("head", "all", NAMES[2:], NAMES[:2]),
        ("head", "head", NAMES[2:], ()),
        ("trainable", "head", NAMES[2:], ()),
        ("trainable", "all", NAMES, ()),
    ],
)
def test_roles(share: str, trainable: str, shared: tuple[str, ...], personal: tuple[str, ...]) -> None:
    found = roles(load("fedavg", [f"strategy.share={share}", f"local.trainable={trainable}"]), NAMES)
    assert (found.shared, found.personal) == (shared, personal)
    assert sorted(found.shared + found.personal + found.fixed) == sorted(NAMES)


@given(st.sets(st.integers(0, 60), min_size=1, max_size=45), st.integers(0, 5))
def test_bits_do_not_depend_on_who_adds_up(cohort: set[int], seed: int) -> None:
    become_server()
    draw = np.random.default_rng(seed)
    updates: dict[int, Arrays] = {
        c: {"w": (draw.normal(size=5) * 10.0 ** draw.integers(-6, 6)).astype(np.float32)} for c in cohort
    }
    sizes = {c: int(draw.integers(1, 50)) for c in cohort}
    assert [c for block in cut(list(cohort)) for c in block] == sorted(cohort)
    assert all(len(b) == BLOCK for b in cut(list(cohort))[:-1])
    before: Arrays = {"w": np.zeros(5, np.float32)}
    results = set()
    for whole in (0.0, 0.5, 1.0):  # the share of blocks that a node answers as one sum
        sums = {b: weighted_sum((sizes[c], updates[c]) for c in b) for b in cut(list(cohort)) if draw.random() < whole}
        inside = {c for b in sums for c in b}
        replies = [reply(c, None if c in inside else updates[c], **{"num-examples": sizes[c]}) for c in sorted(cohort)]
        verdict = admitted(replies, sums, before, sizes)
        plan, parts = load("fedavg"), Roles(("w",), ("w",), (), ())
        setup = Setup(plan.strategy, plan.local, 0, parts, {"w": 61}, equal_weights=False)
        server = server_of(setup)
        total = round_sum(sorted(cohort), verdict)
        assert total is not None
        mean, _ = server.update(server.init(before), total, before)
        results.add(arrays_sha256(mean))
    assert len(results) == 1


@given(st.integers(101, 260), st.integers(0, 5))
@settings(max_examples=20)
def test_bits_do_not_depend_on_who_adds_up_spans(clients: int, seed: int) -> None:
    """A node that adds up all blocks of a span gives the bits of a server that is sent each client's arrays."""
    become_server()
    draw = np.random.default_rng(seed)
    updates: list[Arrays] = [
        {"w": (draw.normal(size=3) * 10.0 ** draw.integers(-6, 6)).astype(np.float32)} for _ in range(clients)
    ]
    sizes = [float(draw.random() + 0.1) for _ in range(clients)]
    blocks = cut(range(clients))
    sent: Arrays = {"w": np.zeros(3, np.float32)}
    results = set()
    for kept in (0.0, 0.5, 1.0):  # the share of blocks that are summed at all
        single = {
            (i, i + 1): weighted_sum((sizes[c], updates[c]) for c in b)
            for i, b in enumerate(blocks)
            if draw.random() <= kept
        }
        node = NodeReply([], single)
        add_spans(node, spans(len(blocks)))
        assert kept < 1 or [*node.sums] == [(0, len(blocks))]
        sums = {tuple(c for m in range(*span) for c in blocks[m]): total for span, total in node.sums.items()}
        inside = {c for b in sums for c in b}
        replies = [reply(c, None if c in inside else updates[c], **{"num-examples": sizes[c]}) for c in range(clients)]
        verdict = admitted(replies, sums, sent, dict(enumerate([2.0] * clients)))
        assert not verdict.refused
        total = round_sum(range(clients), verdict)
        assert total is not None
        results.add((arrays_sha256(total.sums), total.weights["w"]))
    assert len(results) == 1


@given(st.integers(0, 700))
def test_spans_are_sums_of_their_parts(count: int) -> None:
    """Every span stands behind its parts, at most FAN, which lie next to each other and fill it; the whole comes last."""
    found = spans(count)
    known = {(i, i + 1) for i in range(count)}
    for span in found:
        of = list(parts(span))
        assert 2 <= len(of) <= FAN and known >= set(of)
        assert (of[0][0], of[-1][1]) == span and all(a[1] == b[0] for a, b in itertools.pairwise(of))
        known.add(span)
    assert len(found) == len(set(found)) and (count < 2 or found[-1] == (0, count))


def test_a_kept_array_is_flowers_on_the_wire_and_itself_in_memory() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept, plain = Kept(value), Array(value)
    assert kept.numpy() is value
    assert (kept.dtype, kept.shape, kept.stype, kept.data) == (plain.dtype, plain.shape, plain.stype, plain.data)
    assert kept.object_id == plain.object_id and list(kept.children) == list(plain.children)
    buffers: list[pickle.PickleBuffer] = []
    small = pickle.dumps(kept, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1 and len(small) < 500
    frozen = np.frombuffer(bytes(buffers[0].raw()), np.float32)  # what lies in shared memory is read-only
    back = pickle.loads(small, buffers=[frozen.data])
    assert np.array_equal(back.numpy(), value) and back.numpy().flags.writeable


def test_packing_round_trip() -> None:
    shared, own, config = arrays_of(0), arrays_of(1), {"round": 3, "run": "x", "void": ["1.2"]}
    ledger = {"entries": 2, "sha256": "ab"}
    requests = [Request(c, own if c == 5 else shared, config, ledger if c == 11 else None) for c in (2, 5, 11)]
    packed = pack_requests(requests, [(0, (2, 5))])
    assert len(packed.array_records) == 2  # what several clients get is there once
    back, blocks = unpack_requests(packed)
    assert blocks == [(0, (2, 5))]
    assert [r.client for r in back] == [2, 5, 11]
    for before, after in zip(requests, back, strict=True):
        assert arrays_sha256(after.arrays) == arrays_sha256(before.arrays)
        assert (after.config, after.ledger) == (before.config, before.ledger)
    assert back[0].arrays is back[2].arrays and back[0].config is back[1].config
    made: dict[int, Any] = {}
    nodes = [pack_requests([request], made=made) for request in requests[::2]]
    assert nodes[0]["0.arrays"] is nodes[1]["0.arrays"]  # so a grid that shares memory hands it over once
    block = weighted_sum([(2.0, arrays_of(0)), (3.0, arrays_of(1))])
    values: dict[str, Values] = {"metrics": {"num-examples": 2}, "ledger": ledger}
    node = unpack_replies(
        pack_replies(NodeReply([Answer(2, values, summed=True), Answer(5, error="why")], {(4, 5): block}))
    )
    assert [(a.client, a.error, a.summed) for a in node.answers] == [(2, "", True), (5, "why", False)]
    assert node.answers[0].values == values
    assert node.sums[4, 5].weights == block.weights
    assert all(np.array_equal(node.sums[4, 5].sums[k], block.sums[k]) for k in block.sums)


POISON: dict[str, dict[str, Any]] = {
    "nan": {"trunk.w": np.full((3, 2), np.nan, np.float32)},
    "infinite": {"trunk.w": np.full((3, 2), np.inf, np.float32)},
    "wrong shape": {"trunk.w": np.zeros((2, 3), np.float32)},
    "scalar": {"trunk.w": np.float32(1)},
    "complex": {"trunk.w": np.zeros((3, 2), np.complex64)},
    "double": {"trunk.w": np.zeros((3, 2), np.float64)},
    "extra key": {"trunk.x": np.zeros(1, np.float32)},
}


@pytest.mark.parametrize("name", POISON)
def test_poisoned_arrays_are_turned_away(name: str) -> None:
    sent = arrays_of(0)
    bad = reply(1, sent | {k: np.asarray(v) for k, v in POISON[name].items()})
    verdict = admitted([reply(0, sent), bad, reply(2, sent)], {}, sent, {0: 10, 1: 10, 2: 10})
    assert [answer.client for answer in verdict.admitted] == [0, 2]
    assert set(verdict.refused) == {1} and "trunk" in verdict.refused[1]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1, 0, 1e12, 11])
def test_poisoned_weights_are_turned_away(weight: float) -> None:
    sent = arrays_of(0)
    verdict = admitted([reply(0, sent), reply(1, sent, **{"num-examples": weight})], {}, sent, {0: 10, 1: 10})
    assert set(verdict.refused) == {1} and "num-examples" in verdict.refused[1]


def test_missing_arrays_bytes_that_are_none_and_errors_are_turned_away() -> None:
    sent = arrays_of(0)
    missing = reply(1, {"trunk.w": sent["trunk.w"]})
    garbage = reply(2, sent)
    packed = pack_replies(NodeReply([garbage]))
    packed["2.arrays"] = ArrayRecord({k: Array("float32", (1,), "numpy.ndarray", b"pickled?") for k in sent})
    (unread,) = unpack_replies(packed).answers
    no_metrics = reply(3, sent)
    no_metrics.values = {}
    verdict = admitted([reply(0, sent), missing, unread, no_metrics], {}, sent, dict.fromkeys(range(4), 10))
    assert set(verdict.refused) == {1, 2, 3}
    assert fault(sent, sent) == ""


@pytest.mark.parametrize("value", [np.nan, 3e38, 1e300, 1e10])
def test_a_sum_counts_only_as_a_whole(value: float) -> None:
    sent = arrays_of(0)
    clients = list(range(3 * BLOCK))
    first, second, third = cut(clients)
    sums = {b: weighted_sum((10.0, arrays_of(c)) for c in b) for b in (first, second, third)}
    sums[third].sums["trunk.w"][0] = value
    replies = [reply(c, None, **({"num-examples": 1e9} if c == 3 else {})) for c in clients]
    verdict = admitted(replies, sums, sent, dict.fromkeys(clients, 10))
    assert set(verdict.refused) == {*first, *third}
    assert "declared" in verdict.refused[3] and "client 3 is refused" in verdict.refused[4]
    total = round_sum(clients, verdict)
    assert total is not None and all(np.array_equal(total.sums[k], sums[second].sums[k]) for k in sent)


def test_arrays_beside_a_sum_that_has_them_are_refused() -> None:
    sent = arrays_of(0)
    sums = {block: weighted_sum((10.0, arrays_of(c)) for c in block) for block in cut([0, 1])}
    verdict = admitted([reply(0, None), reply(1, sent)], sums, sent, {0: 10, 1: 10})
    assert "nobody asked" in verdict.refused[1] and not verdict.sums


def test_statistics_of_activations_may_jump_to_the_scale_of_the_data() -> None:
    """Of inputs in the hundred thousands the variance is 10^10; a weight of that size is no result of training."""
    sent = {"norm.running_var": np.ones(3, np.float32), "norm.weight": np.ones(3, np.float32)}
    assert fault(sent | {"norm.running_var": np.full(3, 1e10, np.float32)}, sent) == ""
    assert "norm.weight" in fault(sent | {"norm.weight": np.full(3, 1e10, np.float32)}, sent)
    assert fault({"half": np.full(9, 6e4, np.float16)}, {"half": np.ones(9, np.float16)}) == ""


def test_arrays_that_are_in_no_sum_are_missing() -> None:
    sent = arrays_of(0)
    assert set(admitted([reply(0, None), reply(1, sent)], {}, sent, {0: 10, 1: 10}).refused) == {0}


def test_spread_over_clients_by_hand() -> None:
    scores = {c: {"digit/accuracy": c / 10, "slant/rmse": c / 10} for c in range(11)}
    spread = over_clients(scores, {c: 1 + (c == 10) for c in range(11)})
    accuracy = spread["digit"]["accuracy"]
    assert accuracy["mean"] == pytest.approx(0.5)
    assert accuracy["weighted"] == pytest.approx((5.5 + 1) / 12)
    assert accuracy["std"] == pytest.approx(np.sqrt(0.1))
    assert accuracy["p10"] == pytest.approx(0.1)
    assert accuracy["min"] == 0
    assert accuracy["worst_decile"] == pytest.approx(0.05)  # two of eleven clients: 0 and 0.1
    assert spread["slant"]["rmse"]["worst_decile"] == pytest.approx(0.95)  # for an error the highest are the worst


def test_judging_an_update_leaves_no_thread_at_work() -> None:
    """The threads of NumPy's BLAS wait in a busy loop, for longer than small clients train."""
    large = {"w": np.ones(10**6)}
    assert fault(large, large) == ""
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.01
