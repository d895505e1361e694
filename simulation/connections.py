"""Calls to the workers of this machine, each over its own authenticated connection (`multiprocessing.connection`).

Ray starts the workers and restarts killed ones. A call through Ray takes 1.5 ms each way, through a connection 0.05 ms.
Large data stays in shared memory (`meadow/arrays/memory.py`). Messages are pickled, so both ends must prove that they have
the key before anything is read, and only the user who runs the command can open the socket's folder.
"""

import itertools
import os
import secrets
import signal
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from meadow.runtime.hand import deadline
from meadow.simulation.scratch import Scratch

RETRIES = 2
"""How often a call is repeated after its worker died without any news in its note; then the call is lost."""

_GRACE = 10.0
"""Seconds after a worker's own deadline until it is killed."""


def connect(path: str, key: bytes, worker: int) -> "Connection":
    """A worker's connection to the command. Raises OSError if the command is gone, AuthenticationError for a wrong key."""
    connection = Client(path, "AF_UNIX", authkey=key)
    connection.send_bytes(f"{worker} {os.getpid()}".encode())
    return connection


def note_of(path: str, worker: int) -> Path:
    """The file in which a worker notes what it has in hand (`meadow.runtime.hand`)."""
    return Path(path).with_name(f"hand-{worker}")


@dataclass
class _Worker:
    """The calls to one worker. While connected, it works on the first one; the others wait. note: see `note_of`."""

    note: Path
    connection: Connection | None = None
    process: int = 0
    waiting: deque[tuple[int, bytes]] = field(default_factory=deque)
    deaths: int = 0
    """How often the worker died during the first call since there was news in its note."""
    noted: bytes = b""
    overdue: float = 0.0
    """The last deadline that it missed."""

    def advance(self) -> None:
        """Send the first call."""
        if self.connection is not None and self.waiting:
            with suppress(OSError):  # reading the answer detects that the worker is gone
                self.connection.send_bytes(self.waiting[0][1])

    def read(self, connection: Connection) -> list[tuple[int, bytes | None]]:
        """The finished call: its number and answer, None if it is lost. Empty if the worker may still come back."""
        try:
            answer = connection.recv_bytes()
        except (EOFError, OSError):
            connection.close()
            self.connection = None
            before, self.noted = self.noted, self.note.read_bytes() if self.note.exists() else b""
            self.deaths = (self.deaths if self.noted == before else 0) + bool(self.waiting)
            return self.end(None) if self.deaths > RETRIES else []
        found = self.end(answer)
        self.advance()
        return found

    def kill(self) -> None:
        """Kill the worker; Ray starts it again."""
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)

    def end(self, answer: bytes | None) -> list[tuple[int, bytes | None]]:
        """Finish the first call, with its answer or None if it is lost."""
        self.deaths, self.noted = 0, b""
        return [(self.waiting.popleft()[0], answer)]


class Calls:
    """The command's side. Workers connect when they start and again after a restart.

    path, key: the arguments of `connect`.
    """

    def __init__(self, workers: int) -> None:
        self._folder = Scratch()
        self.path, self.key = str(self._folder.path / "calls"), secrets.token_bytes(32)
        self._listener = Listener(self.path, "AF_UNIX", backlog=workers, authkey=self.key)
        self._workers = [_Worker(note_of(self.path, number)) for number in range(workers)]
        self._numbers = itertools.count()
        listener: Any = self._listener
        self._socket: socket.socket = listener._listener._socket
        """Readable when a worker wants to connect; `wait` does not accept the Listener itself."""

    def call(self, worker: int, what: bytes) -> int:
        """Queue a call to a worker; return the call's number."""
        number, queue = next(self._numbers), self._workers[worker]
        queue.waiting.append((number, what))
        if len(queue.waiting) == 1:
            queue.advance()
        return number

    def answers(self, timeout: float) -> list[tuple[int, bytes | None]]:
        """Wait up to `timeout` seconds for finished calls: each one's number and answer, None if it is lost."""
        workers = {worker.connection: worker for worker in self._workers if worker.connection is not None}
        ready = wait([self._socket, *workers], timeout)
        found: list[tuple[int, bytes | None]] = []
        for connection, worker in workers.items():
            if connection in ready:
                found += worker.read(connection)
        if self._socket in ready:  # last: a restarted worker's old connection closed before
            self._accept()
        return found

    def fail(self, worker: int) -> list[tuple[int, bytes | None]]:
        """Mark all calls to a worker that will not come back as lost; return them as `answers` does."""
        queue = self._workers[worker]
        return [lost for _ in list(queue.waiting) for lost in queue.end(None)]

    def drop(self, number: int) -> None:
        """Forget a call, and kill its worker."""
        for worker in self._workers:
            kept = deque(call for call in worker.waiting if call[0] != number)
            if len(kept) < len(worker.waiting):
                worker.waiting, worker.deaths, worker.noted = kept, 0, b""
                if worker.connection is not None:  # it may still answer
                    worker.connection.close()
                    worker.connection = None
                    worker.kill()

    def kill_frozen(self) -> None:
        """Kill workers that should have ended themselves a while ago: something stopped the whole process."""
        for worker in self._workers:
            ends = deadline(worker.note)
            if worker.connection is not None and time.monotonic() > ends + _GRACE and ends != worker.overdue:
                worker.overdue = ends
                worker.kill()

    def close(self) -> None:
        """Close all connections; the workers then stop serving."""
        for worker in self._workers:
            if worker.connection is not None:
                worker.connection.close()
        self._listener.close()
        self._folder.remove()

    def _accept(self) -> None:
        with suppress(EOFError, OSError, AuthenticationError):  # the worker is gone again, or a stranger connected
            connection = self._listener.accept()
            number, process = map(int, connection.recv_bytes().split())
            worker = self._workers[number]
            worker.connection, worker.process = connection, process
            worker.advance()
