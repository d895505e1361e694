"""Normal numbers from AES in counter mode (`noise.c`), bit-identical to those of `meadow/privacy/noise.py`."""

import ctypes
import functools

import numpy as np
import numpy.typing as npt

from meadow.native.build import COUNT, POINTER, NotCompiled, declared

PAIRS = 2**7
"""Half a group: a group takes 128 radii, then 128 angles from the stream, and gives 128 cosines, then 128 sines."""


class Stream:
    """A stream of a key from a counter (16 bytes each, the counter big-endian). Raises NotCompiled."""

    def __init__(self, key: bytes, counter: bytes) -> None:
        self._library = library()
        self._state = ctypes.create_string_buffer(self._library.noise_size())
        self._library.noise_open(self._state, key, counter)

    def uniform(self, out: npt.NDArray[np.float64]) -> None:
        """Fill out, a contiguous array, with the next numbers in [0, 1)."""
        self._library.noise_uniform(self._state, out.ctypes.data, len(out))

    def normals(self, out: npt.NDArray[np.float32], deviation: float) -> None:
        """Fill whole groups of 2 PAIRS values of out, a contiguous array, with normal numbers times the deviation."""
        self._library.noise_normals(self._state, out.ctypes.data, len(out) // (2 * PAIRS), deviation)


@functools.cache
def library() -> ctypes.CDLL:
    """Load `noise.c`. Raises NotCompiled."""
    found = declared(
        "noise.c",
        {
            "noise_size": (COUNT, []),
            "noise_pairs": (COUNT, []),
            "noise_open": (None, [POINTER] * 3),
            "noise_uniform": (None, [POINTER, POINTER, COUNT]),
            "noise_normals": (None, [POINTER, POINTER, COUNT, ctypes.c_float]),
        },
    )
    if found.noise_pairs() != PAIRS:
        raise NotCompiled(f"noise.c draws groups of {found.noise_pairs()} pairs, not of {PAIRS}")
    return found
