"""Crash-safe files: written under a temporary name, synced to disk, then renamed. Arrays are saved as safetensors.

A reader sees the whole old file or the whole new one. The safetensors metadata contain a SHA-256, which detects later
damage. Nothing is pickled.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from meadow.arrays.named import Arrays
from meadow.runtime.errors import RunStopped, UserError
from meadow.runtime.limits import read_file

_ZEROS = "0" * 64
"""Replaces the digest while it is computed."""

T = TypeVar("T", dict[str, Any], list[Any])


class DamagedFile(Exception):
    """A file is incomplete, modified, or of the wrong kind."""


def write_bytes(path: Path, content: bytes | bytearray, private: bool = False) -> None:
    """Write a file completely or not at all, even if the power fails: temporary name, sync, rename, sync the folder.

    private: only this user may read the file, and the folders that are made for it. Raises RunStopped if it cannot be
    written: the file is then as before.
    """
    with writing(path):
        make_folder(path.parent, private)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        mode = 0o600 if private else 0o666
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the block, RunStopped replaces an OSError: a full disk, a folder that was removed, a limit of size."""
    try:
        yield
    except OSError as error:
        of_several = isinstance(error, shutil.Error)  # it lists (from, to, reason) of each file
        reason = error.args[0][0][-1] if of_several else error.strerror or error
        raise RunStopped(
            f"{path} cannot be written ({reason}); everything before it is safe: when it can be written, "
            "continue with --resume"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the block no other process can lock the folder. The lock ends with the process, however it ends.

    Raises UserError if another process has it, or if the folder cannot be written. It is a `flock`: on NFS it holds
    between machines if the server offers locks (NFSv4, or NFSv3 with lockd).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--out {folder}: it cannot be written ({error.strerror}); choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"--out {folder}: {file.read().strip() or 'another process'} is running it; wait until it ends, or choose "
                "another folder"
            ) from None
        except OSError as error:  # a file system without locks
            raise UserError(f"--out {folder}: it cannot be locked ({error.strerror}); choose another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def make_folder(path: Path, private: bool) -> None:
    """Make a folder and those above it, if missing. private: only this user may enter those that are made."""
    for folder in reversed([path, *path.parents]):
        if not folder.exists():
            folder.mkdir(exist_ok=True, mode=0o700 if private else 0o777)


def write_json(path: Path, value: Any, private: bool = False) -> None:
    """Write a value as indented JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), private)


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file that contains a `kind`: dict, list. Raises DamagedFile if it is missing or contains anything else."""
    try:
        found = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: {error}") from None
    if not isinstance(found, kind):
        raise DamagedFile(f"{path}: a {kind.__name__} is expected, not a {type(found).__name__}")
    return found


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]], private: bool = False) -> None:
    """Write named arrays as safetensors. The metadata's `sha256` is computed with zeros in place of its 64 digits."""
    whole = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    content = bytearray(save(whole, metadata={"sha256": _ZEROS}))
    at = content.index(_ZEROS.encode())  # the metadata comes first
    content[at : at + 64] = hashlib.sha256(content).hexdigest().encode()
    write_bytes(path, content, private)


def read_arrays(path: Path) -> Arrays:
    """Read a file of `write_arrays`, or an older one whose last 32 bytes are the digest. Raises DamagedFile if it is
    missing, incomplete or modified."""
    try:
        content = read_file(path)
        end = 8 + int.from_bytes(content[:8], "little")
        expected = str(json.loads(content[8:end]).get("__metadata__", {}).get("sha256", ""))
        if expected:
            body, found = content, hashlib.sha256(content[:end].replace(expected.encode(), _ZEROS.encode(), 1))
            found.update(memoryview(content)[end:])
        else:
            body, expected = content[:-32], content[-32:].hex()
            found = hashlib.sha256(body)
        if found.hexdigest() != expected:
            raise DamagedFile(f"{path}: its content does not match its SHA-256")
        arrays: Arrays = load(body)
        return arrays
    except OSError as error:
        raise DamagedFile(f"{path}: {error}") from None
    except (SafetensorError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path}: its header cannot be read, so its SHA-256 cannot be checked: {error}") from None
