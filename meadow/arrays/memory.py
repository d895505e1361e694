"""Data once a machine: a command puts data set and split where the other processes of its machine find them.

Without it each worker reads the data by itself and has its own copy. A piece is pickled into a file in memory (memfd, on
Linux) with its arrays beside it; whoever maps it shares their pages until it writes to them. The file ends with the command
that made it, however it ends. What is unpickled comes from a command of the same user, who alone can open it.
"""

import io
import mmap
import os
import pickle
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

MOST = 8
"""Pieces that a process keeps; then the oldest goes."""
_NAME = "meadow-data"
_ALIGNED = 64
_HEAD = 16
"""Bytes that say where the arrays begin."""


@dataclass(frozen=True)
class _Piece:
    value: Any
    address: str
    file: "_File | None" = None


class _File:
    """A file in memory, there as long as this object."""

    def __init__(self) -> None:
        self.number = os.memfd_create(_NAME)
        self.address = f"/proc/{os.getpid()}/fd/{self.number}"

    def __del__(self) -> None:
        os.close(self.number)


class _Pickler(pickle.Pickler):
    """Tensors as the arrays that they are, so that these stay outside the pickle."""

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.contiguous().numpy(),)) if type(value) is Tensor else NotImplemented


_pieces: dict[Hashable, _Piece] = {}


def common(what: Hashable, make: Callable[[], T]) -> T:
    """The piece that is `what` if it lies in common memory, else what `make` makes."""
    return cast(T, _pieces[what].value) if what in _pieces else make()


def share(what: Hashable, value: object) -> str:
    """Put a piece into common memory, from where this process takes it too; returns its address for `find`, "" where the
    system has no such memory."""
    if what not in _pieces:
        if not hasattr(os, "memfd_create"):
            return ""
        file = _File()
        _write(file, (what, value))
        _keep(what, _Piece(_read(file.address)[1], file.address, file))
    return _pieces[what].address


def find(address: str) -> None:
    """Let `common` have a piece that another process shares. Raises OSError if it is gone.

    It is looked at each time: an address is given to another piece once its own has gone.
    """
    what, value = _read(address)
    if what not in _pieces:
        _keep(what, _Piece(value, address))


def _keep(what: Hashable, piece: _Piece) -> None:
    while len(_pieces) >= MOST:
        del _pieces[next(iter(_pieces))]
    _pieces[what] = piece


def _write(file: _File, value: object) -> None:
    """The pickle and the arrays' places, then the arrays."""
    pickled, buffers, places, end = io.BytesIO(), list[memoryview](), list[tuple[int, int]](), 0

    def outside(buffer: pickle.PickleBuffer) -> None:
        nonlocal end
        buffers.append(buffer.raw())
        places.append((end, buffers[-1].nbytes))
        end += -(-buffers[-1].nbytes // _ALIGNED) * _ALIGNED

    _Pickler(pickled, protocol=5, buffer_callback=outside).dump(value)
    head = pickle.dumps((pickled.getvalue(), places))
    begin = -(-(_HEAD + len(head)) // _ALIGNED) * _ALIGNED
    os.ftruncate(file.number, begin + end)
    with Path(file.address).open("r+b") as out:
        out.write(begin.to_bytes(_HEAD, "little") + head)
        for (at, _), raw in zip(places, buffers, strict=True):
            out.seek(begin + at)
            out.write(raw)


def _read(address: str) -> Any:
    """What lies at an address; its arrays are the file's pages until they are written to. Raises OSError if it is gone."""
    if _NAME not in str(Path(address).readlink()):
        raise FileNotFoundError(f"{address} is another file now")
    with Path(address).open("rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    begin = int.from_bytes(memory[:_HEAD], "little")
    pickled, places = pickle.loads(memory[_HEAD:begin])
    return pickle.loads(pickled, buffers=[memory[begin + at : begin + at + size] for at, size in places])


class Recent(Generic[K, T]):
    """What was made last, as much as fits into so many bytes, but always the newest."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._kept: dict[K, tuple[T, int]] = {}

    def get(self, key: K) -> T | None:
        """What is kept under a key."""
        found = self._kept.get(key)
        return None if found is None else found[0]

    def put(self, key: K, value: T, size: int) -> T:
        """Keep a value of so many bytes; returns it."""
        self._bytes += size - self._kept.pop(key, (None, 0))[1]
        self._kept[key] = value, size
        while self._bytes > self._most and len(self._kept) > 1:
            self._bytes -= self._kept.pop(next(iter(self._kept)))[1]
        return value
