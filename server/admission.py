"""Admission: the server judges each reply by itself before it combines any. A bad reply costs only its own client."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, cut, fault, total
from meadow.strategies.roles import name_weights
from meadow.strategies.wire.packing import Answer
from meadow.strategies.wire.replies import arrays_fault, weight_fault

Sums = Mapping[tuple[int, ...], WeightedSum]
Judge = Callable[[Mapping[str, Any], int], str]
"""Maps a reply's metrics and the client's declared samples to the reason to refuse it, or ""."""


@dataclass(frozen=True)
class Verdict:
    """The replies that count, in client order; the sums that count; and the reason why each other client was refused."""

    admitted: list[Answer]
    sums: dict[tuple[int, ...], WeightedSum]
    refused: dict[int, str]


def admit(
    replies: Sequence[Answer],
    sums: Sums,
    sent: Mapping[int, Arrays],
    sizes: Mapping[int, int],
    *,
    equal: bool = False,
    judge: Judge | None = None,
    judge_update: Callable[[Arrays, Arrays], str] | None = None,
) -> Verdict:
    """Judge each reply: it exists, its weight is positive and at most the declared size, its arrays match those sent.

    `sent`: the arrays that each client received. `sizes`: the training samples that each client declared at roll call.
    `equal`: every client has weight 1 (`meadow.strategies.roles.name_weights`). `judge`: the strategy's check of the
    metrics. `judge_update`: the stages' check of arrays of the right form against those sent. If a client replied twice,
    the first reply counts. A reply may lack arrays only if a block's sum includes them; the node has then judged them by
    the same `fault`. An update cannot be taken out of a sum, so a sum counts only if all its clients count and if its own
    form is right.
    """
    inside = {client for block in sums for client in block}
    first: dict[int, Answer] = {}
    for reply in replies:
        first.setdefault(reply.client, reply)
    weights, refused = dict[int, dict[str, float]](), dict[int, str]()
    for client, reply in first.items():
        size = sizes.get(client, 0)
        reason = _reply_fault(reply, sent[client], size, client in inside)
        if not reason and judge_update is not None and reply.arrays is not None:
            reason = judge_update(reply.arrays, sent[client])
        if not reason and judge is not None:
            reason = judge(reply.metrics, size)
        if reason:
            refused[client] = reason
        else:
            weights[client] = name_weights(reply.metrics, sent[client], equal)
    good = {}
    for block, found in sums.items():
        wrong = [c for c in block if c in refused]
        reason = f"client {wrong[0]} is refused" if wrong else _sum_fault(found, block, sent, weights)
        if reason:
            refused |= {
                c: f"its node sent its update only inside a refused sum: {reason}" for c in weights if c in block
            }
        else:
            good[block] = found
    return Verdict([reply for client, reply in first.items() if client not in refused], good, refused)


def _reply_fault(reply: Answer, sent: Arrays, size: int, inside: bool) -> str:
    if reply.values is None:
        return reply.error
    if exhausted := reply.section("ledger").get("exhausted"):
        return str(exhausted)
    if reason := weight_fault(reply.metrics, size):
        return reason
    if not inside:
        return arrays_fault(reply.arrays, reply.metrics, sent)
    return "" if reply.arrays is None else "its reply has arrays that nobody asked for: its update is part of a sum"


def _sum_fault(
    found: WeightedSum,
    clients: Sequence[int],
    sent: Mapping[int, Arrays],
    weights: Mapping[int, Mapping[str, float]],
) -> str:
    form: Arrays = {}
    for arrays in {id(sent[client]): sent[client] for client in clients}.values():
        form |= arrays
    blocks = cut(clients)

    def of_block(span: Span) -> dict[str, float] | None:
        return _add_weights([weights[client] for client in blocks[span[0]]]) if span[1] - span[0] == 1 else None

    expected = dict.fromkeys(form, 0.0) | (total((0, len(blocks)), of_block, _add_weights) or {})
    if found.weights != {name: weight for name, weight in expected.items() if weight > 0}:
        return "the weight of the sum differs from the sum of its clients' weights"
    return fault(found.sums, form, expected, summed=True)


def _add_weights(weights: Sequence[Mapping[str, float]]) -> dict[str, float]:
    added: dict[str, float] = {}
    for each in weights:
        for name, weight in each.items():
            added[name] = added.get(name, 0) + weight
    return added
