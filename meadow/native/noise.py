"""Normal numbers from AES in counter mode (`noise.c`), bit for bit those that `meadow/privacy/noise.py` makes by NumPy."""

import ctypes
import functools

import numpy as np
import numpy.typing as npt

from meadow.native.build import NotCompiled, compiled

PAIRS = 2**7
"""Numbers are drawn in groups: of 128 radii and then as many angles of the stream, 128 cosines and then as many sines."""


class Stream:
    """A stream under a key, from a counter on (16 bytes each, the counter's highest first). Raises NotCompiled."""

    def __init__(self, key: bytes, counter: bytes) -> None:
        self._library = library()
        self._state = ctypes.create_string_buffer(self._library.noise_size())
        self._library.noise_open(self._state, key, counter)

    def uniform(self, out: npt.NDArray[np.float64]) -> None:
        """Write the next numbers in [0, 1) to out, which lies in one piece."""
        self._library.noise_uniform(self._state, out.ctypes.data, len(out))

    def normals(self, out: npt.NDArray[np.float32], deviation: float) -> None:
        """Write whole groups of 2 PAIRS normal numbers times the deviation to out, which lies in one piece."""
        self._library.noise_normals(self._state, out.ctypes.data, len(out) // (2 * PAIRS), deviation)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `noise.c`. Raises NotCompiled where it cannot be had."""
    found = compiled("noise.c")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("size", count, []),
        ("pairs", count, []),
        ("open", None, [pointer] * 3),
        ("uniform", None, [pointer, pointer, count]),
        ("normals", None, [pointer, pointer, count, ctypes.c_float]),
    ):
        function = getattr(found, f"noise_{name}")
        function.restype, function.argtypes = result, arguments
    if found.noise_pairs() != PAIRS:
        raise NotCompiled(f"noise.c draws groups of {found.noise_pairs()} pairs, not of {PAIRS}")
    return found
