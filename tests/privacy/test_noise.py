"""The stream of random numbers: published vectors of the cipher, the laws of its numbers, and how it is cut."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from meadow.native.build import NotCompiled
from meadow.native.noise import library
from meadow.privacy.noise import Stream


def test_the_bits_are_those_of_aes_in_counter_mode() -> None:
    """NIST SP 800-38A, F.5.1: the keystream is the plaintext xor the ciphertext of the first block."""
    key, counter = "2b7e151628aed2a6abf7158809cf4f3c", "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
    plain, cipher = 0x6BC1BEE22E409F96E93D7E117393172A, 0x874D6191B620E3261BEF6864990DB6CE
    stream = (plain ^ cipher).to_bytes(16, "big")
    words = [int.from_bytes(stream[i : i + 8], "little") >> 11 for i in (0, 8)]
    seed = int.from_bytes(bytes.fromhex(key + counter), "little")
    assert Stream(seed).uniform(2).tolist() == [word / 2**53 for word in words]


def test_normal_numbers_have_the_normal_law() -> None:
    """4 million: moments within 4 of their own deviations, tails to 5 by Poisson's law, the whole by Kolmogorov's test."""
    n = 4_000_000
    x = Stream(3).normal(n).double().numpy()
    for value, deviation in (
        (x.mean(), 1 / n),
        (x.var() - 1, 2 / n),
        (stats.skew(x), 6 / n),
        (stats.kurtosis(x), 24 / n),
        ((x[1:] * x[:-1]).mean(), 1 / n),
        ((x[2**7 :] * x[: -(2**7)]).mean(), 1 / n),  # the two of a pair
        ((x[2**7 :] ** 2 * x[: -(2**7)] ** 2).mean() - 1, 8 / n),
    ):
        assert abs(value) <= 4 * math.sqrt(deviation)
    assert stats.kstest(x, "norm").pvalue > 1e-4
    for bound in (3.0, 4.0, 5.0):
        expected = n * 2 * stats.norm.sf(bound)
        assert abs(np.sum(np.abs(x) > bound) - expected) <= 4 * math.sqrt(expected)
    assert np.isfinite(x).all()


def test_no_word_of_the_stream_is_used_twice() -> None:
    """Draws go by groups of 256 words: each begins where the one before it ended, and leaves out the rest of its last."""
    stream, all_, uniform = Stream(7), Stream(7).normal(256 * 500), Stream(7).uniform(128 * 500)
    at = 0
    for count in (1, 5, 256, 100_000, 257, 3):
        assert torch.equal(stream.normal(count), all_[256 * at : 256 * at + count])
        at += -(-count // 256)
        assert torch.equal(stream.uniform(129), uniform[128 * at : 128 * at + 129])
        at += 2


def test_seeds_that_differ_beyond_32_bits_give_other_numbers() -> None:
    """torch.Generator.manual_seed keeps 32 bits of a seed: whoever has a release could try them all."""
    for bit in (32, 63, 64, 127, 128, 200, 255):
        for draw in (Stream.normal, Stream.uniform):
            assert not torch.equal(draw(Stream(1), 8), draw(Stream(1 + 2**bit), 8))


def test_uniform_numbers_are_uniform() -> None:
    u = Stream(5).uniform(1_000_000).numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4


def compiles() -> bool:
    try:
        library()
    except NotCompiled:
        return False
    return True


@pytest.mark.skipif(not compiles(), reason="noise.c does not compile here")
@pytest.mark.parametrize(
    "seed", [11, 2**256 - 1, 2**256 - 2**192 - 2**131]
)  # the counter overflows soon, or its lower half
def test_compiled_and_in_numpy_the_bits_are_the_same(seed: int) -> None:
    """Of 8 million words, so that a rounding that differs once in a million is seen."""
    streams = [Stream(seed), Stream(seed, native=False)]
    drawn = [[s.uniform(7), s.normal(4), s.normal(8_000_000), s.uniform(2), s.normal(70_000)] for s in streams]
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)
    scaled = [torch.empty(100_000) for _ in streams]
    for stream, out in zip(streams, scaled, strict=True):
        stream.fill(out.numpy(), 0.37)
    assert torch.equal(*scaled)


def test_normal_numbers_are_box_and_mullers() -> None:
    """The words of the cipher by the formula in double: float32 gives radii near 0 in steps of 2^-24 of their u."""
    seed, groups = 5, 300
    cipher = Cipher(algorithms.AES(seed.to_bytes(16, "little")), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(cipher.update(bytes(1024 * groups)), "<u4")
    radii, angles = words.reshape(groups, 2, 128).swapaxes(0, 1)
    radius = np.sqrt(-2 * np.log((radii + 0.5) / 2**32))
    turn = ((angles % 2**30) / 2**30 + 2.0**-31 + np.where(angles % 2**30 < 2**29, 0, -1)) * math.pi / 2
    cosine, sine = np.cos(turn) * np.where(angles >= 2**31, -1, 1), np.sin(turn)
    swapped = angles // 2**30 % 2 == 1
    expected = radius * [np.where(swapped, sine, cosine), np.where(swapped, cosine, sine)]
    for stream in (Stream(seed), Stream(seed, native=False)):
        found = stream.normal(256 * groups).double().numpy().reshape(groups, 2, 128).swapaxes(0, 1)
        assert np.abs(found - expected)[:, radius > 0.1].max() < 3e-6
        assert np.abs(found - expected).max() < 3e-4


def test_noise_is_written_only_to_float32_in_one_piece() -> None:
    wrong: tuple[Any, ...] = (np.empty(2**16, np.float64), np.empty(2**17, np.float32)[::2])
    for out in wrong:
        with pytest.raises(TypeError, match="in one piece"):
            Stream(1).fill(out)
