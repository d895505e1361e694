"""Packing: the messages for all clients of one node as one Flower message, and the replies on their way back.

Both halves of this wire format stand here. A packed request holds each distinct array record and config once, then
says which client gets which. A packed reply holds, for each client, its metrics, and either its own arrays, or its
error, or nothing because its arrays are inside the sum of a whole block (`strategies/blocks.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from strategies.blocks import WeightedSum, add
from strategies.records import from_record, to_record


@dataclass(frozen=True)
class Request:
    """What one client is asked: the content of the strategy's message."""

    client: int
    content: RecordDict

    @property
    def config(self) -> ConfigRecord:
        """The message's settings. (Flower's `content.config_records` builds a dictionary at each call.)"""
        return cast(ConfigRecord, self.content["config"])

    @property
    def arrays(self) -> ArrayRecord:
        """The arrays that the client is sent."""
        return cast(ArrayRecord, self.content["arrays"])


@dataclass
class Answer:
    """What one client replied: content, or the reason (with the client's own traceback) why there is none.

    `summed` says that the client's arrays are not in `content` because they are inside its block's sum.
    """

    client: int
    content: RecordDict | None = None
    error: str = ""
    summed: bool = False


@dataclass
class NodeReply:
    """All answers of one node, and the sums of those blocks (by index) that it holds as a whole."""

    answers: list[Answer]
    sums: dict[int, WeightedSum] = field(default_factory=dict)
    groups: set[int] = field(default_factory=set)
    """Of `sums` those that are a whole group's, by the index of its first block."""
    seconds: float | None = None
    """How long the node worked on it."""


def pack_requests(
    requests: Sequence[Request],
    whole_blocks: Sequence[tuple[int, Sequence[int]]] = (),
    whole_groups: Sequence[Sequence[int]] = (),
) -> RecordDict:
    """One content for a node. `whole_blocks`: (index, clients) of blocks that the node may answer with one sum;
    `whole_groups`: of groups of them, each the indices of its blocks."""
    packed = RecordDict()
    seen: dict[int, str] = {}
    lines: list[str] = []
    for request in requests:
        names = []
        for key, record in request.content.items():
            if id(record) not in seen:
                seen[id(record)] = f"{len(seen)}.{key}"
                packed[seen[id(record)]] = record
            names.append(seen[id(record)])
        lines.append(" ".join([str(request.client), *names]))
    packed["pack"] = ConfigRecord(
        {
            "requests": lines,
            "blocks": [" ".join(map(str, (index, *clients))) for index, clients in whole_blocks],
            "groups": [" ".join(map(str, indices)) for indices in whole_groups],
        }
    )
    return packed


def unpack_requests(packed: RecordDict) -> tuple[list[Request], list[tuple[int, tuple[int, ...]]]]:
    """The inverse of `pack_requests`: the requests, and the blocks that may be answered with one sum."""
    plan = cast(ConfigRecord, packed["pack"])
    requests = []
    contents: dict[str, RecordDict] = {}  # most clients are sent the same
    for line in cast(list[str], plan["requests"]):
        client, _, names = line.partition(" ")
        if names not in contents:
            contents[names] = RecordDict({name.partition(".")[2]: packed[name] for name in names.split(" ")})
        requests.append(Request(int(client), contents[names]))
    blocks = []
    for line in cast(list[str], plan["blocks"]):
        index, *clients = map(int, line.split(" "))
        blocks.append((index, tuple(clients)))
    return requests, blocks


def whole_groups(packed: RecordDict) -> list[tuple[int, ...]]:
    """Of a packed request, the groups that may be answered with one sum: the indices of their blocks."""
    lines = cast(list[str], cast(ConfigRecord, packed["pack"])["groups"])
    return [tuple(map(int, line.split(" "))) for line in lines]


def add_groups(reply: NodeReply, groups: Sequence[Sequence[int]]) -> None:
    """Put one sum, under the first block's index, in the place of those of a group's blocks where all are there."""
    for first, *rest in groups:
        if rest and all(index in reply.sums for index in (first, *rest)):
            reply.sums[first] = add([reply.sums[first], *(reply.sums.pop(index) for index in rest)])
            reply.groups.add(first)


def pack_replies(reply: NodeReply) -> RecordDict:
    """One content for the server out of a node's answers and sums."""
    packed = RecordDict()
    for answer in reply.answers:
        if answer.content is None:
            packed[f"{answer.client}.error"] = ConfigRecord({"reason": answer.error})
            continue
        for key, record in answer.content.items():
            packed[f"{answer.client}.{key}"] = record
    for index, block in reply.sums.items():
        packed[f"sum-{index}.arrays"] = to_record(block.sums)
        packed[f"sum-{index}.weights"] = MetricRecord(dict(block.weights))
    packed["pack"] = ConfigRecord(
        {
            "clients": [a.client for a in reply.answers],
            "summed": [a.client for a in reply.answers if a.summed],
            "groups": sorted(reply.groups),
            **({} if reply.seconds is None else {"seconds": reply.seconds}),
        }
    )
    return packed


def unpack_replies(packed: RecordDict) -> NodeReply:
    """The inverse of `pack_replies`. Raises KeyError, TypeError or ValueError if the content is not a packed reply."""
    plan = cast(ConfigRecord, packed["pack"])
    contents = {client: RecordDict() for client in cast(list[int], plan["clients"])}
    sums: dict[int, WeightedSum] = {}
    for name, record in packed.items():
        owner, _, key = name.partition(".")
        if owner.isdecimal():
            contents[int(owner)][key] = record
        elif key == "arrays" and isinstance(record, ArrayRecord):
            weights = {k: float(cast(float, v)) for k, v in cast(MetricRecord, packed[f"{owner}.weights"]).items()}
            arrays = cast(dict[str, npt.NDArray[np.float64]], from_record(record))
            sums[int(owner.partition("-")[2])] = WeightedSum(arrays, weights)
    summed = set(cast(list[int], plan["summed"]))
    answers = []
    for client, content in contents.items():
        error = content.get("error")
        if isinstance(error, ConfigRecord):
            answers.append(Answer(client, error=str(error["reason"])))
        else:
            answers.append(Answer(client, content, summed=client in summed))
    seconds = plan.get("seconds")
    groups = set(cast(list[int], plan["groups"]))
    return NodeReply(answers, sums, groups, float(seconds) if isinstance(seconds, int | float) else None)


def block_message(block: WeightedSum, reply_to: Message) -> Message:
    """A block's sum as the reply message that strategies built on sums take (`aggregate_train`)."""
    content = RecordDict({"arrays": to_record(block.sums), "weights": MetricRecord(dict(block.weights))})
    return Message(content, reply_to=reply_to)


def block_of(message: Message) -> WeightedSum:
    """The inverse of `block_message`."""
    weights = {k: float(cast(float, v)) for k, v in message.content.metric_records["weights"].items()}
    arrays = cast(dict[str, npt.NDArray[np.float64]], from_record(message.content.array_records["arrays"]))
    return WeightedSum(arrays, weights)
