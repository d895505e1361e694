"""What a user's input may take: files that end, and arrays that fit into memory."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from meadow.runtime.errors import UserError

SMALL, LARGEST_RATIO = 8 * 2**20, 100
"""Compressed data that expands to over `SMALL` bytes and to over `LARGEST_RATIO` times its own length is refused."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file. Raises OSError for anything else: a device has no end, and a pipe waits for a writer."""
    kind = path.stat().st_mode  # before opening, which is an action on some devices
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
    with path.open("rb") as file:
        yield file


def read_file(path: Path, most: int = 0) -> bytes:
    """The content of a regular file of at most `most` bytes (0: a quarter of the memory). Raises OSError."""
    most = most or memory() // 4
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        room = min(most, max(size, 2**20))  # files in /proc have no size, and some have no end
        content = b"" if size > most else file.read(room + 1)
    if size > most or len(content) > room:
        raise OSError(errno.EFBIG, f"it has over {room:,} bytes", str(path))
    return content


def user_path(text: str) -> Path:
    """The path that a user wrote, with "~" and "$NAME" expanded where they mean something."""
    return Path(os.path.expanduser(os.path.expandvars(text)))  # noqa: PTH111, Path.expanduser raises for ~nobody


def is_file(path: Path) -> bool:
    """Whether the path is a regular file; False for a name that no file can have, where `Path.is_file` raises."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; False for a name that no folder can have."""
    return os.path.isdir(path)  # noqa: PTH112


def memory() -> int:
    """The bytes of memory that this process may have: the machine's, or a container's or `ulimit -v`'s if less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limits.append(int(Path(place).read_text()))
    if (own := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(own)
    return min(limits)


def check_fits(what: str, size: int) -> None:
    """Raise UserError, which begins with `what`, if so many bytes are over half of the memory: a run copies its arrays."""
    if 2 * size > (there := memory()):
        most = "" if size > there else ", and a run needs twice as much"
        raise UserError(f"{what} would take {_gib(size)}{most}; this machine has {_gib(there)}")


def check_ratio(what: str, size: int, packed: int) -> None:
    """Raise UserError, which begins with `what`, if `packed` bytes expand to `size` (or more) as only a trap does."""
    if size > max(SMALL, LARGEST_RATIO * packed):
        raise UserError(
            f"{what}: {packed:,} compressed bytes expand to over {LARGEST_RATIO} times as much; if that is intended, store "
            "them without compression"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g} GiB" if size < 2**50 else f"2**{size.bit_length() - 1} bytes"
