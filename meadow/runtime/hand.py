"""The clients that a worker has in hand, noted in a file that outlives the worker.

A client's code may hang, or end the whole process. The worker that is started in its place reads the note, so it knows which
client that was: it leaves out this client alone and answers the others. A worker ends itself if a client takes too long; the
clock that does this is in C, so it also runs while other compiled code holds Python's lock.
"""

import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

SLACK = 0.1
"""A client may take longer than its limit by this share of it: the clock is not set for each small client."""
DEATHS = 2
"""Workers that may die with the same client in hand; then it is left out."""


@dataclass
class Past:
    """What became of the workers that had the same message before.

    deaths: the clients in hand at each death. lost: the clients to leave out, with the reason. idle: how many workers died
    with no client in hand.
    """

    message: str
    deaths: list[int] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    idle: int = 0

    def add(self, clients: list[int], late: str) -> None:
        """Add a death. late: why and where it ended itself, "" if it did not."""
        self.deaths += clients
        self.idle += not clients
        if len(clients) == 1 and (late or self.deaths.count(clients[0]) >= DEATHS):
            died = (
                f"its worker died {DEATHS} times with it in hand: its code ends the process, or needs too much memory"
            )
            self.lost[clients[0]] = f"client {clients[0]}: {late or died}"


class Hand:
    """A worker's hand. note: a file that only this worker and those started in its place use."""

    def __init__(self, note: Path) -> None:
        self._note, self._trace = note, note.with_name(f"{note.name}.trace")

    @contextmanager
    def holding(self, message: str, limit: float, tells: bool = True) -> Iterator[Past]:
        """While the block answers a message, `take` notes whose turn it is, and a client may take `limit` seconds.

        tells: whether the reason for leaving a client out may name the line of code where it was.
        """
        global _open
        past = self._past(message, tells)
        with self._trace.open("w") as trace, self._note.open("wb", buffering=0) as note:
            note.write((json.dumps(asdict(past)) + "\n").encode())
            _open = _Open(note.fileno(), note.tell(), trace, limit)
            _open.take(())
            try:
                yield past
            finally:
                _open = None
                faulthandler.cancel_dump_traceback_later()
                for path in (self._trace, self._note):
                    path.unlink(missing_ok=True)

    def _past(self, message: str, tells: bool) -> Past:
        """What the note of a worker that died says, if it had the same message."""
        with suppress(OSError, ValueError, TypeError):
            head, hand, *_ = self._note.read_text().split("\n")
            past, (clients, limit, _) = Past(**json.loads(head)), json.loads(hand)
            if past.message == message:
                past.lost = {int(client): reason for client, reason in past.lost.items()}
                trace = self._trace.read_text().strip().splitlines()
                late = (
                    f"no answer within cohort.timeout = {limit:g} s, so its worker was started again" if trace else ""
                )
                past.add(clients, late + (_innermost(trace) if tells else ""))
                return past
        return Past(message)


def deadline(note: Path) -> float:
    """When the worker will end itself, by `time.monotonic`; infinity if it answers no message."""
    try:
        return float(json.loads(note.read_text().split("\n")[1])[2])
    except (OSError, ValueError, IndexError):
        return float("inf")


def take(*clients: int) -> None:
    """Note that it is the turn of these clients, or of none. Has an effect only in a worker that answers a message."""
    if _open is not None:
        _open.take(clients)


def costs_its_client(error: BaseException) -> bool:
    """Whether an exception costs only the client whose code raised it. In a worker every exception does. Elsewhere Ctrl-C
    must end the command. The command's handler raises `Interrupted` for it; where Python's own handler is installed, its
    KeyboardInterrupt cannot be told from a client's."""
    own = type(error) is KeyboardInterrupt and signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    return _open is not None or own or isinstance(error, Exception | SystemExit)


@dataclass
class _Open:
    """An open note. limit: seconds for each client."""

    file: int
    at: int
    trace: TextIO
    limit: float
    ends: float = 0.0
    """When the worker ends itself."""

    def take(self, clients: tuple[int, ...]) -> None:
        now, least = time.monotonic(), self.limit * max(1, len(clients))
        most = least * (1 + SLACK)
        if not now + least <= self.ends <= now + most:
            faulthandler.dump_traceback_later(most, exit=True, file=self.trace)
            self.ends = now + most
        os.pwrite(self.file, f"{json.dumps((clients, self.limit, self.ends))}\n".encode(), self.at)


def _innermost(trace: list[str]) -> str:
    """Where the main thread, the last one in faulthandler's trace, was."""
    threads = [number for number, line in enumerate(trace) if line.startswith("Thread")]
    return f"; it was in {trace[threads[-1] + 1].strip()}" if threads and threads[-1] + 1 < len(trace) else ""


_open: _Open | None = None
