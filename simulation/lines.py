"""Calls to the workers of this machine, over a Unix socket each.

Ray starts the workers, and brings a killed one back; a call through it takes one and a half milliseconds there and as long
back, through a socket a tenth of one. What is large stays in shared memory (`meadow/arrays/slots.py`). The socket lies in a
folder that is open to nobody but the user who runs the command, as what passes is pickled.
"""

import itertools
import socket
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

RETRIES = 2
"""Times that a call is given again to a worker that died of it; then it is lost."""


def connect(path: str, worker: int) -> Connection:
    """A worker's end of its line. Raises OSError if the command is gone."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    connection = Connection(line.detach())
    connection.send_bytes(str(worker).encode())
    return connection


@dataclass
class _Line:
    """One worker's. The first call that waits is in its hands while it is connected; the others come after it."""

    connection: Connection | None = None
    waiting: deque[tuple[int, bytes]] = field(default_factory=deque)
    deaths: int = 0
    """Of the call in hand."""

    def advance(self) -> None:
        """Hand over the call that is now the first."""
        if self.connection is not None and self.waiting:
            with suppress(OSError):  # a worker that is gone shows when its answer is read
                self.connection.send_bytes(self.waiting[0][1])

    def read(self, connection: Connection) -> list[tuple[int, bytes | None]]:
        """What has come: the call's number and the answer, None if it is lost; nothing if the worker may come back."""
        try:
            answer = connection.recv_bytes()
        except (EOFError, OSError):
            connection.close()
            self.connection = None
            self.deaths += bool(self.waiting)
            return self.end(None) if self.deaths > RETRIES else []
        found = self.end(answer)
        self.advance()
        return found

    def end(self, answer: bytes | None) -> list[tuple[int, bytes | None]]:
        """The first call is answered or lost."""
        self.deaths = 0
        return [(self.waiting.popleft()[0], answer)]


class Lines:
    """The command's ends. Workers connect when they are up, and again when they have been brought back."""

    def __init__(self, workers: int) -> None:
        # Not under TMPDIR: the system takes no socket's path of more than 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="meadow-", dir="/tmp", ignore_cleanup_errors=True)
        self.path = str(Path(self._folder.name) / "lines")
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(self.path)
        self._door.listen(workers)
        self._lines = [_Line() for _ in range(workers)]
        self._numbers = itertools.count()

    def call(self, worker: int, what: bytes) -> int:
        """Ask a worker, after all that it was asked before; the call's number."""
        line, number = self._lines[worker], next(self._numbers)
        line.waiting.append((number, what))
        if len(line.waiting) == 1:
            line.advance()
        return number

    def answers(self, timeout: float) -> list[tuple[int, bytes | None]]:
        """What has been answered, or is in `timeout` seconds: a call's number, and the answer, None if it is lost."""
        lines = {line.connection: line for line in self._lines if line.connection is not None}
        there = wait([self._door, *lines], timeout)
        found: list[tuple[int, bytes | None]] = []
        for connection, line in lines.items():
            if connection in there:
                found += line.read(connection)
        if self._door in there:  # last: a worker that has come back hung up before
            self._let_in()
        return found

    def lose(self, worker: int) -> list[tuple[int, bytes | None]]:
        """All calls to a worker that does not come back, as `answers` gives them."""
        line = self._lines[worker]
        return [lost for _ in list(line.waiting) for lost in line.end(None)]

    def close(self) -> None:
        """Hang up: workers that listen then end their call."""
        for line in self._lines:
            if line.connection is not None:
                line.connection.close()
        self._door.close()
        self._folder.cleanup()

    def _let_in(self) -> None:
        arrived, _ = self._door.accept()
        connection = Connection(arrived.detach())
        with suppress(EOFError, OSError):  # else it is gone again
            line = self._lines[int(connection.recv_bytes())]
            line.connection = connection
            line.advance()
