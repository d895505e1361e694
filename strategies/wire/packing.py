"""Packing: the messages for all clients of one node as one Flower message, and the replies on their way back.

Both halves of this wire format stand here. A packed request holds each distinct array record and config once, then
says which client gets which. A packed reply holds, for each client, its metrics, and either its own arrays, or its
error, or nothing because its arrays are inside the sum of a whole block (`meadow/arrays/sums.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from meadow.strategies.wire.trainings import Trainings

from meadow.arrays.flower import from_record, to_content, to_record
from meadow.arrays.sums import Span, WeightedSum, add, parts
from meadow.runtime.clock import PHASES


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
    """All answers of one node, and the sums of those blocks and spans of blocks that it holds as a whole."""

    answers: list[Answer]
    sums: dict[Span, WeightedSum] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    """How long the node worked on it, in seconds by phase (`meadow.runtime.clock`); empty if that is nobody's business."""
    trainings: Trainings = field(default_factory=Trainings)
    """Who trained these clients, and why faster trainers did not."""


def pack_requests(
    requests: Sequence[Request],
    whole_blocks: Sequence[tuple[int, Sequence[int]]] = (),
    whole_spans: Sequence[Span] = (),
) -> RecordDict:
    """One content for a node. `whole_blocks`: (index, clients) of blocks that the node may answer with one sum;
    `whole_spans`: spans of them for which it may, each behind its parts."""
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
            "spans": [f"{first} {stop}" for first, stop in whole_spans],
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


def whole_spans(packed: RecordDict) -> list[Span]:
    """Of a packed request, the spans that may be answered with one sum."""
    lines = cast(list[str], cast(ConfigRecord, packed["pack"])["spans"])
    return [(int(first), int(stop)) for first, _, stop in (line.partition(" ") for line in lines)]


def add_spans(reply: NodeReply, spans: Sequence[Span]) -> None:
    """Put one sum in the place of those of a span's parts where all are there; `spans`: each behind its parts."""
    for span in spans:
        there = list(parts(span))
        if all(part in reply.sums for part in there):
            reply.sums[span] = add([reply.sums.pop(part) for part in there])


def pack_replies(reply: NodeReply) -> RecordDict:
    """One content for the server out of a node's answers and sums."""
    packed: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    for answer in reply.answers:
        if answer.content is None:
            packed[f"{answer.client}.error"] = ConfigRecord({"reason": answer.error})
            continue
        for key, record in answer.content.items():
            packed[f"{answer.client}.{key}"] = record
    for (first, stop), block in reply.sums.items():
        packed[f"sum-{first}-{stop}.arrays"] = to_record(block.sums)
        packed[f"sum-{first}-{stop}.weights"] = MetricRecord(dict(block.weights))
    packed["pack"] = ConfigRecord(
        {
            "clients": [a.client for a in reply.answers],
            "summed": [a.client for a in reply.answers if a.summed],
            **({"times": [reply.times[phase] for phase in PHASES]} if reply.times else {}),
            **({"trainings": json.dumps(reply.trainings.as_json())} if reply.trainings.counts else {}),
        }
    )
    return to_content(packed)


def unpack_replies(packed: RecordDict) -> NodeReply:
    """The inverse of `pack_replies`. Raises KeyError, TypeError or ValueError if the content is not a packed reply."""
    plan = cast(ConfigRecord, packed["pack"])
    contents: dict[int, dict[str, ArrayRecord | MetricRecord | ConfigRecord]]
    contents = {client: {} for client in cast(list[int], plan["clients"])}
    sums: dict[Span, WeightedSum] = {}
    for name, record in packed.items():
        owner, _, key = name.partition(".")
        if owner.isdecimal():
            contents[int(owner)][key] = record
        elif key == "arrays" and isinstance(record, ArrayRecord):
            weights = {k: float(cast(float, v)) for k, v in cast(MetricRecord, packed[f"{owner}.weights"]).items()}
            arrays = cast(dict[str, npt.NDArray[np.float64]], from_record(record))
            _, first, stop = owner.split("-")
            sums[int(first), int(stop)] = WeightedSum(arrays, weights)
    summed = set(cast(list[int], plan["summed"]))
    answers = []
    for client, content in contents.items():
        error = content.get("error")
        if isinstance(error, ConfigRecord):
            answers.append(Answer(client, error=str(error["reason"])))
        else:
            answers.append(Answer(client, to_content(content), summed=client in summed))
    times = [float(seconds) for seconds in cast(list[float], plan.get("times", []))]
    trainings = Trainings.from_json(json.loads(str(plan.get("trainings", "{}"))))
    return NodeReply(answers, sums, dict(zip(PHASES, times, strict=True)) if times else {}, trainings)


def block_message(block: WeightedSum, reply_to: Message) -> Message:
    """A block's sum as the reply message that strategies built on sums take (`aggregate_train`)."""
    content = RecordDict({"arrays": to_record(block.sums), "weights": MetricRecord(dict(block.weights))})
    return Message(content, reply_to=reply_to)


def block_of(message: Message) -> WeightedSum:
    """The inverse of `block_message`."""
    weights = {k: float(cast(float, v)) for k, v in message.content.metric_records["weights"].items()}
    arrays = cast(dict[str, npt.NDArray[np.float64]], from_record(message.content.array_records["arrays"]))
    return WeightedSum(arrays, weights)
