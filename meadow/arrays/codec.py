"""The one form of arrays as bytes, in memory and on the wire: a header, then buffers at multiples of 64 bytes.

    count, length     two integers of 8 bytes, little-endian: of the buffers, and of the header
    sizes             `count` such integers: bytes of each buffer
    header            `length` bytes
    buffers           each at the next multiple of 64

Named arrays (`encode`, `decode`) have a JSON header of names, dtypes and shapes. Pickled objects in shared memory
(`meadow/arrays/memory.py`) have their pickle there. What lasts is a safetensors file (`meadow/arrays/files.py`).
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from meadow.arrays.named import Arrays

ALIGNED = 64
"""Bytes at whose multiples a buffer begins: a line of the processor's cache."""

Bytes = bytes | bytearray | memoryview


class DamagedArrays(ValueError):
    """Bytes are not what `frame` or `encode` made."""


def frame(header: Bytes, buffers: Sequence[Bytes]) -> list[Bytes]:
    """The parts which, one after another, are the form of a header and buffers. Buffers are not copied."""
    sizes = [memoryview(buffer).nbytes for buffer in buffers]
    first = struct.pack(f"<{2 + len(sizes)}Q", len(sizes), len(header), *sizes)
    parts: list[Bytes] = [first, header, _gap(len(first) + len(header))]
    for buffer, size in zip(buffers, sizes, strict=True):
        parts += [buffer, _gap(size)]
    return parts


def unframe(memory: Bytes) -> tuple[memoryview, list[memoryview]]:
    """The inverse of `frame`: header and buffers, as views of `memory`. Raises DamagedArrays."""
    whole = memoryview(memory).cast("B")
    try:
        count, length = struct.unpack_from("<2Q", whole)
        if count > len(whole) // 8:
            raise DamagedArrays(f"{count} buffers cannot be in {len(whole)} bytes")
        sizes = struct.unpack_from(f"<{count}Q", whole, 16)
    except struct.error as error:
        raise DamagedArrays(f"the beginning is cut off: {error}") from None
    begin = 16 + 8 * count
    header, at = whole[begin : begin + length], aligned(begin + length)
    buffers = []
    for size in sizes:
        buffers.append(whole[at : at + size])
        at = aligned(at + size)
    if len(header) != length or any(len(buffer) != size for buffer, size in zip(buffers, sizes, strict=True)):
        raise DamagedArrays(f"the end is cut off: {len(whole)} bytes are there")
    return header, buffers


def encode(arrays: Mapping[str, npt.NDArray[np.generic]]) -> list[Bytes]:
    """Named arrays as parts, in the given order; their numbers are copied only where they do not lie in one piece.

    Any dtype whose values are plain bytes, any shape, any name. Raises TypeError for arrays of objects or of records.
    """
    about, buffers = [], list[Bytes]()
    for name, value in arrays.items():
        if value.dtype.hasobject or value.dtype.names is not None or value.dtype.kind == "V":
            raise TypeError(f"{name} has dtype {value.dtype}: only numbers, texts, bytes and times can be encoded")
        about.append([name, value.dtype.str, value.shape])
        buffers.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")
    return frame(json.dumps(about).encode(), buffers)


def decode(memory: Bytes) -> Arrays:
    """The inverse of `encode`. The arrays are views of `memory`, and can be written to if it can. Raises DamagedArrays."""
    header, buffers = unframe(memory)
    try:
        about = json.loads(bytes(header))
        if len(about) != len(buffers):
            raise DamagedArrays(f"{len(about)} arrays are described, {len(buffers)} are there")
        return {name: _array(buffer, kind, shape) for (name, kind, shape), buffer in zip(about, buffers, strict=True)}
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedArrays(f"the header cannot be read: {error}") from None


def aligned(size: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-size // ALIGNED) * ALIGNED


def _array(buffer: memoryview, kind: str, shape: Sequence[int]) -> npt.NDArray[np.generic]:
    dtype = np.dtype(str(kind))
    if dtype.hasobject or dtype.kind == "V" or any(type(side) is not int or side < 0 for side in shape):
        raise DamagedArrays(f"no array has dtype {kind} and shape {shape}")
    if math.prod(shape) * dtype.itemsize != len(buffer):
        raise DamagedArrays(f"{len(buffer)} bytes are no array of dtype {kind} and shape {shape}")
    if not len(buffer):
        return np.empty(shape, dtype)
    return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)


def _gap(size: int) -> bytes:
    return bytes(-size % ALIGNED)
