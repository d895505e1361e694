"""Calls to workers: each is answered once, in its order; a worker that dies of one is given it again, twice at most."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError

import pytest

from meadow.simulation.connections import RETRIES, Calls, connect, note_of


@pytest.fixture
def calls() -> Iterator[Calls]:
    found = Calls(2)
    yield found
    found.close()


def worker(calls: Calls, number: int, work: Callable[[bytes], bytes]) -> None:
    """A worker as Ray keeps it: it comes back after each death (an exception) until the command hangs up."""

    def live() -> None:
        with suppress(OSError, EOFError):
            while True:
                with suppress(ZeroDivisionError), connect(calls.path, calls.key, number) as line:
                    while True:
                        line.send_bytes(work(line.recv_bytes()))

    threading.Thread(target=live, daemon=True).start()


def gather(calls: Calls, count: int) -> dict[int, bytes | None]:
    found: dict[int, bytes | None] = {}
    while len(found) < count:
        for number, answer in calls.answers(5):
            assert number not in found
            found[number] = answer
    return found


def test_calls_before_and_after_a_worker_connects_are_answered_in_order(calls: Calls) -> None:
    seen: list[bytes] = []

    def work(call: bytes) -> bytes:
        seen.append(call)
        return call * 2

    asked = {calls.call(1, bytes([i]) * 300_000): bytes([i]) * 600_000 for i in range(3)}
    worker(calls, 1, work)
    asked |= {calls.call(1, bytes([i])): bytes([i]) * 2 for i in range(3, 9)}
    assert gather(calls, 9) == asked
    later = {calls.call(1, bytes([i])): bytes([i]) * 2 for i in range(9, 12)}
    assert gather(calls, 3) == later
    assert [call[0] for call in seen] == list(range(12))


def test_a_worker_that_dies_of_a_call_gets_it_again_and_at_last_the_next(calls: Calls) -> None:
    """Every call has its own count of deaths; the other worker's calls are not touched."""
    lives = {b"never": 10**9, b"late": RETRIES, b"again": RETRIES, b"once": 1, b"fine": 0}

    def work(call: bytes) -> bytes:
        lives[call] -= 1
        if lives[call] >= 0:
            raise ZeroDivisionError
        return call

    worker(calls, 0, work)
    worker(calls, 1, lambda call: call)
    asked = {calls.call(0, call): call for call in (b"late", b"again", b"never", b"once", b"fine")}
    other = calls.call(1, b"other")
    expected: dict[int, bytes | None] = {n: None if call == b"never" else call for n, call in asked.items()}
    assert gather(calls, 6) == expected | {other: b"other"}
    assert lives[b"never"] == 10**9 - 1 - RETRIES


def test_a_worker_that_dies_with_news_in_its_note_each_time_gets_the_call_again(calls: Calls) -> None:
    lives = [10]

    def work(call: bytes) -> bytes:
        lives[0] -= 1
        note_of(calls.path, 0).write_text(str(lives[0]))
        if lives[0]:
            raise ZeroDivisionError
        return call

    worker(calls, 0, work)
    number = calls.call(0, b"x")
    assert gather(calls, 1) == {number: b"x"} and lives == [0]


def test_a_worker_that_does_not_end_itself_in_time_is_killed(calls: Calls) -> None:
    code = (
        "import os, signal, sys; from meadow.simulation.connections import connect;"
        "line = connect(sys.argv[1], bytes.fromhex(sys.argv[2]), 0); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, calls.path, calls.key.hex()])
    assert calls.answers(60) == []
    os.waitpid(process.pid, os.WUNTRACED)
    note_of(calls.path, 0).write_text("{}\n[[3], 1.0, 1e9]\n")
    calls.kill_frozen()
    assert process.poll() is None
    note_of(calls.path, 0).write_text("{}\n[[3], 1.0, 0.5]\n")
    calls.kill_frozen()
    assert process.wait() == -signal.SIGKILL


def test_a_call_that_is_dropped_is_not_answered_and_its_worker_killed(calls: Calls) -> None:
    code = (
        "import sys, time; from meadow.simulation.connections import connect;"
        "connect(sys.argv[1], bytes.fromhex(sys.argv[2]), 0).recv_bytes(); time.sleep(1000)"
    )
    first = calls.call(0, b"x")
    process = subprocess.Popen([sys.executable, "-c", code, calls.path, calls.key.hex()])
    assert calls.answers(60) == []
    calls.drop(first)
    assert process.wait() == -signal.SIGKILL
    worker(calls, 0, lambda call: call)
    number = calls.call(0, b"y")
    assert gather(calls, 1) == {number: b"y"}


def test_the_calls_of_a_worker_that_is_given_up_are_lost(calls: Calls) -> None:
    numbers = [calls.call(0, b"x"), calls.call(0, b"y")]
    other = calls.call(1, b"z")
    assert calls.fail(0) == [(number, None) for number in numbers]
    worker(calls, 1, lambda call: call)
    assert gather(calls, 1) == {other: b"z"}


def test_a_stranger_without_the_key_is_not_let_in(calls: Calls) -> None:
    asked = calls.call(0, b"x")
    worker(calls, 0, lambda call: call)
    stranger = threading.Thread(target=_refused, args=(calls.path,), daemon=True)
    stranger.start()
    assert gather(calls, 1) == {asked: b"x"}
    while stranger.is_alive():
        assert calls.answers(0.05) == []


def _refused(path: str) -> None:
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        connect(path, b"another key", 0)
