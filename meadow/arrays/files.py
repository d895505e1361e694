"""Files that survive a crash: written under a temporary name, synced to disk, then renamed. Arrays as safetensors.

Whoever reads such a file sees the whole old one or the whole new one, never a part. A file of arrays carries a SHA-256
of its content, so that damage that happened later is found when it is read. No pickle is ever written or read.
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

_DIGEST = 32


class DamagedFile(Exception):
    """A file is torn, was changed, or is not of the expected kind."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also if the power fails: temporary name, sync, rename, sync the folder."""
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
    """Write a value as indented JSON. NaN and infinity are refused, because JSON has none (ValueError)."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises DamagedFile if it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path}: {error}") from None


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Write named arrays as safetensors, with the SHA-256 of the whole beside it in the same file's last 32 bytes."""
    content = save({name: np.asarray(value, order="C") for name, value in arrays.items()})
    write_bytes(path, content + hashlib.sha256(content).digest())


def read_arrays(path: Path) -> Arrays:
    """Read what `write_arrays` wrote. Raises DamagedFile if it is missing, torn or changed."""
    try:
        content = path.read_bytes()
        body, digest = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(body).digest() != digest:
            raise DamagedFile(f"{path}: its content does not match its SHA-256")
        arrays: Arrays = load(body)
        return arrays
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedFile(f"{path}: {error}") from None
