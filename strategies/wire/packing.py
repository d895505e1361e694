"""Packs the requests to all clients of a node into one Flower message, and their answers into its reply.

Only this module converts named arrays and plain values into Flower's records. A packed request contains each distinct
set of arrays and of settings once, and assigns them to clients. A packed reply contains, for each client, its values,
and its arrays or its error; or no arrays, if they are part of the sum of a whole block (`meadow/arrays/sums.py`).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from meadow.arrays.flower import from_record, to_content, to_metrics, to_record
from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, add, parts
from meadow.runtime.clock import PHASES
from meadow.runtime.logs import printable
from meadow.strategies.wire.trainings import Trainings

Record = ArrayRecord | MetricRecord | ConfigRecord
Values = Mapping[str, Any]
"""By name: numbers, strings, bytes, booleans, or lists of one of these types."""

_FLAGS = ("summed", "kept", "lost")
"""The yes-or-no attributes of an answer."""
_METRICS = ("metrics", "evaluation", "validation", "confusion")
"""The kinds of an answer's values that contain only numbers."""


@dataclass(frozen=True)
class Request:
    """A request to one client: arrays, the round's settings, and the last report of its ledger.

    Clients with equal arrays or settings share one dictionary, so that it is packed and loaded only once.
    """

    client: int
    arrays: Arrays
    config: Values
    ledger: Values | None = None


@dataclass
class Answer:
    """The answer of one client: arrays and values, or an error (with the client's traceback).

    values: by kind, "metrics", "evaluation", "validation", "ledger", "identity" or "confusion"; None if the client failed.
    arrays: None if it sent none, or if they are part of its block's sum (then `summed` is true). kept: it stored a state.
    lost: it failed because its stored state cannot be read.
    """

    client: int
    values: dict[str, Values] | None = None
    arrays: Arrays | None = None
    error: str = ""
    summed: bool = False
    kept: bool = False
    lost: bool = False

    @property
    def metrics(self) -> Values:
        """Its metrics; empty if there are none."""
        return self.section("metrics")

    def section(self, kind: str) -> Values:
        """One kind of its values; empty if there are none."""
        return (self.values or {}).get(kind, {})


@dataclass
class NodeReply:
    """All answers of one node, and the sums of the blocks and spans that it hosts completely."""

    answers: list[Answer]
    sums: dict[Span, WeightedSum] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    """The node's seconds by phase (`meadow.runtime.clock`); empty if they must not be disclosed."""
    trainings: Trainings = field(default_factory=Trainings)
    """The trainers of these clients, and why faster ones were skipped."""


def pack_requests(
    requests: Sequence[Request],
    whole_blocks: Sequence[tuple[int, Sequence[int]]] = (),
    whole_spans: Sequence[Span] = (),
    made: dict[int, Record] | None = None,
) -> RecordDict:
    """Pack requests into the content of one message.

    whole_blocks: (index, clients) of blocks that the node may answer with one sum. whole_spans: spans of blocks
    likewise, each after its parts. made: a cache of records that other nodes get too, by the `id` of their source; new
    ones are added.
    """
    packed: dict[str, Record] = {}
    names: dict[int, str] = {}
    records = {} if made is None else made

    def name_of(kind: str, given: Mapping[str, Any]) -> str:
        key = id(given)
        if key not in names:
            if key not in records:
                records[key] = to_record(given) if kind == "arrays" else ConfigRecord(dict(given))
            names[key] = f"{len(names)}.{kind}"
            packed[names[key]] = records[key]
        return names[key]

    lines = []
    for each in requests:
        given: list[tuple[str, Mapping[str, Any]]] = [("arrays", each.arrays), ("config", each.config)]
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
    """Invert `pack_requests`: the requests, and the blocks that may be answered with one sum."""
    plan = cast(ConfigRecord, packed["pack"])
    found: dict[str, Any] = {}  # many clients share them
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


def leave_out(packed: RecordDict, clients: Collection[int], apart: Collection[int] = ()) -> None:
    """Remove clients from a packed request. The blocks of those in `apart` go client by client."""
    plan, single = cast(ConfigRecord, packed["pack"]), {*clients, *apart}
    plan["requests"] = [
        each for each in cast(list[str], plan["requests"]) if int(each.partition(" ")[0]) not in clients
    ]
    blocks = cast(list[str], plan["blocks"])
    plan["blocks"] = [block for block in blocks if single.isdisjoint(map(int, block.split(" ")[1:]))]


def add_errors(packed: RecordDict, reasons: Mapping[int, str]) -> None:
    """Add the answers of clients that were left out of the request to a packed reply."""
    cast(list[int], cast(ConfigRecord, packed["pack"])["clients"]).extend(reasons)
    for client, reason in reasons.items():
        packed[f"{client}.error"] = ConfigRecord({"reason": reason})


def whole_spans(packed: RecordDict) -> list[Span]:
    """The spans of a packed request that may be answered with one sum."""
    lines = cast(list[str], cast(ConfigRecord, packed["pack"])["spans"])
    return [(int(first), int(stop)) for first, _, stop in (line.partition(" ") for line in lines)]


def add_spans(reply: NodeReply, spans: Sequence[Span]) -> None:
    """Replace the sums of a span's parts, if complete, by their sum; each of `spans` comes after its parts."""
    for span in spans:
        there = list(parts(span))
        if all(part in reply.sums for part in there):
            reply.sums[span] = add([reply.sums.pop(part) for part in there])


def pack_replies(reply: NodeReply) -> RecordDict:
    """Pack a node's answers and sums into the content of one message."""
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
            **{flag: [a.client for a in reply.answers if getattr(a, flag)] for flag in _FLAGS},
            **({"times": [reply.times[phase] for phase in PHASES]} if reply.times else {}),
            **({"trainings": json.dumps(reply.trainings.as_json())} if reply.trainings.counts else {}),
        }
    )
    return to_content(packed)


def unpack_replies(packed: RecordDict) -> NodeReply:
    """Invert `pack_replies`. If a client's arrays cannot be read, its answer is an error. Raises KeyError, TypeError or
    ValueError if the content is not a packed reply."""
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
    for flag in _FLAGS:
        for client in cast(list[int], plan[flag]):
            setattr(answers[client], flag, True)
    times = [float(seconds) for seconds in cast(list[float], plan.get("times", []))]
    trainings = Trainings.from_json(json.loads(str(plan.get("trainings", "{}"))))
    return NodeReply(list(answers.values()), sums, dict(zip(PHASES, times, strict=True)) if times else {}, trainings)


def _take(answer: Answer, kind: str, record: Record) -> None:
    """Add one record to a client's answer."""
    if kind == "error":
        answer.values, answer.error = None, printable(str(cast(ConfigRecord, record)["reason"]))
    elif isinstance(record, ArrayRecord):
        try:
            answer.arrays = from_record(record)
        except (TypeError, ValueError) as error:
            answer.values, answer.error = None, f"its arrays cannot be read: {error}"
    elif answer.values is not None:
        answer.values[kind] = dict(record.items())
