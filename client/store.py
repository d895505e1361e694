"""Clients' personal states by run, client and round, on disk or in shared memory. They never travel.

Flower's `Context.state` is lost when a SuperNode restarts, so states are files, each written before the reply leaves. A
resumed server may return to any checkpoint that it still has, and its clients must then start from their states of that
round; so states newer than the server's oldest checkpoint are kept.

Writing a state to disk can take longer than training a small client. A simulation may therefore keep states in files in
shared memory (`engine.state_memory`). They survive the end of any process and move to disk when the run ends; only a
restart of the machine loses them. A mark on disk records that they are there. States that do not fit go to disk.
(Segments of `meadow/arrays/memory.py` would not do: they end with the command that made them, so a killed run would lose its
clients.)
"""

import logging
import os
import shutil
import time
import zlib
from collections.abc import Collection, Container
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meadow.arrays.codec import DamagedArrays, decode, encode
from meadow.arrays.files import DamagedFile, read_arrays, write_arrays, write_bytes
from meadow.arrays.named import Arrays
from meadow.strategies.wire.states import Known

log = logging.getLogger("meadow.client")

SHARED_MEMORY = Path("/dev/shm")
_PATTERN = "round-*.safetensors"
_MARK = "in-memory"
_CHECKSUM = 4
_FRESH = 600.0
"""Seconds that may pass between the mark in memory and the mark in the run's folder."""

Key = tuple[int, int]
"""Round and attempt that made a state."""

_NOTHING = Known()


class LostState(DamagedFile):
    """A client's state is damaged or gone: to continue would silently forget what the client learned."""


@dataclass
class Store:
    """State files of one run below `root`: the base arrays, and each client's personal arrays.

    `memory`: bytes of states that this process may keep in `shared` memory; 0: all go to disk.
    """

    root: Path
    run: str
    memory: int = 0
    shared: Path = SHARED_MEMORY
    _used: int = field(default=0, repr=False)
    _marked: bool = field(default=False, repr=False)

    def put_base(self, arrays: Arrays) -> None:
        """Store the arrays that every client starts from."""
        write_arrays(self._folder / "base.safetensors", arrays, private=True)

    def base(self) -> Arrays:
        """The arrays of `put_base`. Raises DamagedFile if this node never joined the run."""
        return read_arrays(self._folder / "base.safetensors")

    def load(self, client: int, before: int, void: Collection[str] = (), known: Known = _NOTHING) -> Arrays:
        """The client's newest arrays from a round before `before`; empty if there are none.

        `void`: discarded attempts at rounds, "ROUND.ATTEMPT"; their states are ignored, and so is the state of an attempt
        later than the one that counted (the server was stopped in it and began the round again). `known`: what the server
        knows of the client's states. Raises LostState if the file is damaged, or if the server knows of a newer one.
        """
        try:
            return self._load(client, before, void, known)
        except (OSError, DamagedFile) as error:
            raise LostState(str(error)) from None

    def _load(self, client: int, before: int, void: Collection[str], known: Known) -> Arrays:
        files = self._files(client)
        kept = [key for key in sorted(files) if known.forgotten < key[0] < before and _counts(key, void)]
        if known.newest > max((round_ for round_, _ in kept), default=0):
            mark, there = self._folder / _MARK, (self._in_memory / _MARK).exists()
            raise DamagedFile(
                f"{self._on_disk(client)}: its state of round {known.newest} is gone"
                + ("; it was in shared memory (engine.state_memory)" if mark.exists() and not there else "")
            )
        if not kept:
            return {}
        path = files[kept[-1]]
        return read_arrays(path) if path.is_relative_to(self._folder) else _read(path)

    def save(
        self,
        client: int,
        round_: int,
        arrays: Arrays,
        keep_from: int,
        attempt: int = 1,
        void: Collection[str] = (),
    ) -> None:
        """Store the state after `round_`, and delete the states that no server can return to.

        `keep_from`: the round of the server's oldest checkpoint. The newest state up to that round is kept as well.
        """
        files, key = self._files(client), (round_, attempt)
        past = sorted(k for k in {*files, key} if k[0] <= keep_from)
        counting = [k for k in past if _counts(k, void)]
        gone = [files.pop(k) for k in past if k not in counting[-1:] and k in files]
        spare = next((path for path in gone if not path.is_relative_to(self._folder)), None)
        size = sum(value.nbytes for value in arrays.values())
        freed = spare.stat().st_size if spare else 0
        on_disk, in_memory = self._on_disk(client) / _name(key), self._in_memory / str(client) / _name(key)
        if self.memory and self._used - freed + size <= self.memory and self._mark():
            self._used += _write(in_memory, arrays, spare) - freed
            on_disk.unlink(missing_ok=True)
            gone = [path for path in gone if path != spare]
        else:
            write_arrays(on_disk, arrays, private=True)
            if self._marked:
                in_memory.unlink(missing_ok=True)
        for path in gone:
            self._used -= 0 if path.is_relative_to(self._folder) else path.stat().st_size
            path.unlink()

    def settle(self, clients: Container[int]) -> None:
        """Move the clients' states from memory to disk, at the end of the run."""
        for folder in _clients_in(self._in_memory):
            if int(folder.name) not in clients:
                continue
            for path in sorted(folder.glob(_PATTERN)):
                try:
                    arrays = _read(path)
                except DamagedFile as error:  # if it is the newest, the client's evaluation has told the server
                    log.warning("a state is lost: %s", error)
                else:
                    write_arrays(self._on_disk(int(folder.name)) / path.name, arrays, private=True)
            shutil.rmtree(folder)
        if self._in_memory.exists() and not _clients_in(self._in_memory):  # no other node has states left here
            (self._folder / _MARK).unlink(missing_ok=True)
            shutil.rmtree(self._in_memory, ignore_errors=True)
            self._used, self._marked = 0, False

    @property
    def _folder(self) -> Path:
        return self.root / self.run

    def _on_disk(self, client: int) -> Path:
        return self._folder / "clients" / str(client)

    @property
    def _in_memory(self) -> Path:
        return self.shared / f"meadow-{os.getuid()}" / self.run

    def _files(self, client: int) -> dict[Key, Path]:
        """The client's state files, on disk and in memory. A state in both places is complete and equal in both."""
        self._check()
        places = [self._on_disk(client)]
        if self._marked:
            places.append(self._in_memory / str(client))
        return {_key(path): path for place in places for path in place.glob(_PATTERN)}

    def _mark(self) -> bool:
        """Mark on disk that states are in memory, before the first one is. False if another user owns that memory."""
        if self._marked:
            return True
        place = self._in_memory.parent
        place.mkdir(exist_ok=True, mode=0o700)
        if place.stat().st_uid != os.getuid():
            return False
        _tidy(place)
        self._in_memory.mkdir(exist_ok=True, mode=0o700)
        (self._in_memory / _MARK).write_text(str(self._folder.resolve()))
        write_bytes(self._folder / _MARK, str(self._in_memory).encode(), private=True)
        self._adopt()
        return True

    def _check(self) -> None:
        if not self._marked and (self._folder / _MARK).exists() and (self._in_memory / _MARK).exists():
            self._adopt()

    def _adopt(self) -> None:
        """Count the states already in memory towards the limit, including those of other nodes."""
        self._marked = True
        self._used = sum(path.stat().st_size for c in _clients_in(self._in_memory) for path in c.glob(_PATTERN))


