"""The binary format of arrays in memory and on the wire: a header, then buffers at multiples of 64 bytes.

    count, length     little-endian uint64: the number of buffers, and the bytes of the header
    sizes             `count` little-endian uint64: the bytes of each buffer
    header            `length` bytes
    buffers           each at the next multiple of 64

The header of named arrays (`encode`, `decode`) is JSON: names, dtypes and shapes. The header of an object in shared
memory (`meadow/arrays/memory.py`) is its pickle. Permanent files are safetensors (`meadow/arrays/files.py`).
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from meadow.arrays.named import Arrays

ALIGNED = 64
"""Buffers start at multiples of this many bytes, a cache line."""

Bytes = bytes | bytearray | memoryview


class DamagedArrays(ValueError):
    """The bytes are not a valid result of `frame` or `encode`."""


def frame(header: Bytes, buffers: Sequence[Bytes]) -> list[Bytes]:
    """Lay out a header and buffers; returns parts to concatenate. Buffers are not copied."""
    sizes = [memoryview(buffer).nbytes for buffer in buffers]
    first = struct.pack(f"<{2 + len(sizes)}Q", len(sizes), len(header), *sizes)
    parts: list[Bytes] = [first, header, _gap(len(first) + len(header))]
    for buffer, size in zip(buffers, sizes, strict=True):
        parts += [buffer, _gap(size)]
    return parts


def unframe(memory: Bytes) -> tuple[memoryview, list[memoryview]]:
    """Invert `frame`: return header and buffers as views of `memory`. Raises DamagedArrays."""
    whole = memoryview(memory).cast("B")
    try:
        count, length = struct.unpack_from("<2Q", whole)
        if count > len(whole) // 8:
            raise DamagedArrays(f"{count} buffers do not fit into {len(whole)} bytes")
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
        raise DamagedArrays(f"the end is cut off after {len(whole)} bytes")
    return header, buffers


def encode(arrays: Mapping[str, npt.NDArray[np.generic]]) -> list[Bytes]:
    """Encode named arrays, in order, as parts to concatenate. Only non-contiguous arrays are copied.

    Raises TypeError for arrays of objects or records.
    """
    about, buffers = [], list[Bytes]()
    for name, value in arrays.items():
        if value.dtype.hasobject or value.dtype.names is not None or value.dtype.kind == "V":
            raise TypeError(f"{name} has dtype {value.dtype}: only numbers, texts, bytes and times can be encoded")
        about.append([name, value.dtype.str, value.shape])
        buffers.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")
    return frame(json.dumps(about).encode(), buffers)


def decode(memory: Bytes) -> Arrays:
    """Invert `encode`. The arrays are views of `memory`, writable if it is. Raises DamagedArrays."""
    header, buffers = unframe(memory)
    try:
        about = json.loads(bytes(header))
        if len(about) != len(buffers):
            raise DamagedArrays(f"the header describes {len(about)} arrays, but there are {len(buffers)}")
        return {name: _array(buffer, kind, shape) for (name, kind, shape), buffer in zip(about, buffers, strict=True)}
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedArrays(f"the header cannot be read: {error}") from None


def aligned(size: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-size // ALIGNED) * ALIGNED


def _array(buffer: memoryview, kind: str, shape: Sequence[int]) -> npt.NDArray[np.generic]:
    dtype = np.dtype(str(kind))
    if dtype.hasobject or dtype.kind == "V" or any(type(side) is not int or side < 0 for side in shape):
        raise DamagedArrays(f"dtype {kind} with shape {shape} is not valid")
    if math.prod(shape) * dtype.itemsize != len(buffer):
        raise DamagedArrays(f"{len(buffer)} bytes do not fit dtype {kind} and shape {shape}")
    if not len(buffer):
        return np.empty(shape, dtype)
    return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)


def _gap(size: int) -> bytes:
    return bytes(-size % ALIGNED)
