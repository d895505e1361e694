"""The ledger: charged before it leaves, through every crash; cut, edited, put back or gone is seen; replays are one."""

import hashlib
import json
import math
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meadow.privacy.accounting import epsilon
from meadow.privacy.ledger import (
    Budget,
    BudgetSpent,
    Disk,
    Ledger,
    LedgerFault,
    Mark,
    Release,
    noise_seed,
    secret,
    simulated_secret,
)
from meadow.privacy.noise import Stream

DATA = hashlib.sha256(b"data").hexdigest()
PART = ((0.1, 1.0, 10),)
AMPLE = Budget(100.0, 1e-5)


def release(round_: int, inputs: str = "", parts: tuple[tuple[float, float, int], ...] = PART) -> Release:
    return Release("run", round_, "example", parts, inputs or f"inputs of {round_}")


def charged(folder: Path, rounds: int) -> tuple[Ledger, Mark]:
    ledger = Ledger(folder, 3, DATA)
    mark = Mark()
    for round_ in range(1, rounds + 1):
        mark = ledger.charge(release(round_), AMPLE, mark).mark
    return ledger, mark


def test_epsilon_is_that_of_everything_in_all_rounds(tmp_path: Path) -> None:
    ledger, mark = charged(tmp_path, 4)
    more = ((0.05, 1.5, 20),)
    last = ledger.charge(release(5, parts=more), AMPLE, mark)
    # FIELD: an engine made anew each round reports one round's epsilon.
    assert last.epsilon == pytest.approx(epsilon([(0.1, 1.0, 40), (0.05, 1.5, 20)], 1e-5), rel=1e-9)
    assert ledger.history("example") == (*PART * 4, *more)
    assert ledger.history("local") == ()
    assert last.mark == ledger.mark() == Mark(5, last.mark.sha256)
    entries = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert entries[0]["client"] == 3
    assert entries[0]["data"] == DATA
    assert [e["round"] for e in entries[1:]] == [1, 2, 3, 4, 5]
    assert [e["epsilon"] for e in entries[1:]] == sorted(e["epsilon"] for e in entries[1:])


def test_local_releases_count_towards_an_examples_epsilon_and_not_the_other_way(tmp_path: Path) -> None:
    """What is noised for the whole client has an example's epsilon too, by the same parts: both compose."""
    ledger, mark = charged(tmp_path, 2)
    local = Release("run", 3, "local", ((1.0, 2.0, 1),), "inputs")
    alone = ledger.charge(local, AMPLE, mark)
    assert alone.epsilon == pytest.approx(epsilon([(1.0, 2.0, 1)], 1e-5), rel=1e-9)
    last = ledger.charge(release(4), AMPLE, alone.mark)
    assert last.epsilon == pytest.approx(epsilon([(0.1, 1.0, 30), (1.0, 2.0, 1)], 1e-5), rel=1e-9)
    assert ledger.history("local") == ((1.0, 2.0, 1),)


def test_a_release_that_would_pass_the_budget_is_refused_and_not_written(tmp_path: Path) -> None:
    ledger, budget = Ledger(tmp_path, 0, DATA), Budget(epsilon([(0.1, 1.0, 20)], 1e-5), 1e-5)
    ledger.charge(release(1), budget, None)
    second = ledger.charge(release(2), budget, None)  # exactly the budget: not past it
    assert second.epsilon == budget.epsilon
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetSpent, match=r"round 3: epsilon would be .* of a budget of .*delta = 1e-05"):
        ledger.charge(release(3), budget, None)
    assert ledger.path.read_bytes() == before
    assert ledger.charge(
        release(2), Budget(0.1, 1e-5), None
    ).replayed  # it has left already: the same again costs nothing
    with pytest.raises(BudgetSpent):
        ledger.charge(release(4, parts=((0.1, 0.0, 1),)), AMPLE, None)  # no noise: infinity
    assert ledger.charge(release(5, parts=((0.1, 0.0, 1),)), Budget(math.inf, 1e-5), None).epsilon == math.inf
    assert ledger.mark().entries == 3


def test_a_replayed_round_is_one_release_with_one_noise(tmp_path: Path) -> None:
    ledger, mark = charged(tmp_path, 3)
    before = ledger.path.read_bytes()
    again = ledger.charge(release(2), AMPLE, mark)
    assert again.replayed
    assert again.mark.entries == 2
    assert ledger.path.read_bytes() == before
    own = simulated_secret(0, 3)
    first = Ledger(tmp_path, 3, DATA).charge(release(2), AMPLE, mark)
    assert noise_seed(own, first.sha256) == noise_seed(own, again.sha256)
    other = ledger.charge(release(2, inputs="another model was received"), AMPLE, mark)
    assert not other.replayed
    assert noise_seed(own, other.sha256) != noise_seed(own, again.sha256)


