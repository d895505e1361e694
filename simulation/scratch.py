"""A command's own folder in /tmp, for sockets and Ray's session. A killed command leaves it; the next one removes it."""

import fcntl
import os
import shutil
import signal
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

PLACE = Path("/tmp")
"""Not TMPDIR: a socket's path may have at most 107 characters."""
_LOCK = "lock"


class Scratch:
    """A new folder, which belongs to this process until `remove`."""

    def __init__(self, place: Path = PLACE) -> None:
        for left in place.glob(f"meadow-{os.getuid()}-*"):
            _remove_if_left(left)
        self.path = Path(tempfile.mkdtemp(prefix=f"meadow-{os.getuid()}-{os.getpid()}-", dir=place))
        self._lock = (self.path / "new").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / "new").rename(self.path / _LOCK)  # so that no other process finds it before it is locked

    def remove(self) -> None:
        """Remove the folder, and end processes that still use it. Safe to call twice."""
        _remove(self.path)
        self._lock.close()


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user whose process is dead: nobody has its lock."""
    with suppress(OSError):  # there is no lock, another process has it, or it is another user's
        if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
            with (folder / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _remove(folder: Path) -> None:
    """End the processes that write to the folder, such as Ray's agents, and remove it."""
    for process in Path("/proc").glob("[0-9]*"):  # none on macOS
        with suppress(OSError):  # it has ended, or is another user's
            if int(process.name) != os.getpid() and any(_writes(file, folder) for file in (process / "fd").iterdir()):
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _writes(file: Path, folder: Path) -> bool:
    """Whether an entry of /proc/PID/fd is a file below the folder, open for writing."""
    with suppress(OSError):
        return bool(file.lstat().st_mode & stat.S_IWUSR) and file.readlink().is_relative_to(folder)
    return False
