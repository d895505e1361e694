"""Folding: a message's content as two records, for grids that send each record and each array by a call of its own.

Flower's deployment sends every record, every array and every 5 MiB of an array as an object with two calls, one in and one
out: some seventy for a node with five clients. Folded, a content is one array and one record of settings, whatever it holds.
`unfolded` is the inverse of `folded`; `fold_for_wire` is the ClientApp's half, `server/exchange.py` has the server's.
"""

import json
import math
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from meadow.arrays.flower import from_record, to_record

_KINDS = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}
_ALIGNED = 64
"""Bytes at whose multiples an array begins."""


def folded(content: RecordDict) -> RecordDict:
    """The same in two records: "folded" with all settings, metrics and the layout, "arrays" with all arrays' bytes."""
    layout: list[object] = []
    values = ConfigRecord()
    pieces: list[bytes] = []
    begin = 0
    for number, (name, record) in enumerate(content.items()):
        if isinstance(record, ArrayRecord):
            arrays = []
            for key, value in from_record(record).items():
                arrays.append([key, value.dtype.str, value.shape, begin])
                pieces.append(value.tobytes())
                pieces.append(bytes(-value.nbytes % _ALIGNED))
                begin += value.nbytes + len(pieces[-1])
            layout.append([name, "arrays", arrays])
        else:
            layout.append([name, "metrics" if isinstance(record, MetricRecord) else "config", list(record)])
            for key, entry in record.items():
                values[f"{number}.{key}"] = entry
    values["layout"] = json.dumps(layout)
    flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    return RecordDict({"folded": values, "arrays": to_record({"all": flat})})


def is_folded(content: RecordDict) -> bool:
    """Whether `folded` made it."""
    return "folded" in content


def unfolded(content: RecordDict) -> RecordDict:
    """The inverse of `folded`. Raises KeyError, TypeError or ValueError if it is none."""
    values = cast(ConfigRecord, content["folded"])
    flat = from_record(cast(ArrayRecord, content["arrays"]))["all"]
    found = RecordDict()
    for number, (name, kind, entries) in enumerate(json.loads(cast(str, values["layout"]))):
        if kind != "arrays":
            found[name] = _KINDS[kind]({key: values[f"{number}.{key}"] for key in entries})
            continue
        arrays = {}
        for key, dtype, shape, begin in entries:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            if min([begin, *shape]) < 0 or begin + size > len(flat):
                raise ValueError(f"array {key} lies outside of what was sent")
            arrays[key] = flat[begin : begin + size].view(dtype).reshape(shape)
        found[name] = to_record(arrays)
    return found


def fold_for_wire(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A mod of the ClientApp: what came folded is answered folded."""
    if not message.has_content() or not is_folded(message.content):
        return call_next(message, context)
    message.content = unfolded(message.content)
    reply = call_next(message, context)
    if reply.has_content():
        reply.content = folded(reply.content)
    return reply
