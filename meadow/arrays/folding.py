"""Folding: a message's content as two records, for grids that send each record and each array by a call of its own.

Flower's deployment sends every record, every array and every 5 MiB of an array as an object with two calls, one in and one
out: some seventy for a node with five clients. Folded, a content is one array and one record of settings, whatever it holds.
`unfolded` is the inverse of `folded`; `fold_for_wire` is the ClientApp's half, `server/exchange.py` has the server's.
"""

import json
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from meadow.arrays.codec import decode, encode
from meadow.arrays.flower import from_record, to_record
from meadow.arrays.named import Arrays

_KINDS = {"arrays": ArrayRecord, "metrics": MetricRecord, "config": ConfigRecord}


def folded(content: RecordDict) -> RecordDict:
    """The same in two records: "folded" with all settings, metrics and the layout, "arrays" with all arrays' bytes."""
    layout: list[object] = []
    values = ConfigRecord()
    arrays: Arrays = {}
    for number, (name, record) in enumerate(content.items()):
        kind = next(kind for kind, of in _KINDS.items() if isinstance(record, of))
        layout.append([name, kind, list(record)])
        if isinstance(record, ArrayRecord):
            arrays |= {f"{number}.{key}": value for key, value in from_record(record).items()}
        else:
            for key, entry in record.items():
                values[f"{number}.{key}"] = entry
    values["layout"] = json.dumps(layout)
    flat = np.frombuffer(b"".join(encode(arrays)), dtype=np.uint8)
    return RecordDict({"folded": values, "arrays": to_record({"all": flat})})


def is_folded(content: RecordDict) -> bool:
    """Whether `folded` made it."""
    return "folded" in content


def unfolded(content: RecordDict) -> RecordDict:
    """The inverse of `folded`. Raises KeyError, TypeError or ValueError if it is none."""
    values = cast(ConfigRecord, content["folded"])
    arrays = decode(from_record(cast(ArrayRecord, content["arrays"]))["all"].data)
    found = RecordDict()
    for number, (name, kind, keys) in enumerate(json.loads(cast(str, values["layout"]))):
        if kind == "arrays":
            found[name] = to_record({key: arrays[f"{number}.{key}"] for key in keys})
        else:
            found[name] = _KINDS[kind]({key: values[f"{number}.{key}"] for key in keys})
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
