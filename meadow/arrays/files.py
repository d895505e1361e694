"""Crash-safe files: written under a temporary name, synced to disk, then renamed. Arrays are saved as safetensors.

A reader sees the whole old file or the whole new one. The safetensors metadata contain a SHA-256, which detects later
damage. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from meadow.arrays.named import Arrays

_ZEROS = "0" * 64
"""Replaces the digest while it is computed."""


class DamagedFile(Exception):
    """A file is incomplete, modified, or of the wrong kind."""


def write_bytes(path: Path, content: bytes | bytearray) -> None:
    """Write a file completely or not at all, even if the power fails: temporary name, sync, rename, sync the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DamagedFile if it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path}: {error}") from None


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Write named arrays as safetensors. The metadata's `sha256` is computed with zeros in place of its 64 digits."""
    whole = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    content = bytearray(save(whole, metadata={"sha256": _ZEROS}))
    at = content.index(_ZEROS.encode())  # the metadata comes first
    content[at : at + 64] = hashlib.sha256(content).hexdigest().encode()
    write_bytes(path, content)


def read_arrays(path: Path) -> Arrays:
    """Read a file of `write_arrays`, or an older one whose last 32 bytes are the digest. Raises DamagedFile if it is
    missing, incomplete or modified."""
    try:
        content = path.read_bytes()
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
    except (SafetensorError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path}: its header cannot be read, so its SHA-256 cannot be checked: {error}") from None
