"""The ledger: what a client has released, on the client's side, written down before the release leaves.

One file a client and data set, append-only, one line of JSON an entry. Each entry holds the SHA-256 of the one before it, so
an edit shows; and the other side (the server's record) holds a `Mark`, the number of entries and the newest one's hash
as they were when it last heard of them, so a ledger that was cut, put back from a copy, or lost shows too. The rule that
makes it hold through every crash: an entry is on disk before its release can leave. What is recorded is then never
below what was released; it may be above by one release that never left.

    ledger = Ledger(folder, partition, data_sha256)
    charged = ledger.charge(release, budget, mark)     # on disk when this returns, or an exception
    noise = Stream(noise_seed(secret, charged.sha256))
    ...                                                # train, then let the release leave, with `charged.mark` beside it

A release that is asked for again, with the same inputs, is the same release: it is charged once, and as its noise is a
function of the client's secret and of the inputs, it has the same bits. With any other input it is another one.
"""

import fcntl
import hashlib
import hmac
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meadow.privacy.accounting import epsilon

_FIRST = "0" * 64


class LedgerFault(Exception):
    """The ledger is not the one that this client wrote: cut, edited, put back, or gone. The client must not train."""


class BudgetSpent(Exception):
    """The next release would pass the client's budget. Nothing was written and nothing may leave."""


@dataclass(frozen=True)
class Mark:
    """What the other side remembers of a ledger: how many entries, and the SHA-256 of the newest (zeros for none)."""

    entries: int = 0
    sha256: str = _FIRST


@dataclass(frozen=True)
class Release:
    """One thing that is about to leave. `parts`: (sample rate, noise multiplier, steps) of all that it is made of.

    `unit` is "example" or "local" (`meadow.privacy.accounting`; of a local release each part is (1, z / 2, 1)).
    `inputs` is the SHA-256 of everything that the release is a function of besides the data and the noise: the received
    arrays, the personal ones, the settings. Two releases with the same run, round, unit, parts and inputs are one.
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
    """Epsilon at delta that a client may spend in its life. `epsilon` may be infinity: charged, and never refused."""

    epsilon: float
    delta: float
    accountant: str = "pld"


@dataclass(frozen=True)
class Charged:
    """An entry that is on disk: the release's identity, what it brought epsilon to, and the mark to send with it."""

    sha256: str
    epsilon: float
    mark: Mark
    replayed: bool


_COUNTED = {"example": ("example", "local"), "local": ("local",)}
"""Which releases count towards the epsilon of a unit: what hides all of a client's data hides each of its examples as well;
DP-SGD hides no client, so it has no epsilon of that unit."""


class Disk:
    """How a ledger touches the disk: every write is one of these, so that a test can stop between any two."""

    def write(self, descriptor: int, content: bytes) -> None:
        """Append all of the content."""
        while content:
            content = content[os.write(descriptor, content) :]

    def sync(self, descriptor: int) -> None:
        """Return once what was written is on disk."""
        os.fsync(descriptor)

    def cut(self, descriptor: int, size: int) -> None:
        """Drop what lies beyond `size` bytes."""
        os.ftruncate(descriptor, size)


