"""Named arrays as bytes: whatever arrays go in come out, and damage is one kind of error."""

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from meadow.arrays.codec import ALIGNED, DamagedArrays, decode, encode, frame, unframe

DTYPES = st.one_of(
    of_numpy.scalar_dtypes(),  # of either byte order: numbers, times, booleans
    of_numpy.byte_string_dtypes(),
    of_numpy.unicode_string_dtypes(),
)
SHAPES = of_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn) -> npt.NDArray[np.generic]:
    """Of any dtype and shape, with or without gaps, in any order of memory."""
    found: npt.NDArray[np.generic] = draw(of_numpy.arrays(DTYPES, SHAPES))
    if draw(st.booleans()):
        found = found.T
    if found.ndim and draw(st.booleans()):
        found = found[::-2]
    return found


def same(a: Mapping[str, npt.NDArray[np.generic]], b: Mapping[str, npt.NDArray[np.generic]]) -> bool:
    """Names, order, types, shapes and bits."""
    return [(n, v.dtype, v.shape, v.tobytes()) for n, v in a.items()] == [
        (n, v.dtype, v.shape, v.tobytes()) for n, v in b.items()
    ]


def encoded(some: Mapping[str, npt.NDArray[np.generic]]) -> bytearray:
    return bytearray(b"".join(encode(some)))


@given(st.dictionaries(st.text(st.characters()), arrays(), max_size=4))
def test_what_goes_in_comes_out(some: dict[str, npt.NDArray[np.generic]]) -> None:
    whole = encoded(some)
    found = decode(whole)
    assert same(found, some) and all(value.flags.writeable for value in found.values())
    assert same(decode(bytes(whole)), some)


@given(st.dictionaries(st.text(), arrays(), max_size=4))
def test_every_buffer_begins_at_a_multiple_of_64(some: dict[str, npt.NDArray[np.generic]]) -> None:
    whole = np.zeros(len(encoded(some)) + ALIGNED, np.uint8)
    whole = whole[-whole.ctypes.data % ALIGNED :][: len(encoded(some))]
    whole[:] = encoded(some)
    assert all(value.ctypes.data % ALIGNED == 0 for value in decode(whole.data).values() if value.size)


@given(st.dictionaries(st.text(), arrays(), min_size=1, max_size=3), st.data())
@settings(max_examples=300)
def test_damage_is_one_error_or_the_same_form(some: dict[str, npt.NDArray[np.generic]], data: st.DataObject) -> None:
    """Cut off, or with bytes changed: no other error, no array outside of what is there."""
    whole = encoded(some)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=3)):
        if place < len(cut):
            cut[place] = data.draw(st.integers(0, 255))
    try:
        found = decode(cut)
    except DamagedArrays:
        return
    assert sum(value.nbytes for value in found.values()) <= len(cut)


LIES = {
    "longer": [["w", "<f8", [9]]],
    "negative": [["w", "<f8", [-1]]],
    "no shape": [["w", "<f8", 4]],
    "not whole": [["w", "<f8", [4.0]]],
    "objects": [["w", "|O", [4]]],
    "records": [["w", "|V32", [1]]],
    "no type": [["w", "?x", [4]]],
    "one too many": [["w", "<f8", [4]], ["v", "<f8", [0]]],
    "no list": 3,
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(header: object) -> None:
    buffer = np.zeros(4).tobytes()
    assert decode(b"".join(frame(json.dumps([["w", "<f8", [4]]]).encode(), [buffer])))["w"].shape == (4,)
    with pytest.raises(DamagedArrays):
        decode(b"".join(frame(json.dumps(header).encode(), [buffer])))


def test_arrays_of_objects_and_records_are_not_encoded() -> None:
    for wrong in (np.array([{}], dtype=object), np.zeros(2, dtype=[("a", "f4")])):
        with pytest.raises(TypeError):
            encode({"w": wrong})


@given(st.binary(max_size=200), st.lists(st.binary(max_size=200), max_size=4))
def test_frames(header: bytes, buffers: list[bytes]) -> None:
    found, parts = unframe(b"".join(frame(header, buffers)))
    assert (bytes(found), [bytes(part) for part in parts]) == (header, buffers)