def _clients_in(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name.isdecimal()] if place.exists() else []


def _tidy(place: Path) -> None:
    """Free the memory of runs whose folders are gone."""
    for run in place.iterdir():
        mark = run / _MARK
        if (
            mark.exists()
            and time.time() - mark.stat().st_mtime > _FRESH
            and not (Path(mark.read_text()) / _MARK).exists()
        ):
            shutil.rmtree(run, ignore_errors=True)


def _name(key: Key) -> str:
    again = f"-{key[1]}" if key[1] > 1 else ""
    return f"round-{key[0]:08d}{again}.safetensors"


def _key(path: Path) -> Key:
    round_, _, attempt = path.stem.removeprefix("round-").partition("-")
    return int(round_), int(attempt or 1)


def _write(path: Path, arrays: Arrays, spare: Path | None) -> int:
    """Write arrays and their CRC-32 to a file in shared memory, atomically, and return its size in bytes.

    `spare`: an obsolete file whose memory is reused, which is five times as fast as new memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if spare is not None:
        spare.replace(temporary)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        total = checksum = 0
        parts = encode(arrays)
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        for part in (*parts, checksum.to_bytes(_CHECKSUM, "little")):
            view = memoryview(part)
            while len(view):
                written = os.write(descriptor, view)
                view, total = view[written:], total + written
        os.ftruncate(descriptor, total)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    return total


def _read(path: Path) -> Arrays:
    """Read a file of `_write`. Raises DamagedFile if it cannot be read."""
    try:
        content = np.fromfile(path, np.uint8).data
        if zlib.crc32(content[:-_CHECKSUM]) != int.from_bytes(content[-_CHECKSUM:], "little"):
            raise DamagedArrays("its content does not match its checksum")
        return decode(content[:-_CHECKSUM])
    except (OSError, DamagedArrays) as error:
        raise DamagedFile(f"{path}: {error}") from None


def _counts(key: Key, void: Collection[str]) -> bool:
    """Whether this attempt at its round is the one that counted: the first after the discarded ones."""
    round_, attempt = key
    return attempt == 1 + sum(entry.startswith(f"{round_}.") for entry in void)
