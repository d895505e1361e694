"""Packing: the requests to all clients of one node as the content of one Flower message, and the answers on their way
back.

Both sides of this format stand here, and here alone are named arrays and plain values made Flower's records. A packed
request holds each distinct set of arrays and of settings once, then says which client gets which. A packed reply holds,
for each client, its values, and either its own arrays, or its error, or nothing because its arrays are inside the sum
of a whole block (`meadow/arrays/sums.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from meadow.strategies.wire.trainings import Trainings

from meadow.arrays.flower import from_record, to_content, to_metrics, to_record
from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, add, parts
from meadow.runtime.clock import PHASES

Record = ArrayRecord | MetricRecord | ConfigRecord
Values = Mapping[str, Any]
"""Numbers, texts, bytes, truth values, and lists of one of these, by name."""

_METRICS = ("metrics", "evaluation", "confusion")
"""Of an answer's values, those that are numbers alone."""


@dataclass(frozen=True)
class Request:
    """What one client is asked: the arrays that it is sent, the settings of its turn, and what it last said of its
    ledger.

    Clients that are sent the same share one dictionary: it is packed, and taken over by faster trainers, once.
    """

    client: int
    arrays: Arrays
    config: Values
    ledger: Values | None = None


@dataclass
class Answer:
    """What one client replied: arrays and values, or the reason (with the client's own traceback) why there are none.

    `values` is None where the client failed; else by kind: "metrics", "evaluation", "ledger", "identity", "confusion".
    `arrays` is None where it sent none; or they are inside its block's sum, then `summed` is true.
    """

    client: int
    values: dict[str, Values] | None = None
    arrays: Arrays | None = None
    error: str = ""
    summed: bool = False

    @property
    def metrics(self) -> Values:
        """Its metrics; empty if it sent none."""
        return self.said("metrics")

    def said(self, kind: str) -> Values:
        """What it says of a kind; empty if it does not."""
        return (self.values or {}).get(kind, {})


@dataclass
class NodeReply:
    """All answers of one node, and the sums of those blocks and spans of blocks that it holds as a whole."""

    answers: list[Answer]
    sums: dict[Span, WeightedSum] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    """How long the node worked on it, in seconds by phase (`meadow.runtime.clock`); empty if that is nobody's
    business."""
    trainings: Trainings = field(default_factory=Trainings)
    """Who trained these clients, and why faster trainers did not."""


def pack_requests(
    requests: Sequence[Request],
    whole_blocks: Sequence[tuple[int, Sequence[int]]] = (),
    whole_spans: Sequence[Span] = (),
    made: dict[int, Record] | None = None,
) -> RecordDict:
    """One content for a node. `whole_blocks`: (index, clients) of blocks that the node may answer with one sum;
    `whole_spans`: spans of them for which it may, each behind its parts. `made`: the records made so far of what other
    nodes are sent too, by the identity of what they were made of; new ones are added."""
    packed: dict[str, Record] = {}
    names: dict[int, str] = {}
    records = {} if made is None else made

    def name_of(kind: str, given: Arrays | Values) -> str:
        key = id(given)
        if key not in names:
            if key not in records:
                records[key] = to_record(given) if kind == "arrays" else ConfigRecord(dict(given))
            names[key] = f"{len(names)}.{kind}"
            packed[names[key]] = records[key]
        return names[key]

    lines = []
    for each in requests:
        given: list[tuple[str, Arrays | Values]] = [("arrays", each.arrays), ("config", each.config)]
        given += [("ledger", each.ledger)] if each.ledger is not None else []
        lines.append(" ".join([str(each.client), *(name_of(kind, value) for kind, value in given)]))
    packed["pack"] = ConfigRecord(
        {
            "requests": lines,
            "blocks": [" ".join(map(str, (index, *clients))) for index, clients in whole_blocks],
            "spans": [f"{first} {stop}" for first, stop in whole_spans],
        }
    )
    return to_content(packed)


def unpack_requests(packed: RecordDict) -> tuple[list[Request], list[tuple[int, tuple[int, ...]]]]:
    """The inverse of `pack_requests`: the requests, and the blocks that may be answered with one sum."""
    plan = cast(ConfigRecord, packed["pack"])
    found: dict[str, Any] = {}  # most clients are sent the same
    requests = []
    for line in cast(list[str], plan["requests"]):
        client, *names = line.split(" ")
        for name in names:
            if name not in found:
                record = packed[name]
                found[name] = from_record(record) if isinstance(record, ArrayRecord) else dict(record.items())
        requests.append(Request(int(client), **{name.partition(".")[2]: found[name] for name in names}))
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
    packed: dict[str, Record] = {}
    for answer in reply.answers:
        if answer.values is None:
            packed[f"{answer.client}.error"] = ConfigRecord({"reason": answer.error})
            continue
        for kind, values in answer.values.items():
            packed[f"{answer.client}.{kind}"] = to_metrics(values) if kind in _METRICS else ConfigRecord(dict(values))
        if answer.arrays is not None:
            packed[f"{answer.client}.arrays"] = to_record(answer.arrays)
    for (first, stop), block in reply.sums.items():
        packed[f"sum-{first}-{stop}.arrays"] = to_record(block.sums)
        packed[f"sum-{first}-{stop}.weights"] = to_metrics(block.weights)
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
    """The inverse of `pack_replies`. A client whose arrays cannot be read has an error for an answer. Raises KeyError,
    TypeError or ValueError if the content is not a packed reply."""
    plan = cast(ConfigRecord, packed["pack"])
    answers = {client: Answer(client, {}) for client in cast(list[int], plan["clients"])}
    sums: dict[Span, WeightedSum] = {}
    for name, record in packed.items():
        owner, _, kind = name.partition(".")
        if owner.isdecimal():
            _take(answers[int(owner)], kind, record)
        elif kind == "arrays" and isinstance(record, ArrayRecord):
            weights = {k: float(cast(float, v)) for k, v in cast(MetricRecord, packed[f"{owner}.weights"]).items()}
            arrays = cast(dict[str, npt.NDArray[np.float64]], from_record(record))
            _, first, stop = owner.split("-")
            sums[int(first), int(stop)] = WeightedSum(arrays, weights)
    for client in cast(list[int], plan["summed"]):
        answers[client].summed = True
    times = [float(seconds) for seconds in cast(list[float], plan.get("times", []))]
    trainings = Trainings.from_json(json.loads(str(plan.get("trainings", "{}"))))
    return NodeReply(list(answers.values()), sums, dict(zip(PHASES, times, strict=True)) if times else {}, trainings)


def _take(answer: Answer, kind: str, record: Record) -> None:
    """Put one record into a client's answer."""
    if kind == "error":
        answer.values, answer.error = None, str(cast(ConfigRecord, record)["reason"])
    elif isinstance(record, ArrayRecord):
        try:
            answer.arrays = from_record(record)
        except (TypeError, ValueError) as error:
            answer.values, answer.error = None, f"its arrays cannot be read: {error}"
    elif answer.values is not None:
        answer.values[kind] = dict(record.items())
