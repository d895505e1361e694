"""Calls to the workers of this machine, over an authenticated connection each (`multiprocessing.connection`).

Ray starts the workers, and brings a killed one back. A call through Ray takes one and a half milliseconds there and as long
back; through a connection it takes a twentieth of one. What is large stays in shared memory (`meadow/arrays/memory.py`).
What passes is pickled, so both ends prove that they have the key before anything is read, and the socket lies in a folder
that is open to nobody but the user who runs the command.
"""

import itertools
import secrets
import socket
import tempfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

RETRIES = 2
"""Times that a call is given again to a worker that died of it; then it is lost."""


def connect(path: str, key: bytes, worker: int) -> "Connection":
    """A worker's connection to the command. Raises OSError if the command is gone, AuthenticationError on another key."""
    connection = Client(path, "AF_UNIX", authkey=key)
    connection.send_bytes(str(worker).encode())
    return connection


@dataclass
class _Worker:
    """The calls to one worker. It works on the first while it is connected; the others wait."""

    connection: Connection | None = None
    waiting: deque[tuple[int, bytes]] = field(default_factory=deque)
    deaths: int = 0
    """Of the first call."""

    def advance(self) -> None:
        """Send the call that is now the first."""
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


class Calls:
    """The command's side. Workers connect when they are up, and again when they have been brought back.

    path, key: what a worker needs for `connect`.
    """

    def __init__(self, workers: int) -> None:
        # Not under TMPDIR: the system takes no socket's path of more than 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="meadow-", dir="/tmp", ignore_cleanup_errors=True)
        self.path, self.key = str(Path(self._folder.name) / "calls"), secrets.token_bytes(32)
        self._listener = Listener(self.path, "AF_UNIX", backlog=workers, authkey=self.key)
        self._workers = [_Worker() for _ in range(workers)]
        self._numbers = itertools.count()
        listener: Any = self._listener
        self._door: socket.socket = listener._listener._socket
        """Readable when a worker wants to connect: a Listener itself cannot be waited for."""

    def call(self, worker: int, what: bytes) -> int:
        """Ask a worker, after all that it was asked before; the call's number."""
        its, number = self._workers[worker], next(self._numbers)
        its.waiting.append((number, what))
        if len(its.waiting) == 1:
            its.advance()
        return number

    def answers(self, timeout: float) -> list[tuple[int, bytes | None]]:
        """What has been answered, or is in `timeout` seconds: a call's number, and the answer, None if it is lost."""
        workers = {worker.connection: worker for worker in self._workers if worker.connection is not None}
        there = wait([self._door, *workers], timeout)
        found: list[tuple[int, bytes | None]] = []
        for connection, worker in workers.items():
            if connection in there:
                found += worker.read(connection)
        if self._door in there:  # last: a worker that has come back hung up before
            self._let_in()
        return found

    def lose(self, worker: int) -> list[tuple[int, bytes | None]]:
        """All calls to a worker that does not come back, as `answers` gives them."""
        its = self._workers[worker]
        return [lost for _ in list(its.waiting) for lost in its.end(None)]

    def close(self) -> None:
        """Hang up: workers that listen then end their call."""
        for worker in self._workers:
            if worker.connection is not None:
                worker.connection.close()
        self._listener.close()
        self._folder.cleanup()

    def _let_in(self) -> None:
        with suppress(EOFError, OSError, AuthenticationError):  # else it is gone again, or a stranger
            connection = self._listener.accept()
            worker = self._workers[int(connection.recv_bytes())]
            worker.connection = connection
            worker.advance()
