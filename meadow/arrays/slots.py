"""Messages between a command and Ray's workers on its machine: what is large goes through shared memory that is used again.

Ray's object store takes some milliseconds for a megabyte, since each object lies in memory that was never used before
(`python -m benchmarks.engines` tells what a round costs). A message here is pickled with its arrays out of band; these lie
in a slot, a file in memory (memfd) that ends with the command that made it, however it ends. What is unpickled was written
by the command or by its workers: the slots are open to nobody but the user who runs them.
"""

import itertools
import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SMALL = 4096
"""Bytes up to which an array travels inside its message."""
_ALIGNED = 64

Letter = tuple[bytes, list[tuple[int, int]]]
"""A pickled object without its large arrays, and where these lie in a slot: (begin, bytes) of each."""


@dataclass(frozen=True)
class Address:
    """Where another process finds a slot."""

    path: str
    number: int
    """Its slot's own, among all that a command makes."""


class Slot:
    """A file in memory, made here (`here`) or by another process of this machine. Raises OSError if it cannot be opened."""

    def __init__(self, address: Address | None = None, number: int = 0) -> None:
        if address is None:
            self._file = os.memfd_create(f"meadow-{number}")
            address = Address(f"/proc/{os.getpid()}/fd/{self._file}", number)
        else:
            self._file = os.open(address.path, os.O_RDWR)
        self.address = address
        self._memory: mmap.mmap | None = None
        weakref.finalize(self, os.close, self._file)

    def write(self, objects: Sequence[Any]) -> list[Letter]:
        """Put objects into the slot, in the place of what was there."""
        letters, buffers, end = list[Letter](), list[tuple[int, memoryview]](), 0
        for each in objects:
            places: list[tuple[int, int]] = []

            def outside(buffer: pickle.PickleBuffer, places: list[tuple[int, int]] = places) -> bool:
                nonlocal end
                raw = buffer.raw()
                if raw.nbytes <= SMALL:
                    return True
                buffers.append((end, raw))
                places.append((end, raw.nbytes))
                end += -(-raw.nbytes // _ALIGNED) * _ALIGNED
                return False

            letters.append((pickle.dumps(each, protocol=5, buffer_callback=outside), places))
        if buffers:
            memory = self._mapped(end)
            for begin, raw in buffers:
                memory[begin : begin + raw.nbytes] = raw
        return letters

    def read(self, letter: Letter) -> Any:
        """What a letter holds. Its arrays are read-only and change when the slot is written again: a `Kept` copies them."""
        head, places = letter
        if not places:
            return pickle.loads(head)
        memory = memoryview(self._mapped(sum(places[-1]))).toreadonly()
        return pickle.loads(head, buffers=[memory[begin : begin + size] for begin, size in places])

    def _mapped(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, 0)
        return self._memory


@dataclass
class Slots:
    """The slots of a command. One that is taken is used again only after it was given back."""

    _free: list[Slot] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def take(self) -> Slot:
        """A slot that nobody uses."""
        return self._free.pop() if self._free else Slot(number=next(self._numbers))

    def give_back(self, slot: Slot) -> None:
        """Its letters are read, or will not be."""
        self._free.append(slot)
