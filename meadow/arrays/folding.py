"""Folds a message's content into two records, to save network calls.

Flower's deployment transfers every record, every array and every 5 MiB of an array as an object with two calls: about
seventy calls for a node with five clients. Folded content is always one array and one record of settings.
`fold_for_wire` folds in the ClientApp, `server/rollcall.py` at the server.
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
    """Fold a content into two records: "folded" (all settings and metrics, and the layout) and "arrays" (all arrays'
    bytes)."""
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
    """Whether a content is folded."""
    return "folded" in content


def unfolded(content: RecordDict) -> RecordDict:
    """Invert `folded`. Raises KeyError, TypeError or ValueError if the content is not folded."""
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
    """A mod of the ClientApp that answers folded requests with folded replies."""
    if not message.has_content() or not is_folded(message.content):
        return call_next(message, context)
    message.content = unfolded(message.content)
    reply = call_next(message, context)
    if reply.has_content():
        reply.content = folded(reply.content)
    return reply
