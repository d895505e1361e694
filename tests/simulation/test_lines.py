"""Calls over sockets: each is answered once, in its order; a worker that dies of one is given it again, twice at most."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from meadow.simulation.lines import RETRIES, Lines, connect


@pytest.fixture
def lines() -> Iterator[Lines]:
    found = Lines(2)
    yield found
    found.close()


def worker(lines: Lines, number: int, work: Callable[[bytes], bytes]) -> None:
    """A worker as Ray keeps it: it comes back after each death (an exception) until the lines are closed."""

    def live() -> None:
        with suppress(OSError, EOFError):
            while True:
                with suppress(ZeroDivisionError), connect(lines.path, number) as line:
                    while True:
                        line.send_bytes(work(line.recv_bytes()))

    threading.Thread(target=live, daemon=True).start()


def gather(lines: Lines, count: int) -> dict[int, bytes | None]:
    found: dict[int, bytes | None] = {}
    while len(found) < count:
        for number, answer in lines.answers(5):
            assert number not in found
            found[number] = answer
    return found


def test_calls_before_and_after_a_worker_connects_are_answered_in_order(lines: Lines) -> None:
    seen: list[bytes] = []

    def work(call: bytes) -> bytes:
        seen.append(call)
        return call * 2

    asked = {lines.call(1, bytes([i]) * 300_000): bytes([i]) * 600_000 for i in range(3)}
    worker(lines, 1, work)
    asked |= {lines.call(1, bytes([i])): bytes([i]) * 2 for i in range(3, 9)}
    assert gather(lines, 9) == asked
    later = {lines.call(1, bytes([i])): bytes([i]) * 2 for i in range(9, 12)}
    assert gather(lines, 3) == later
    assert [call[0] for call in seen] == list(range(12))


def test_a_worker_that_dies_of_a_call_gets_it_again_and_at_last_the_next(lines: Lines) -> None:
    """Every call has its own count of deaths; the other worker's calls are not touched."""
    lives = {b"never": 10**9, b"late": RETRIES, b"again": RETRIES, b"once": 1, b"fine": 0}

    def work(call: bytes) -> bytes:
        lives[call] -= 1
        if lives[call] >= 0:
            raise ZeroDivisionError
        return call

    worker(lines, 0, work)
    worker(lines, 1, lambda call: call)
    asked = {lines.call(0, call): call for call in (b"late", b"again", b"never", b"once", b"fine")}
    other = lines.call(1, b"other")
    expected: dict[int, bytes | None] = {n: None if call == b"never" else call for n, call in asked.items()}
    assert gather(lines, 6) == expected | {other: b"other"}
    assert lives[b"never"] == 10**9 - 1 - RETRIES


def test_the_calls_of_a_worker_that_is_given_up_are_lost(lines: Lines) -> None:
    numbers = [lines.call(0, b"x"), lines.call(0, b"y")]
    other = lines.call(1, b"z")
    assert lines.lose(0) == [(number, None) for number in numbers]
    worker(lines, 1, lambda call: call)
    assert gather(lines, 1) == {other: b"z"}
