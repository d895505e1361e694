"""The identity of the running code: a hash of Meadow's code, and the versions of libraries that affect results."""

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that contains `meadow`: the checkout, the app bundle that Flower unpacked, or site-packages."""

ROOMS = ("runtime", "arrays", "native", "config", "tasks", "privacy", "strategies", "client", "server")
"""The packages that server and nodes both run; an app bundle needs no others."""


@functools.cache
def code_sha256() -> str:
    """SHA-256 over every Python and preset file of ROOMS, with its path below `meadow`.

    Server and nodes compare it at roll call, because Flower may load an app from an unexpected folder. C files are left
    out, since Flower does not allow them in a bundle; `meadow/native/sources.py` contains their hashes.
    """
    digest = hashlib.sha256()
    for room in ROOMS:
        folder = next(place for place in (ROOT / "meadow" / room, ROOT / room) if place.is_dir())
        for path in sorted(path for end in ("py", "toml") for path in folder.rglob(f"*.{end}")):
            digest.update(f"{room}/{path.relative_to(folder).as_posix()}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and the libraries, and the machine type."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("flwr", "ray", "torch", "numpy", "scikit-learn", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
