"""Messages through shared memory: what is read is what was written, segments grow, and end with their command."""

import multiprocessing
import sys
from multiprocessing.connection import Connection

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.memory import SMALL, Address, Place, Segment, Segments
from meadow.arrays.named import Arrays

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")


def content(seed: int, numbers: int) -> RecordDict:
    draw = np.random.default_rng(seed)
    arrays: Arrays = {
        "w": draw.normal(size=(numbers, 2)).astype(np.float32),
        "b": draw.normal(size=3),
        "n": np.array(seed),
    }
    return RecordDict({"arrays": to_record(arrays), "config": ConfigRecord({"round": seed})})


def same(a: RecordDict, b: RecordDict) -> bool:
    ours, theirs = (from_record(c.array_records["arrays"]) for c in (a, b))
    equal = all(ours[n].tobytes() == theirs[n].tobytes() and ours[n].dtype == theirs[n].dtype for n in ours)
    return equal and ours.keys() == theirs.keys() and a.config_records == b.config_records


def echo(pipe: Connection, sent: Address, back: Address) -> None:
    """Another process: read each object of one segment and write it to the other one."""
    here, there = Segment(sent), Segment(back)
    while places := pipe.recv():
        pipe.send(there.write([here.read(place) for place in places]))


def test_two_processes_exchange_what_grows_and_shrinks() -> None:
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe()
    segments = Segments()
    sent, back = segments.take(), segments.take()
    other = fresh.Process(target=echo, args=(theirs, sent.address, back.address))
    other.start()
    for seed, numbers in enumerate((1, 5000, 10, 300_000, 2000)):
        several = [content(seed, numbers), content(seed + 50, 1), content(seed + 100, numbers + 3)]
        ours.send(sent.write(several))
        answers: list[Place] = ours.recv()
        assert all(same(back.read(place), whole) for place, whole in zip(answers, several, strict=True))
    ours.send(None)
    other.join()
    assert other.exitcode == 0


def test_arrays_that_are_kept_stay_when_the_segment_is_used_again() -> None:
    segment = Segments().take()
    first = content(1, SMALL)
    (place,) = segment.write([first])
    read = segment.read(place)
    segment.write([content(2, SMALL)])
    assert same(read, first)


def test_a_segment_is_used_again_once_it_is_given_back() -> None:
    segments = Segments()
    first, second = segments.take(), segments.take()
    assert first.address != second.address
    segments.give_back(first)
    assert segments.take() is first


def test_the_memory_ends_with_the_segment() -> None:
    segment = Segments().take()
    segment.write([content(0, 1000)])
    address = segment.address
    del segment
    with pytest.raises(OSError):
        Segment(address)
