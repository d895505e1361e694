"""Shared memory of a command and its workers on one machine: segments, which hold pickled objects and their arrays.

A segment is a file in memory (memfd, on Linux). It ends with the command that made it, however that ends, and only the same
user can open it; so what is unpickled comes from a process of that user. Segments serve two purposes:

- messages between the command and its workers (`Segments`): each segment is used again and again, since memory that was
  never used before costs more than copying into it;
- data that all processes of a machine read (`share`, `common`): data set and split lie in memory once.
"""

import copyreg
import io
import itertools
import mmap
import os
import pickle
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from meadow.arrays.codec import Bytes, aligned, frame, unframe

T = TypeVar("T")

SMALL = 4096
"""Bytes up to which an array stays inside its object's pickle."""
MOST = 8
"""Shared values that a process keeps; then the oldest goes."""
_NAME = "meadow-memory"
_numbers = itertools.count()

Place = tuple[int, int]
"""Where an object lies in a segment: its first byte, and how many there are."""


@dataclass(frozen=True)
class Address:
    """Where another process finds a segment. number: its own, among all that a command makes."""

    path: str
    number: int


class Segment:
    """A file in memory, made here, or by another process of this machine (`address`). Raises OSError if it is gone."""

    def __init__(self, address: Address | None = None) -> None:
        if address is None:
            self._file = os.memfd_create(_NAME)
            address = Address(f"/proc/{os.getpid()}/fd/{self._file}", next(_numbers))
        else:
            if _NAME not in str(Path(address.path).readlink()):
                raise FileNotFoundError(f"{address.path} is another file now")
            self._file = os.open(address.path, os.O_RDWR)
        self.address = address
        self._memory: mmap.mmap | None = None
        weakref.finalize(self, os.close, self._file)

    def write(self, objects: Sequence[Any]) -> list[Place]:
        """Put objects into the segment, in the place of what was there. Returns where each lies."""
        framed = [_pickled(each) for each in objects]
        sizes = [aligned(sum(memoryview(part).nbytes for part in parts)) for parts in framed]
        memory, begin = self._mapped(sum(sizes)), 0
        places = []
        for parts, size in zip(framed, sizes, strict=True):
            at = begin
            for part in parts:
                end = at + memoryview(part).nbytes
                memory[at:end] = part
                at = end
            places.append((begin, size))
            begin += size
        return places

    def read(self, place: Place) -> Any:
        """The object at a place. Its arrays are read-only, and change when it is written again; `Kept` copies them."""
        begin, size = place
        return _unpickled(memoryview(self._mapped(begin + size)).toreadonly()[begin : begin + size])

    def read_private(self) -> Any:
        """The first object. Its arrays are the segment's pages until this process writes to them; no other one sees that."""
        return _unpickled(memoryview(mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)))

    def _mapped(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, 0)
        return self._memory


@dataclass
class Segments:
    """A command's segments for messages. One that is taken is used again only after it was given back."""

    _free: list[Segment] = field(default_factory=list)

    def take(self) -> Segment:
        """A segment that nobody uses."""
        return self._free.pop() if self._free else Segment()

    def give_back(self, segment: Segment) -> None:
        """What is in it has been read, or will not be."""
        self._free.append(segment)


@dataclass(frozen=True)
class _Shared:
    value: Any
    path: str
    segment: Segment | None = None
    """Of the process that made it: with it the memory ends."""


_shared: dict[Hashable, _Shared] = {}


def common(key: Hashable, make: Callable[[], T]) -> T:
    """The value that is shared under a key, else what `make` makes."""
    return cast(T, _shared[key].value) if key in _shared else make()


def share(key: Hashable, value: object) -> str:
    """Share a value with the processes of this machine, and take it from there too. Returns its path for `find`, "" where
    the system has no such memory."""
    if key not in _shared:
        if not hasattr(os, "memfd_create"):
            return ""
        segment = Segment()
        segment.write([(key, value)])
        _keep(key, _Shared(segment.read_private()[1], segment.address.path, segment))
    return _shared[key].path


def find(path: str) -> None:
    """Let `common` have a value that another process shares. Raises OSError if it is gone.

    It is looked at each time: a path is given to another segment once its own has gone.
    """
    key, value = Segment(Address(path, -1)).read_private()
    if key not in _shared:
        _keep(key, _Shared(value, path))


def _keep(key: Hashable, shared: _Shared) -> None:
    while len(_shared) >= MOST:
        del _shared[next(iter(_shared))]
    _shared[key] = shared


def _as_array(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor is pickled as the array that it is, so that its numbers stay outside the pickle."""
    return torch.from_numpy, (tensor.contiguous().numpy(),)


def _pickled(value: object) -> list[Bytes]:
    """The pickle as the header, large arrays as the buffers."""
    pickled, buffers = io.BytesIO(), list[Bytes]()

    def inside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes > SMALL:
            buffers.append(raw)
        return raw.nbytes <= SMALL

    pickler = pickle.Pickler(pickled, protocol=5, buffer_callback=inside)
    pickler.dispatch_table = {**copyreg.dispatch_table, Tensor: _as_array}
    pickler.dump(value)
    return frame(pickled.getbuffer(), buffers)


def _unpickled(memory: memoryview) -> Any:
    head, buffers = unframe(memory)
    return pickle.loads(head, buffers=buffers)
