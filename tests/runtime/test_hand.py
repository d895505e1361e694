"""The note of a worker: what its successor knows of clients that hang or end the process."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from meadow.client.answers import answer
from meadow.client.node import Node
from meadow.runtime.errors import Interrupted
from meadow.runtime.hand import Hand, costs_its_client, deadline, take
from meadow.strategies.wire.packing import Answer, Request

WORKER = """
import ctypes, os, sys, time
from pathlib import Path
from typing import cast
from meadow.runtime.hand import Hand, take
ends = {"exits": lambda: os._exit(0), "hangs": lambda: time.sleep(1000), "in C": lambda: ctypes.PyDLL(None).sleep(1000)}
with Hand(Path(sys.argv[1])).holding("message", 0.5):
    take(0)
    take(*map(int, sys.argv[3:]))
    ends[sys.argv[2]]()
"""


def dies(note: Path, how: str, *clients: int) -> None:
    """A worker that answers the message has client 0's turn behind it, and ends in the turn of these clients."""
    subprocess.run([sys.executable, "-c", WORKER, str(note), how, *map(str, clients)], check=False, timeout=60)


def past(note: Path, message: str = "message") -> tuple[Sequence[int], list[int], int]:
    """The deaths, the clients to leave out, and the deaths with no client in hand."""
    with Hand(note).holding(message, 60) as found:
        return found.deaths, [*found.lost], found.idle


@pytest.mark.parametrize("how", ["hangs", "in C"])
def test_a_client_that_hangs_is_left_out_at_once(how: str, tmp_path: Path) -> None:
    dies(tmp_path / "note", how, 7)
    with Hand(tmp_path / "note").holding("message", 60) as found:
        assert [*found.lost] == [7] and "cohort.timeout" in found.lost[7] and "line" in found.lost[7]
    assert [*tmp_path.iterdir()] == []


def test_the_line_where_it_hung_is_not_told_where_it_may_not_be(tmp_path: Path) -> None:
    dies(tmp_path / "note", "hangs", 7)
    with Hand(tmp_path / "note").holding("message", 60, tells=False) as found:
        assert "line" not in found.lost[7]


def test_a_client_is_left_out_after_two_deaths(tmp_path: Path) -> None:
    note = tmp_path / "note"
    for clients in ([7], [8], [7]):
        dies(note, "exits", *clients)
    assert past(note) == ([7, 8, 7], [7], 0)


def test_clients_that_were_in_hand_together_are_tried_one_by_one(tmp_path: Path) -> None:
    note = tmp_path / "note"
    dies(note, "hangs", 7, 8, 9)
    dies(note, "exits", 8)
    assert past(note) == ([7, 8, 9, 8], [8], 0)


def test_deaths_with_no_client_in_hand_are_counted(tmp_path: Path) -> None:
    dies(tmp_path / "note", "exits")
    dies(tmp_path / "note", "hangs")
    assert past(tmp_path / "note") == ([], [], 2)


@pytest.mark.parametrize("content", [None, "", "[", "{}\n[]\n", "[1]\n1\n"])
def test_another_message_or_a_damaged_note_says_nothing(content: str | None, tmp_path: Path) -> None:
    note = tmp_path / "note"
    if content is None:
        dies(note, "exits", 7)
    else:
        note.write_text(content)
    assert past(note, "another") == ([], [], 0)


def test_every_client_has_its_whole_time(tmp_path: Path) -> None:
    """The turns together take longer than one may; a turn of several clients may take longer."""
    note = tmp_path / "note"
    with Hand(note).holding("message", 3) as _:
        for turn in range(10):
            take(turn)
            assert 3 - 0.1 < deadline(note) - time.monotonic() <= 3.3
            time.sleep(0.4)
        take(*range(10))
        assert deadline(note) - time.monotonic() > 29
        take()
        assert deadline(note) - time.monotonic() <= 3.3
    assert deadline(note) == float("inf")


def test_an_interrupt_is_a_clients_own_unless_it_is_the_users(tmp_path: Path) -> None:
    take(3)  # nothing is noted
    assert costs_its_client(SystemExit()) and costs_its_client(OSError())
    assert not costs_its_client(KeyboardInterrupt())
    before = signal.signal(signal.SIGINT, lambda *_: None)  # as in the command, which raises its own
    try:
        assert costs_its_client(KeyboardInterrupt()) and not costs_its_client(Interrupted())
    finally:
        signal.signal(signal.SIGINT, before)
    with Hand(tmp_path / "note").holding("message", 60):
        assert costs_its_client(KeyboardInterrupt())


def test_nobody_is_in_hand_once_all_clients_have_answered(tmp_path: Path) -> None:
    """What a worker dies of afterwards is not blamed on the last client."""
    turns = list[list[int]]()

    def in_hand() -> list[int]:
        found: list[int] = json.loads((tmp_path / "note").read_text().split("\n")[1])[0]
        return found

    def answered(_: object, request: Request) -> Answer:
        turns.append(in_hand())
        return Answer(request.client)

    with Hand(tmp_path / "note").holding("message", 60):
        answer(cast(Node, None), [Request(client, {}, {}) for client in (3, 5)], answered)
        assert turns == [[3], [5]] and in_hand() == []
