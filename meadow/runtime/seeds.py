"""Randomness as a function: every draw in Meadow comes from `derive(seed, purpose, *path)`, never from a global state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *path: int | str) -> int:
    """Return a 63-bit integer that depends on every argument and on nothing else.

    `derive(7, "shuffle", round, client)` is the same on every machine, in every process and after every restart, so
    a resumed run draws what the uninterrupted run would have drawn. The hash is SHA-256 over the arguments' canonical
    text, each with its length and type, so that ("a", "bc") and ("ab", "c"), or 1 and "1", never collide.
    """
    digest = hashlib.sha256()
    for part in (seed, purpose, *path):
        text = str(part).encode()
        digest.update(f"{type(part).__name__}:{len(text)}:".encode())
        digest.update(text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def numpy_generator(seed: int, purpose: str, *path: int | str) -> np.random.Generator:
    """A NumPy generator (Philox, whose stream is specified) for one purpose."""
    return np.random.Generator(np.random.Philox(derive(seed, purpose, *path)))


def torch_generator(seed: int, purpose: str, *path: int | str) -> torch.Generator:
    """A CPU torch generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, purpose, *path))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block: the order of its sums, and so the last bits, depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def torch_seeded(seed: int, purpose: str, *path: int | str) -> Iterator[None]:
    """Seed torch's global generator inside the block and put its former state back after it.

    Modules of torch draw their initial weights, and dropout its masks, from the global generator; there is no argument
    to give them another. Inside this block those draws are a function of the seed, and nothing leaks out of it.
    """
    # Neither torch.random.fork_rng nor torch.manual_seed: the second spends milliseconds on formatting a stack for each kind
    # of device that is not in use.
    generator, number = torch.default_generator, derive(seed, purpose, *path)
    before = generator.get_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)
    generator.manual_seed(number)
    try:
        yield
    finally:
        generator.set_state(before)
