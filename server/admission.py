"""Admission: each reply of a round is judged alone before anything is combined. One bad client costs that client."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from config.durable import Arrays
from strategies.blocks import WeightedSum, fault
from strategies.sharing import from_record

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
        m.metadata.src_node_id: float(str(m.content.metric_records["metrics"]["num-examples"]))
        for m in replies
        if m.metadata.src_node_id not in refused
    }
    good = {}
    for block, total in sums.items():
        wrong = [c for c in block if c in refused]
        reason = f"client {wrong[0]} is refused" if wrong else _sum_reason(total, sent, sum(weights[c] for c in block))
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
    metrics = content.metric_records.get("metrics")
    weight = metrics.get("num-examples") if metrics is not None else None
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        return f"num-examples is {weight!r}; it must be a positive number"
    if weight > size:
        return f"num-examples is {weight!r}, more than the {size} training samples declared at roll call"
    if inside:
        return ""
    record = content.array_records.get("arrays")
    if record is None:
        return "its reply has no arrays"
    try:
        return fault(from_record(record), sent)
    except (TypeError, ValueError) as error:
        return f"its arrays cannot be read: {error}"


def _sum_reason(total: WeightedSum, sent: Arrays, weight: float) -> str:
    if any(w != weight for w in total.weights.values()):
        return "the sum's weight is not that of its clients"
    return fault(total.sums, {name: value.astype(np.float64) for name, value in sent.items()})
