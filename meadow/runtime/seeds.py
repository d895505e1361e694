"""Random numbers without global state: every draw in Meadow comes from `derive(seed, purpose, *path)`."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *path: int | str) -> int:
    """Return a 63-bit integer that depends only on the arguments.

    It is the same on every machine, in every process and after every restart, so a resumed run draws the same numbers.
    The hash is SHA-256 over each argument's type, length and text, so that ("a", "bc") and ("ab", "c"), or 1 and "1",
    differ.
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
    """Run torch on one thread inside the block: the order of sums, and so the last bits, depend on the number of
    threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def torch_seeded(seed: int, purpose: str, *path: int | str) -> Iterator[None]:
    """Seed torch's global generator inside the block and restore its state afterwards.

    Torch draws initial weights and dropout masks from the global generator and accepts no other.
    """
    # torch.manual_seed would spend milliseconds formatting a stack for each unused device type.
    generator, number = torch.default_generator, derive(seed, purpose, *path)
    before = generator.get_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)
    generator.manual_seed(number)
    try:
        yield
    finally:
        generator.set_state(before)
