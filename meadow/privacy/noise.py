"""Secret random numbers, fast: the stream of a block cipher under a key that only the owner of the data has.

torch's generators keep 32 bits of a seed, so anyone who sees a release could try all seeds and remove the noise. Here AES in
counter mode (NIST SP 800-38A), with a 128-bit key and a 128-bit start, makes a stream that looks random without the key.

The numbers depend on the seed alone: they are computed only by operations that IEEE 754 defines to the last bit (no
library's logarithm, which differs between processors). `noise.c` computes the same in C, about eight times as fast;
without a compiler, or AES instructions in the processor, NumPy gives the same bits.
"""

import math
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from torch import Tensor

from meadow.native import noise as native_noise
from meadow.native.build import NotCompiled
from meadow.native.noise import PAIRS

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

_GROUP = 2 * PAIRS
_AT_ONCE = 2**7
"""Groups that NumPy computes at once: enough to hide the cost of a call, few enough for the second-level cache."""
_ZEROS = bytes(4 * _GROUP * _AT_ONCE)

_LOGARITHM = [np.float32(c) for c in (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)]  # fmt: skip
_COSINE = [np.float32(c) for c in (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2, -0.5, 1.0)]
_SINE = [np.float32(c) for c in (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)]
"""Polynomials of Cephes (Moshier; logf, sinf, cosf), highest power first, with an error of a unit in the last place."""
_LN2 = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""The logarithm of 2 in two parts; the first has few bits, so its multiples are exact."""
_ROOT_HALF = 0x3F3504F3
"""The bits of the square root of 1/2."""


class Stream:
    """A stream of random numbers from a seed of up to 256 bits, the same on every machine and in every process."""

    def __init__(self, seed: int, native: bool = True) -> None:
        """native: use compiled code if available; the bits are the same."""
        whole = seed.to_bytes(32, "little")
        self._native: native_noise.Stream | None = None
        if native:
            with suppress(NotCompiled):
                self._native = native_noise.Stream(whole[:16], whole[16:])
        if self._native is None:
            self._cipher: CipherContext = Cipher(algorithms.AES(whole[:16]), modes.CTR(whole[16:])).encryptor()
            self._bytes = bytearray(len(_ZEROS) + 15)  # `update_into` needs 15 more

    def uniform(self, n: int) -> Tensor:
        """n numbers, float64 (n,), uniform over the multiples of 2^-53 in [0, 1)."""
        if self._native is not None:
            result = torch.empty(n, dtype=torch.float64)
            self._native.uniform(result.numpy())
            return result
        groups = -(-2 * n // _GROUP)
        words = np.frombuffer(self._cipher.update(bytes(4 * _GROUP * groups)), "<u8", n)
        return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)

    def normal(self, n: int) -> Tensor:
        """n independent standard normal numbers, float32 (n,); see `fill`."""
        result = torch.empty(n)
        self.fill(result.numpy())
        return result

    def fill(self, out: Floats, deviation: float = 1.0) -> None:
        """Fill out, float32 and contiguous, with independent normal numbers of mean 0 (Box and Muller 1958), at most 6.8
        deviations from it."""
        # The rest of the last group is discarded: else the next call's writes would cross cache lines.
        whole = len(out) // _GROUP * _GROUP
        self._make(out[:whole], deviation)
        if whole < len(out):
            rest = np.empty(_GROUP, np.float32)
            self._make(rest, deviation)
            out[whole:] = rest[: len(out) - whole]

    def _make(self, out: Floats, deviation: float) -> None:
        """Write whole groups of normal numbers."""
        if out.dtype != np.float32 or not out.flags.c_contiguous:
            raise TypeError(f"out has dtype {out.dtype} and strides {out.strides}: float32 in one piece is needed")
        if self._native is not None:
            self._native.normals(out, deviation)
            return
        for begin in range(0, len(out), _AT_ONCE * _GROUP):
            some = out[begin : begin + _AT_ONCE * _GROUP].reshape(-1, 2, PAIRS)
            size = self._cipher.update_into(_ZEROS[: some.nbytes], self._bytes)
            words = np.frombuffer(self._bytes, "<u4", size // 4).reshape(some.shape)
            radius = _radius(words[:, 0])
            for place, side in enumerate(_cosine_and_sine(words[:, 1])):
                np.multiply(radius, side, out=some[:, place])
            some *= np.float32(deviation)


def _radius(words: Words) -> Floats:
    """sqrt(-2 ln u), u in (0, 1] in steps of 2^-32; float32 keeps these steps near 0, which makes the tails."""
    u = words.astype(np.float32)
    u *= np.float32(2.0**-32)
    u += np.float32(2.0**-33)
    # u is 2^e (1 + x), 1 + x between the roots of 1/2 and of 2.
    above = u.view(np.int32)
    above -= _ROOT_HALF
    e = (above >> 23).astype(np.float32)
    above &= 0x7FFFFF
    above += _ROOT_HALF
    x = above.view(np.float32)
    x -= np.float32(1)
    z = x * x
    y = _polynomial(_LOGARITHM, x)
    y *= x
    y *= z
    y += e * _LN2[1]
    z *= np.float32(0.5)
    y -= z
    y += x
    e *= _LN2[0]
    y += e
    y *= np.float32(-2)
    return np.sqrt(y, out=y)


def _cosine_and_sine(words: Words) -> tuple[Floats, Floats]:
    """Cosine and sine of a uniform angle. 30 bits give an angle in (-pi/4, pi/4) without 0; the highest bit mirrors it at
    the second axis, and the next bit at the diagonal."""
    words = np.ascontiguousarray(words)
    t = ((words << 2).view(np.int32) | 2).astype(np.float32)
    t *= np.float32(math.pi * 2.0**-33)
    q = t * t
    cosine = _polynomial(_COSINE, q)
    sine = _polynomial(_SINE, q)
    sine *= q
    sine *= t
    sine += t
    one, other = cosine.view(np.int32), sine.view(np.int32)
    signed = words.view(np.int32)
    one ^= signed & np.int32(-(2**31))
    # Exchange bit by bit, which is several times as fast as a condition.
    change = (signed << 1) >> 31
    change &= one ^ other
    one ^= change
    other ^= change
    return cosine, sine


def _polynomial(coefficients: list[np.float32], x: Floats) -> Floats:
    y = x * coefficients[0]
    y += coefficients[1]
    for coefficient in coefficients[2:]:
        y *= x
        y += coefficient
    return y
