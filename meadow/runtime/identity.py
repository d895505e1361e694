"""What runs here: a hash of Meadow's own code and the versions of the libraries that decide the bits."""

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds `meadow`: the checkout, the app bundle that Flower unpacked, or where it is installed."""

ROOMS = ("runtime", "arrays", "native", "config", "tasks", "privacy", "strategies", "client", "server")
"""What server and nodes both run; the rooms above these need not be in an app bundle."""


@functools.cache
def code_sha256() -> str:
    """SHA-256 over every Python and preset file of ROOMS, with its path below `meadow`.

    Server and nodes compare it at roll call, because Flower may load an app from another folder than one thinks. C files
    do not count, since Flower lets none into a bundle: from there the loop in Python trains, and the roll call names what
    trains.
    """
    digest = hashlib.sha256()
    for room in ROOMS:
        folder = next(place for place in (ROOT / "meadow" / room, ROOT / room) if place.is_dir())
        for path in sorted(path for end in ("py", "toml") for path in folder.rglob(f"*.{end}")):
            digest.update(f"{room}/{path.relative_to(folder).as_posix()}".encode())
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
