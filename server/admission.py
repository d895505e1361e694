"""Admission: each reply of a round is judged alone before anything is combined. One bad client costs that client."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from flwr.app import Message, MetricRecord

from config.durable import Arrays
from strategies.blocks import WeightedSum, fault
from strategies.sharing import from_record, name_weights

Sums = Mapping[tuple[int, ...], WeightedSum]


@dataclass(frozen=True)
class Verdict:
    """The replies that count, in the order of the clients, the sums that count, and why each other client does not."""

    admitted: list[Message]
    sums: dict[tuple[int, ...], WeightedSum]
    refused: dict[int, str]


def admit(replies: Sequence[Message], sums: Sums, sent: Arrays, sizes: Mapping[int, int]) -> Verdict:
    """Judge each reply: it came, its weight is a positive number no larger than declared, its arrays fit what was sent.

    `sizes`: training samples that each client declared at roll call. A client's arrays may be missing only if they are
    inside its block's sum, which a node makes of arrays that it judged by the same `fault`. What is inside a sum
    cannot be taken out again, so a sum counts only if all its clients do, and if it is itself of the right form.
    """
    inside = {client for block in sums for client in block}
    refused = {}
    for reply in replies:
        client = reply.metadata.src_node_id
        if reason := _reason(reply, sent, sizes.get(client, 0), client in inside):
            refused[client] = reason
    weights = {
        m.metadata.src_node_id: name_weights(m.content.metric_records["metrics"], sent)
        for m in replies
        if m.metadata.src_node_id not in refused
    }
    good = {}
    for block, total in sums.items():
        wrong = [c for c in block if c in refused]
        reason = f"client {wrong[0]} is refused" if wrong else _sum_reason(total, sent, [weights[c] for c in block])
        if reason:
            refused |= {
                c: f"its arrays are inside a block's sum that does not count: {reason}" for c in weights if c in block
            }
        else:
            good[block] = total
    return Verdict([m for m in replies if m.metadata.src_node_id not in refused], good, refused)


def _reason(reply: Message, sent: Arrays, size: int, inside: bool) -> str:
    if reply.has_error():
        return str(reply.error.reason)
    content = reply.content
    ledger = content.config_records.get("ledger")
    if ledger is not None and "exhausted" in ledger:
        return str(ledger["exhausted"])
    metrics = content.metric_records.get("metrics") or MetricRecord()
    weight = metrics.get("num-examples")
    if not _number(weight) or weight <= 0:
        return f"num-examples is {weight!r}; it must be a positive number"
    if weight > size:
        return f"num-examples is {weight!r}, more than the {size} training samples declared at roll call"
    for key, value in metrics.items():
        if key.startswith("num-examples/") and not (_number(value) and 0 <= value <= weight):
            return f"{key} is {value!r}; it must be a number from 0 to num-examples = {weight!r}"
    if inside:
        return ""
    record = content.array_records.get("arrays")
    if record is None:
        return "its reply has no arrays"
    try:
        return fault(from_record(record), sent, name_weights(metrics, sent))
    except (TypeError, ValueError) as error:
        return f"its arrays cannot be read: {error}"


def _sum_reason(total: WeightedSum, sent: Arrays, clients: Sequence[Mapping[str, float]]) -> str:
    weights = {name: sum(client[name] for client in clients) for name in sent}
    if total.weights != {name: weight for name, weight in weights.items() if weight > 0}:
        return "the sum's weight is not that of its clients"
    return fault(total.sums, {name: value.astype(np.float64) for name, value in sent.items()}, weights)


def _number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)
