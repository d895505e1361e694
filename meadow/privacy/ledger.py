"""The ledger: a client's record of its releases, each written before it leaves.

Each client and data set has one append-only file with a line of JSON per entry. An entry has the SHA-256 of the one before
it, which detects edits. The other side (the server) remembers a `Mark`, the number of entries and the newest hash, which
detects a ledger that was cut, restored from a copy or lost. An entry is on disk before its release can leave, so after any
crash the ledger records all releases, and at most one that never left.

    ledger = Ledger(folder, partition, data_sha256)
    charged = ledger.charge(release, budget, mark)     # on disk when this returns
    noise = Stream(noise_seed(secret, charged.sha256))
    ...                                                # train, then send the release and `charged.mark`

A repeated request with the same inputs is the same release: it is charged once and has the same noise, a function of the
client's secret and the inputs. With any other input it is another release.
"""

import fcntl
import hashlib
import hmac
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meadow.arrays.files import make_folder
from meadow.privacy.accounting import epsilon

_FIRST = "0" * 64


class LedgerFault(Exception):
    """The ledger was cut, edited, replaced or lost, so the client must not train."""


class BudgetSpent(Exception):
    """The next release would exceed the client's budget. Nothing was written, and nothing may leave."""


@dataclass(frozen=True)
class Mark:
    """The state of a ledger that the server remembers: number of entries, and SHA-256 of the newest (zeros for none)."""

    entries: int = 0
    sha256: str = _FIRST


@dataclass(frozen=True)
class Release:
    """Something that is about to leave. `parts`: its history, (sample rate, noise multiplier, steps).

    `unit` is "example" or "local" (`meadow.privacy.accounting`; each part of a local release is (1, z / 2, 1)). `inputs`
    is the SHA-256 of everything that determines the release besides data and noise: received arrays, personal arrays,
    settings. Releases with equal fields are the same release.
    """

    run: str
    round: int
    unit: str
    parts: tuple[tuple[float, float, int], ...]
    inputs: str

    def __post_init__(self) -> None:
        if self.unit not in ("example", "local"):
            raise ValueError(f'Expected unit="example" or "local", not {self.unit!r}.')


@dataclass(frozen=True)
class Budget:
    """Epsilon at delta that a client may spend over all runs. With infinity it is charged and never refused."""

    epsilon: float
    delta: float
    accountant: str = "pld"


@dataclass(frozen=True)
class Charged:
    """A charged release, on disk: its SHA-256, the total epsilon after it, the mark to send, and whether it is old."""

    sha256: str
    epsilon: float
    mark: Mark
    replayed: bool


_COUNTED = {"example": ("example", "local"), "local": ("local",)}
"""The units of releases that count towards a unit's epsilon. Local DP protects single examples too; DP-SGD does not protect
a whole client."""


class Disk:
    """A ledger's operations on the disk, so that a test can interrupt between any two."""

    def write(self, descriptor: int, content: bytes) -> None:
        while content:
            content = content[os.write(descriptor, content) :]

    def sync(self, descriptor: int) -> None:
        """Return when all writes are on disk."""
        os.fsync(descriptor)

    def cut(self, descriptor: int, size: int) -> None:
        """Truncate the file to `size` bytes."""
        os.ftruncate(descriptor, size)