def test_noise_depends_on_secret_release_and_purpose() -> None:
    seeds = {
        noise_seed(simulated_secret(seed, client), identity, purpose)
        for seed in (0, 1)
        for client in (0, 1)
        for identity in ("a" * 64, "b" * 64)
        for purpose in ("noise", "sampling")
    }
    assert len(seeds) == 16  # FIELD: two clients with one seed draw one noise, and it cancels in the difference
    assert all(0 <= seed < 2**256 for seed in seeds) and max(seeds) >= 2**250
    draws = [Stream(seed).normal(4) for seed in seeds]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("[[0.1,1.0,10]]", "[[0.1,9.0,10]]", 1))


def dropped(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


def swapped(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))


def written_anew(path: Path) -> None:
    """A ledger of as many entries with a right chain, but cheaper ones."""
    path.unlink()
    ledger = Ledger(path.parent, 3, DATA)
    for round_ in range(1, 5):
        ledger.charge(release(round_, parts=((0.1, 50.0, 1),)), AMPLE, None)


def other_clients(path: Path) -> None:
    Ledger(path.parent, 4, DATA).charge(release(1), AMPLE, None)
    (path.parent / f"client-4-{DATA[:16]}.ledger").replace(path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "3 entries, and the server knows of 4"),
        (torn, "3 entries, and the server knows of 4"),
        (edited, "entry 1 was changed"),
        (dropped, "entry 2 was changed"),
        (swapped, "entry 1 was changed"),
        (written_anew, "the one that the server knows"),
        (other_clients, "of another client"),
        (Path.unlink, "0 entries, and the server knows of 4"),
        (lambda path: path.write_bytes(b""), "0 entries"),
        (lambda path: path.write_bytes(path.read_bytes() + b"{}\n"), "entry 5 was changed"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\xff\x00\n"), "entry 5 was changed"),
    ],
)
def test_a_ledger_that_is_not_what_was_written_is_a_fault(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    ledger, mark = charged(tmp_path, 4)
    harm(ledger.path)
    for attempt in (release(5), release(4)):  # not even a replay
        with pytest.raises(LedgerFault, match=words):
            ledger.charge(attempt, AMPLE, mark)


def test_a_ledger_put_back_from_a_copy_is_a_fault(tmp_path: Path) -> None:
    ledger, _ = charged(tmp_path, 2)
    copy = ledger.path.read_bytes()
    mark = ledger.charge(release(3), AMPLE, None).mark
    ledger.path.write_bytes(copy)
    with pytest.raises(LedgerFault, match="put back"):
        ledger.charge(release(4), AMPLE, mark)


def test_a_ledger_ahead_of_the_server_goes_on(tmp_path: Path) -> None:
    """The reply to round 3 was lost: the server's mark is that of round 2, and what was charged stays charged."""
    ledger, mark = charged(tmp_path, 2)
    ledger.charge(release(3), AMPLE, mark)
    assert ledger.charge(release(4), AMPLE, mark).epsilon == pytest.approx(epsilon([(0.1, 1.0, 40)], 1e-5), rel=1e-9)


class Killed(BaseException):
    """Stands for SIGKILL where the test wants to go on in the same process."""


class Dying(Disk):
    """Dies at its k-th point: before a write, at each third of it, after it, before and after a sync or a cut."""

    def __init__(self, point: int, die: Callable[[], None]) -> None:
        self.left, self.die = point, die

    def point(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.die()

    def write(self, descriptor: int, content: bytes) -> None:
        for at in range(3):
            self.point()
            super().write(descriptor, content[at * len(content) // 3 : (at + 1) * len(content) // 3])
        self.point()

    def sync(self, descriptor: int) -> None:
        self.point()
        super().sync(descriptor)
        self.point()

    def cut(self, descriptor: int, size: int) -> None:
        self.point()
        super().cut(descriptor, size)
        self.point()


ROUNDS = 4
TIGHT = Budget(epsilon([(0.1, 1.0, 30)], 1e-5), 1e-5)
"""Enough for three of the four rounds."""


def play(folder: Path, disk: Dying, out: Disk) -> int:
    """Rounds from the first that has not left, each charged and then let out; how many the budget refused."""
    ledger, own, refused = Ledger(folder, 3, DATA, disk), simulated_secret(0, 3), 0
    left = folder / "left"
    done = len(left.read_text().splitlines()) if left.exists() else 0
    for round_ in range(done + 1, ROUNDS + 1):
        disk.point()
        try:
            charge = ledger.charge(release(round_), TIGHT, None)
        except BudgetSpent:
            refused += 1
            continue
        disk.point()
        noise = Stream(noise_seed(own, charge.sha256)).normal(2)
        line = f"{charge.sha256} {noise.tolist()}\n".encode()
        descriptor = os.open(left, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        out.write(descriptor, line)
        os.close(descriptor)
        disk.point()
    return refused


def undisturbed(folder: Path) -> list[str]:
    assert play(folder, Dying(0, lambda: None), Disk()) == 1
    return (folder / "left").read_text().splitlines()


POINTS = 30


def test_the_points_cover_three_rounds_and_a_refusal(tmp_path: Path) -> None:
    disk = Dying(0, lambda: None)
    play(tmp_path, disk, Disk())
    assert -disk.left == POINTS


@pytest.mark.parametrize("point", range(1, POINTS + 1))
def test_killed_at_any_point_it_never_says_less_than_what_left(point: int, tmp_path: Path) -> None:
    """A real SIGKILL to a process of its own; then a second kill while it recovers; then it goes on to the end."""
    expected = undisturbed(tmp_path / "expected")
    folder = tmp_path / "killed"
    folder.mkdir()

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for at in (point, 3):
        child = os.fork()
        if child == 0:
            try:
                play(folder, Dying(at, kill), Disk())
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if at == point:
            assert os.WIFSIGNALED(status)
        ledger = Ledger(folder, 3, DATA)
        left = (folder / "left").read_text().splitlines() if (folder / "left").exists() else []
        recorded = ledger.history("example")
        assert len(recorded) >= len(left)
        assert epsilon(recorded, 1e-5) >= epsilon(list(PART) * len(left), 1e-5)
        assert epsilon(recorded, 1e-5) <= TIGHT.epsilon
    assert play(folder, Dying(0, lambda: None), Disk()) == 1
    assert (folder / "left").read_text().splitlines() == expected  # the same releases with the same noise, each once
    assert ledger.history("example") == PART * 3
    assert ledger.path.read_bytes() == Ledger(tmp_path / "expected", 3, DATA).path.read_bytes()


@pytest.mark.parametrize("keep", [1, 40, -1])
def test_a_torn_last_line_never_left_and_is_dropped(tmp_path: Path, keep: int) -> None:
    ledger, mark = charged(tmp_path, 2)
    two = ledger.path.read_bytes()
    ledger.charge(release(3), AMPLE, mark)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(two + whole[len(two) :][:keep])
    assert ledger.history("example") == PART * 2
    assert ledger.charge(release(3), AMPLE, mark).epsilon == pytest.approx(epsilon([(0.1, 1.0, 30)], 1e-5))
    assert ledger.path.read_bytes() == whole


def test_a_failed_sync_lets_nothing_leave(tmp_path: Path) -> None:
    class Full(Disk):
        def sync(self, descriptor: int) -> None:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        Ledger(tmp_path, 0, DATA, Full()).charge(release(1), AMPLE, None)


def test_two_processes_do_not_write_over_each_other(tmp_path: Path) -> None:
    children = []
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                for round_ in range(5):
                    Ledger(tmp_path, 3, DATA).charge(release(100 * child + round_), AMPLE, None)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert Ledger(tmp_path, 3, DATA).mark().entries == 15


def test_another_data_set_is_another_ledger(tmp_path: Path) -> None:
    charged(tmp_path, 2)
    other = Ledger(tmp_path, 3, hashlib.sha256(b"other data").hexdigest())
    assert other.charge(release(1), AMPLE, None).epsilon == pytest.approx(epsilon(PART, 1e-5))


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    first = secret(tmp_path / "a")
    assert len(first) == 32
    assert secret(tmp_path / "a") == first != secret(tmp_path / "b")
    assert stat.S_IMODE((tmp_path / "a" / "secret").stat().st_mode) == 0o600
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "secret"]
    (tmp_path / "a" / "secret").write_bytes(b"short")
    with pytest.raises(LedgerFault, match="5 bytes"):
        secret(tmp_path / "a")
    assert simulated_secret(1, 2) == simulated_secret(1, 2) != simulated_secret(1, 3)


def test_a_release_of_an_unknown_unit_is_named() -> None:
    with pytest.raises(ValueError, match="'client'"):
        Release("run", 1, "client", PART, "x")
