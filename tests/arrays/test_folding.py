"""A folded content is the content it was made of, in few objects; what is no folded content is refused."""

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.folding import fold_for_wire, folded, is_folded, unfolded
from meadow.arrays.named import Arrays
from meadow.simulation.grid import become_server

ARRAYS: Arrays = {
    "half": np.arange(5, dtype=np.float16),
    "weight": np.array([[1.5, -0.0, np.nan], [np.inf, 1e-45, 3.0]], dtype=np.float32),
    "sum": np.array(1 / 3),
    "steps": np.array([2**40], dtype=np.int64),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), dtype=np.float32),
    "bytes": np.frombuffer(b"abc", dtype=np.uint8),
}
CONFIG: dict[str, Any] = {
    "round": 3,
    "rate": 1 / 3,
    "name": "a.b",
    "thorough": True,
    "secret": b"\x00\xff",
    "many": [1, 2],
    "empty": [],
}


def content() -> RecordDict:
    """Of five clients, each with other arrays of its own."""
    arrays = {f"{c}.arrays": to_record(ARRAYS | {f"own {i}": np.array([c, i]) for i in range(6)}) for c in range(5)}
    metrics = {f"{c}.metrics": MetricRecord({"x": c / 3}) for c in range(5)}
    return RecordDict(
        {**arrays, **metrics, "pack": ConfigRecord(CONFIG), "nothing": ArrayRecord(), "no": MetricRecord()}
    )


def same(a: RecordDict, b: RecordDict) -> bool:
    """Names, order, kinds, values, and the arrays' types, shapes and bits."""
    return [(name, type(record), bits(record)) for name, record in a.items()] == [
        (name, type(record), bits(record)) for name, record in b.items()
    ]


def bits(record: object) -> object:
    if isinstance(record, ArrayRecord):
        return [(k, v.dtype.str, v.shape, v.tobytes()) for k, v in from_record(record).items()]
    return [(k, type(v), v) for k, v in record.items()]  # type: ignore[attr-defined]


def sent(content: RecordDict) -> RecordDict:
    """What arrives, after Flower has cut it into objects and put it together again."""
    objects = {key: value.deflate() for key, value in get_all_nested_objects(content).items()}
    arrived = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(arrived, RecordDict)
    return arrived


def test_unfolded_is_the_inverse_of_folded_over_the_wire() -> None:
    assert same(unfolded(sent(folded(content()))), content())
    assert same(unfolded(folded(RecordDict())), RecordDict())
    assert is_folded(folded(content())) and not is_folded(content())


def test_a_folded_content_is_five_objects_whatever_it_holds() -> None:
    def objects(content: RecordDict) -> int:
        return len(list(iterate_object_tree(get_object_tree(content))))

    # a content, an array record with an array with a chunk, a record of values
    assert (objects(folded(content())), objects(folded(RecordDict({"pack": ConfigRecord()})))) == (5, 5)
    # itself; of each client a record of 13 arrays with a chunk each, and a record of metrics; three other records
    assert objects(content()) == 1 + 5 * (1 + 2 * 13 + 1) + 3


def lie(key: str, value: str) -> RecordDict:
    """A folded content with another layout."""
    made = folded(RecordDict({"a": to_record({"w": np.zeros(4)})}))
    settings: ConfigRecord = made["folded"]  # type: ignore[assignment]
    settings["layout"] = str(settings["layout"]).replace(key, value)
    return made


LIES = {"another array": ('"w"', '"v"'), "no layout": ("]", ""), "another kind": ('"arrays"', '"metrics"')}


@pytest.mark.parametrize(("key", "value"), LIES.values(), ids=LIES)
def test_what_is_no_folded_content_is_refused(key: str, value: str) -> None:
    assert same(unfolded(lie("x", "x")), RecordDict({"a": to_record({"w": np.zeros(4)})}))
    with pytest.raises((KeyError, TypeError, ValueError)):
        unfolded(lie(key, value))


def test_what_comes_folded_is_answered_folded() -> None:
    become_server()
    context = Context(1, 2, {}, RecordDict(), {})

    def echo(message: Message, context: Context) -> Message:
        assert same(message.content, content())
        return Message(message.content, reply_to=message)

    reply = fold_for_wire(Message(folded(content()), 2, "train"), context, echo)
    assert is_folded(reply.content) and same(unfolded(reply.content), content())
    assert same(fold_for_wire(Message(content(), 2, "train"), context, echo).content, content())