class Ledger:
    """The ledger of one client (by partition number) over one data set (by SHA-256)."""

    def __init__(self, folder: Path, partition: int, data_sha256: str, disk: Disk | None = None) -> None:
        self.path = folder / f"client-{partition}-{data_sha256[:16]}.ledger"
        self._head = {"client": partition, "data": data_sha256, "format": 1}
        self._disk = disk or Disk()

    def history(self, unit: str, mark: Mark | None = None, before: str = "") -> tuple[tuple[float, float, int], ...]:
        """All parts that count towards a unit (for "example" also local ones), in order. Raises LedgerFault as `charge`.

        `before`: a run; only entries earlier than its first one, with which its noise is calibrated.
        """
        entries = self._read(mark)[0]
        first = next((i for i, entry in enumerate(entries) if before and entry.get("run") == before), len(entries))
        return _history(entries[:first], unit)

    def mark(self) -> Mark:
        """The mark of the ledger on disk. Raises LedgerFault as `charge`."""
        return _mark(self._read(None)[0])

    def charge(self, release: Release, budget: Budget, mark: Mark | None) -> Charged:
        """Record the release, or find its record. On return the entry is on disk.

        `mark`: the server's; None if it does not know this client and data. The ledger may be ahead of it, by releases
        whose replies were lost, but not behind. A line that a crash cut short is dropped, as its release never left.
        Processes take turns, by a lock on the file.

        Raises LedgerFault if the ledger is missing, shorter than its mark, edited or another client's. Raises BudgetSpent
        if epsilon of everything that counts towards this unit, including this release, would exceed the budget; a
        repeated release is never refused.
        """
        make_folder(self.path.parent, private=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            entries, whole = self._read(mark)
            identity = hashlib.sha256(_canonical(self._head | _described(release))).hexdigest()
            for number, entry in enumerate(entries):
                if entry.get("release") == identity:
                    self._disk.sync(descriptor)  # the writer may have crashed before its sync
                    return Charged(identity, float(entry["epsilon"]), _mark(entries[: number + 1]), True)
            parts = [*_history(entries, release.unit), *release.parts]
            cost = epsilon(parts, budget.delta, budget.accountant)
            if cost > budget.epsilon:
                raise BudgetSpent(
                    f"round {release.round}: epsilon would be {cost:.4g} of a budget of {budget.epsilon:g} "
                    f"(delta = {budget.delta:g}, accountant: {budget.accountant})"
                )
            if whole < os.fstat(descriptor).st_size:
                self._disk.cut(descriptor, whole)
            lines = []
            if not entries:
                entries = [_chained(self._head, _FIRST)]
                lines.append(entries[0])
            body = _described(release) | {
                "release": identity,
                "epsilon": cost if math.isfinite(cost) else "inf",
                "delta": budget.delta,
                "accountant": budget.accountant,
            }
            lines.append(_chained(body, entries[-1]["sha256"]))
            self._disk.write(descriptor, b"".join(_canonical(line) + b"\n" for line in lines))
            self._disk.sync(descriptor)
            if len(lines) > 1:
                _sync_folder(self.path.parent, self._disk.sync)
            return Charged(identity, cost, _mark([*entries, lines[-1]]), False)
        finally:
            os.close(descriptor)  # releases the lock too

    def _read(self, mark: Mark | None) -> tuple[list[dict[str, Any]], int]:
        """All entries, the head first, and their size in bytes; checked against each other and the mark."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        entries: list[dict[str, Any]] = []
        before = _FIRST
        for number, line in enumerate(content[:whole].splitlines()):
            try:
                entry = json.loads(line)
                body = {key: value for key, value in entry.items() if key not in ("sha256", "before")}
                good = entry["before"] == before and entry == _chained(body, before)
            except (ValueError, KeyError, AttributeError, TypeError):
                good = False
            if not good:
                raise LedgerFault(
                    f"{self.path}: entry {number} was changed or is damaged, so this client does not train"
                )
            entries.append(entry)
            before = entry["sha256"]
        if entries and {key: entries[0].get(key) for key in self._head} != self._head:
            raise LedgerFault(f"{self.path}: this is the ledger of another client or of other data")
        if mark is not None and mark.entries:
            here = _mark(entries)
            if here.entries < mark.entries:
                raise LedgerFault(
                    f"{self.path}: it has {here.entries} entries, and the server knows of {mark.entries}: it was cut, put "
                    "back from an older copy, or lost, so this client does not train"
                )
            if entries[mark.entries]["sha256"] != mark.sha256:
                raise LedgerFault(
                    f"{self.path}: entry {mark.entries} differs from the one that the server knows: the ledger was "
                    "rewritten, so this client does not train"
                )
        return entries, whole


def secret(folder: Path) -> bytes:
    """The 32 secret bytes of a deployed client, drawn by the operating system at the first call and kept in a file.

    Raises LedgerFault if the file is damaged: another secret would give a repeated release new noise. A simulation uses
    `simulated_secret` instead.
    """
    path = folder / "secret"
    make_folder(folder, private=True)
    if not path.exists():
        temporary = path.with_name(f".secret.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, os.urandom(32))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(temporary, path)  # never replaces a secret that another process has just made
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        _sync_folder(folder, os.fsync)
    content = path.read_bytes()
    if len(content) != 32:
        raise LedgerFault(f"{path}: it has {len(content)} bytes, not 32, so this client does not train")
    return content


def simulated_secret(seed: int, client: int) -> bytes:
    """The 32 bytes in place of a secret in a simulation, derived from the seed so that runs repeat; they protect nothing."""
    return hashlib.sha256(f"meadow simulated secret:{seed}:{client}".encode()).digest()


def noise_seed(own_secret: bytes, release_sha256: str, purpose: str = "noise") -> int:
    """A 256-bit seed for one release: HMAC-SHA256 of its SHA-256 under the client's secret.

    Without the secret it looks random, and no two releases share a seed. `purpose` separates the streams of a release,
    such as sampling and noise.
    """
    digest = hmac.new(own_secret, f"{purpose}:{release_sha256}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest, "little")


def _sync_folder(folder: Path, sync: Callable[[int], None]) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _described(release: Release) -> dict[str, Any]:
    return {
        "run": release.run,
        "round": release.round,
        "unit": release.unit,
        "parts": [[float(q), float(sigma), int(steps)] for q, sigma, steps in release.parts],
        "inputs": release.inputs,
    }


def _chained(body: Mapping[str, Any], before: str) -> dict[str, Any]:
    """The body as an entry after the one with the hash `before`."""
    linked = dict(body) | {"before": before}
    return linked | {"sha256": hashlib.sha256(before.encode() + _canonical(linked)).hexdigest()}


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _mark(entries: Sequence[Mapping[str, Any]]) -> Mark:
    """The mark of these entries; the head does not count."""
    return Mark(len(entries) - 1, entries[-1]["sha256"]) if len(entries) > 1 else Mark()


def _history(entries: Sequence[Mapping[str, Any]], unit: str) -> tuple[tuple[float, float, int], ...]:
    counted = _COUNTED[unit]
    return tuple((q, s, n) for entry in entries if entry.get("unit") in counted for q, s, n in entry["parts"])
