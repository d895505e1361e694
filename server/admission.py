"""Admission: each reply of a round is judged alone before anything is combined. One bad client costs that client."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message

from strategies.blocks import fault
from strategies.sharing import Arrays, from_record


@dataclass(frozen=True)
class Verdict:
    """The replies that count, in the order of the clients, and for each other client the reason why it does not."""

    admitted: list[Message]
    refused: dict[int, str]


def admit(replies: Sequence[Message], sent: Arrays, sizes: dict[int, int], pooled_size: int = 0) -> Verdict:
    """Judge each reply: it came, its weight is a positive number no larger than declared, its arrays fit what was sent.

    `sizes`: training samples that each client declared at roll call. `pooled_size`: the cap for all of them when the
    data is in one place. A reply without arrays is inside a block's sum, whose arrays the node judged by the same
    `fault`; here its weight is judged.
    """
    admitted: list[Message] = []
    refused: dict[int, str] = {}
    for reply in replies:
        client = reply.metadata.src_node_id
        if reason := _reason(reply, sent, pooled_size or sizes.get(client, 0)):
            refused[client] = reason
        else:
            admitted.append(reply)
    return Verdict(admitted, refused)


def _reason(reply: Message, sent: Arrays, size: int) -> str:
    if reply.has_error():
        return str(reply.error.reason)
    content = reply.content
    metrics = content.metric_records.get("metrics")
    weight = metrics.get("num-examples") if metrics is not None else None
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        return f"num-examples is {weight!r}; it must be a positive number"
    if weight > size:
        return f"num-examples is {weight!r}, more than the {size} training samples declared at roll call"
    if "arrays" not in content:
        return ""
    record = content.array_records.get("arrays")
    if record is None:
        return "its arrays are not an array record"
    try:
        return fault(from_record(record), sent)
    except (TypeError, ValueError) as error:
        return f"its arrays cannot be read: {error}"