class Ledger:
    """The ledger of one client (by its partition) over one data set (by the SHA-256 that is its identity)."""

    def __init__(self, folder: Path, partition: int, data_sha256: str, disk: Disk | None = None) -> None:
        self.path = folder / f"client-{partition}-{data_sha256[:16]}.ledger"
        self._head = {"client": partition, "data": data_sha256, "format": 1}
        self._disk = disk or Disk()

    def history(self, unit: str, mark: Mark | None = None, before: str = "") -> tuple[tuple[float, float, int], ...]:
        """All parts that count towards a unit (an example: also local ones), in order. Raises LedgerFault as `charge`.

        `before`: only those from before the first entry of that run, which is what its noise is calibrated with.
        """
        entries = self._read(mark)[0]
        first = next((i for i, entry in enumerate(entries) if before and entry.get("run") == before), len(entries))
        return _history(entries[:first], unit)

    def mark(self) -> Mark:
        """The mark of the ledger as it is on disk. Raises LedgerFault as `charge`."""
        return _mark(self._read(None)[0])

    def charge(self, release: Release, budget: Budget, mark: Mark | None) -> Charged:
        """Write the release down before it leaves, or find it written down. On return it is on disk.

        `mark` is what the other side holds; None if it has never heard of this client and data. The ledger may be ahead
        of it, by releases whose reply was lost, and never behind. A line that a crash cut short is dropped: its release
        never left. One process at a time: another one waits.

        Raises LedgerFault if the ledger is missing, shorter than its mark, edited or another one's; BudgetSpent if
        epsilon of all that counts towards this unit, with this release, would pass the budget. A release that is
        there already is never refused for the budget.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            entries, whole = self._read(mark)
            identity = hashlib.sha256(_canonical(self._head | _described(release))).hexdigest()
            for number, entry in enumerate(entries):
                if entry.get("release") == identity:
                    self._disk.sync(descriptor)  # the writer may have died between its write and its sync
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
            lines.append(
                _chained(
                    _described(release)
                    | {
                        "release": identity,
                        "epsilon": cost if math.isfinite(cost) else "inf",
                        "delta": budget.delta,
                        "accountant": budget.accountant,
                    },
                    entries[-1]["sha256"],
                )
            )
            self._disk.write(descriptor, b"".join(_canonical(line) + b"\n" for line in lines))
            self._disk.sync(descriptor)
            if len(lines) > 1:
                self._sync_folder()
            return Charged(identity, cost, _mark([*entries, lines[-1]]), False)
        finally:
            os.close(descriptor)  # and with it the lock

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            self._disk.sync(folder)
        finally:
            os.close(folder)

    def _read(self, mark: Mark | None) -> tuple[list[dict[str, Any]], int]:
        """All entries, the head first, and the bytes that they take; checked against each other and the mark."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        entries: list[dict[str, Any]] = []
        before = _FIRST
        for number, line in enumerate(content[:whole].splitlines()):
            try:
                entry = json.loads(line)
                body = {key: value for key, value in entry.items() if key != "sha256"}
                good = entry["before"] == before and entry == _chained(_without(body), before)
            except (ValueError, KeyError, AttributeError, TypeError):
                good = False
            if not good:
                raise LedgerFault(f"{self.path}: entry {number} was changed or is damaged; this client does not train")
            entries.append(entry)
            before = entry["sha256"]
        if entries and {key: entries[0].get(key) for key in self._head} != self._head:
            raise LedgerFault(f"{self.path}: it is the ledger of another client or of other data")
        if mark is not None and mark.entries:
            here = _mark(entries)
            if here.entries < mark.entries:
                raise LedgerFault(
                    f"{self.path}: it has {here.entries} entries, and the server knows of {mark.entries}: it was cut, put "
                    "back from an older copy, or lost; this client does not train"
                )
            if entries[mark.entries]["sha256"] != mark.sha256:
                raise LedgerFault(
                    f"{self.path}: entry {mark.entries} is not the one that the server knows of: it was written anew; this "
                    "client does not train"
                )
        return entries, whole


def secret(folder: Path) -> bytes:
    """The client's own secret, 32 bytes, made by the operating system at the first call and kept, for its owner alone.

    For a deployment. A simulation derives its secrets from the experiment's seed (`simulated_secret`), so that runs
    repeat, and such noise protects nobody. Raises LedgerFault if the file is damaged: another secret would give a
    replayed release fresh noise.
    """
    path = folder / "secret"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_name(f".secret.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, os.urandom(32))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(temporary, path)  # never over one that another process has just made
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        folder_descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(folder_descriptor)
        finally:
            os.close(folder_descriptor)
    content = path.read_bytes()
    if len(content) != 32:
        raise LedgerFault(f"{path}: it holds {len(content)} bytes, not 32; this client does not train")
    return content


def simulated_secret(seed: int, client: int) -> bytes:
    """A client's stand-in for a secret, 32 bytes, from the experiment's seed: whoever has the file can repeat the noise."""
    return hashlib.sha256(f"meadow simulated secret:{seed}:{client}".encode()).digest()


def noise_seed(own_secret: bytes, release_sha256: str, purpose: str = "noise") -> int:
    """A seed of 256 bits for one release: HMAC-SHA256 of its identity under the client's secret.

    Without the secret it cannot be told from a random number, and no two releases share one. `purpose` separates streams
    of one release, such as the sampling of examples and the noise.
    """
    digest = hmac.new(own_secret, f"{purpose}:{release_sha256}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest, "little")


def _described(release: Release) -> dict[str, Any]:
    return {
        "run": release.run,
        "round": release.round,
        "unit": release.unit,
        "parts": [[float(q), float(sigma), int(steps)] for q, sigma, steps in release.parts],
        "inputs": release.inputs,
    }


def _chained(body: Mapping[str, Any], before: str) -> dict[str, Any]:
    """The body as an entry that follows the one with the hash `before`."""
    linked = dict(body) | {"before": before}
    return linked | {"sha256": hashlib.sha256(before.encode() + _canonical(linked)).hexdigest()}


def _without(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != "before"}


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _mark(entries: Sequence[Mapping[str, Any]]) -> Mark:
    """The head counts for nothing: a ledger that was only begun has a mark of no entries."""
    return Mark(len(entries) - 1, entries[-1]["sha256"]) if len(entries) > 1 else Mark()


def _history(entries: Sequence[Mapping[str, Any]], unit: str) -> tuple[tuple[float, float, int], ...]:
    counted = _COUNTED[unit]
    return tuple((q, s, n) for entry in entries if entry.get("unit") in counted for q, s, n in entry["parts"])
