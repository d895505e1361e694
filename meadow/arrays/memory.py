"""Shared memory of a command and its workers on one machine: segments of pickled objects and their arrays.

A segment is a file in memory (memfd, Linux). It disappears with the process that made it, however that ends. Only the
same user can open it, so all pickles come from that user's processes. Segments have two uses:

- messages between the command and its workers (`Segments`). They are reused, since touching new memory costs more than the
  copy itself;
- data that all processes of a machine read (`share`, `common`): one copy of data set and split.
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
"""Arrays of at most this many bytes stay inside the pickle."""
MOST = 8
"""Shared values that a process keeps; after that it drops the oldest."""
_NAME = "meadow-memory"
_numbers = itertools.count()

Place = tuple[int, int]
"""An object's first byte in a segment, and its size in bytes."""


@dataclass(frozen=True)
class Address:
    """Where another process finds a segment. number: unique among the segments of a command."""

    path: str
    number: int


class Segment:
    """A file in memory: a new one, or that of another process (`address`). Raises OSError if it no longer exists."""

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
        """Overwrite the segment with objects; return the place of each."""
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
        """Return the object at a place. Its arrays are read-only, and change with the next `write`."""
        begin, size = place
        return _unpickled(memoryview(self._mapped(begin + size)).toreadonly()[begin : begin + size])

    def read_private(self) -> Any:
        """Return the first object, with copy-on-write arrays: no other process sees what this one writes."""
        return _unpickled(memoryview(mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)))

    def _mapped(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, 0)
        return self._memory


@dataclass
class Segments:
    """A command's pool of segments for messages."""

    _free: list[Segment] = field(default_factory=list)

    def take(self) -> Segment:
        """Return an unused segment."""
        return self._free.pop() if self._free else Segment()

    def give_back(self, segment: Segment) -> None:
        """Return a segment to the pool, once nobody will read it any more."""
        self._free.append(segment)


@dataclass(frozen=True)
class _Shared:
    value: Any
    path: str
    segment: Segment | None = None
    """In the process that made it; the memory lives as long as this object."""


_shared: dict[Hashable, _Shared] = {}


def common(key: Hashable, make: Callable[[], T]) -> T:
    """Return the value shared under a key, else make it."""
    return cast(T, _shared[key].value) if key in _shared else make()


def share(key: Hashable, value: object) -> str:
    """Share a value with the processes of this machine; later `common` calls return the shared copy. Returns its path
    for `find`, or "" if the system has no memfd."""
    if key not in _shared:
        if not hasattr(os, "memfd_create"):
            return ""
        segment = Segment()
        segment.write([(key, value)])
        _keep(key, _Shared(segment.read_private()[1], segment.address.path, segment))
    return _shared[key].path


def find(path: str) -> None:
    """Register another process's shared value for `common`. Raises OSError if it no longer exists.

    Reads the segment each time, because a path may come to belong to another segment.
    """
    key, value = Segment(Address(path, -1)).read_private()
    if key not in _shared:
        _keep(key, _Shared(value, path))


def _keep(key: Hashable, shared: _Shared) -> None:
    while len(_shared) >= MOST:
        del _shared[next(iter(_shared))]
    _shared[key] = shared


def _as_array(tensor: Tensor) -> tuple[Any, ...]:
    """Pickle a tensor as its array, so that its values stay outside the pickle."""
    return torch.from_numpy, (tensor.contiguous().numpy(),)


def _pickled(value: object) -> list[Bytes]:
    """Pickle a value: the pickle is the header, large arrays are the buffers."""
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
