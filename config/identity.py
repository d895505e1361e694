"""What runs here: a hash of Meadow's own code and the versions of the libraries that decide the bits."""

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the rooms: the checkout, or the app bundle that Flower unpacked."""

ROOMS = ("config", "tasks", "privacy", "strategies", "client", "server", "simulation", "experiments")


@functools.cache
def code_sha256() -> str:
    """SHA-256 over every Python and preset file of the rooms, with its path.

    Server and nodes compare it at roll call, because Flower may load an app from another folder than one thinks. Only
    the rooms that both sides execute count; the others need not be in an app bundle. Nor do C files, which Flower lets in
    no bundle: from there the loop in Python trains, and the roll call names what trains.
    """
    digest = hashlib.sha256()
    for room in ROOMS[:6]:
        for path in sorted(path for end in ("py", "toml") for path in (ROOT / room).rglob(f"*.{end}")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python, the machine's kind, and the installed libraries."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("flwr", "ray", "torch", "numpy", "scikit-learn", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
