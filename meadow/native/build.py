"""Compiles the C files of this folder and loads the libraries.

`compiled` looks for a library that fits this processor

1. in `built/` next to the C files, where installation from source puts it (`setup.py`, `deploy/Dockerfile`);
2. in `~/.cache/meadow` (or `$XDG_CACHE_HOME/meadow`), where the first use puts it.

Otherwise it compiles one into the cache, with `cc` or `$CC` (GCC 12, Clang 15 or later). Without a compiler, callers
use NumPy or torch.

A library's name contains its target: exactly one processor (`native`), or a level of x86-64 (`portable`, for images).
The two may differ in the last bits of `fused.c`, where the processor may fuse multiplication and addition; the other
files give the same bits on every target.

Flower does not allow C files in an app bundle. Code that runs from a bundle loads the libraries of the installed
Meadow, or of the folder `$MEADOW_NATIVE`. They must be built from exactly the sources in SOURCES; server and nodes
compare a code hash that covers SOURCES. `MEADOW_NATIVE=off` turns compiled code off.
"""

import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from meadow.native.sources import SOURCES

POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64
"""Types of arguments of the C functions."""
BUILT = "built"
"""The folder, next to the C files, for the libraries of an installation."""
FLAGS = ("-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""None of them lets the compiler reorder sums."""
OWN_FLAGS = {
    # Without these two passes, which move loads between branches, compiling takes a quarter of the time.
    "fused.c": ("-fno-signed-zeros", "-fno-gcse", "-fno-gcse-after-reload"),
    "noise.c": ("-ffp-contract=off",),
    "pooling.c": (),
    "sums.c": ("-ffp-contract=off",),
}


class NotCompiled(Exception):
    """A C file has no library on this machine; the message says why."""


@dataclass(frozen=True)
class Target:
    """A type of processor. needs: the features that /proc/cpuinfo must list."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()


_V3 = frozenset(("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm", "aes"))
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "vaes"}
PORTABLE = (
    Target("x86-64-v4", ("-march=x86-64-v4", "-maes", "-mvaes", "-mprefer-vector-width=512"), _V4),
    Target("x86-64-v3", ("-march=x86-64-v3", "-maes"), _V3),
)


def compiled(file: str, folders: Iterable[Path] = ()) -> ctypes.CDLL:
    """Load the library of a C file, compiling it if necessary. Raises NotCompiled.

    folders: where to look for the C file and its library; default: here, then where Meadow is installed.
    """
    if os.environ.get("MEADOW_NATIVE") == "off":
        raise NotCompiled("MEADOW_NATIVE = off")
    source, cache = None, _cache()
    for folder in folders or _folders():
        source = source or _source(folder, file)
        for target in targets():
            for place in (folder / BUILT, cache):
                if (found := _loaded(place / library_name(file, target))) is not None:
                    return found
    if source is None:
        raise NotCompiled(f"{file} is neither next to the code nor in an installation of the same code")
    found = _loaded(build(source, cache, native()))
    if found is None:
        raise NotCompiled(f"{file} was compiled but cannot be loaded here")
    return found


def declared(file: str, functions: Mapping[str, tuple[Any, list[Any]]]) -> ctypes.CDLL:
    """`compiled`, with the result type and the argument types of these functions. Raises NotCompiled."""
    found = compiled(file)
    for name, (result, arguments) in functions.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def build(source: Path, folder: Path, target: Target) -> Path:
    """Compile a C file into a folder. Raises NotCompiled with the compiler's reason."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NotCompiled("there is no C compiler (cc)")
    library = folder / library_name(source.name, target)
    made = library.with_suffix(f".{os.getpid()}")
    flags = (*FLAGS, *OWN_FLAGS[source.name], *target.flags)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [compiler, *flags, "-o", str(made), str(source), "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [
                done.stderr.strip() or "no reason"
            ]
            raise NotCompiled(f"{source.name} does not compile here (GCC 12 or Clang is needed): {lines[0]}")
        with made.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())  # loaders ignore what follows a library
            file.flush()
            os.fsync(file.fileno())
        made.replace(library)  # several processes may compile it at once; each result is whole
    except OSError as error:
        raise NotCompiled(f"{source.name} cannot be compiled here: {error}") from error
    return library


def build_all(folder: Path, chosen: Iterable[Target]) -> list[str]:
    """Compile all C files for all targets into a folder; return the reasons of failures."""

    def one(job: tuple[str, Target]) -> str:
        try:
            build(Path(__file__).with_name(job[0]), folder, job[1])
        except NotCompiled as reason:
            return str(reason)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [reason for reason in pool.map(one, [(file, t) for t in chosen for file in SOURCES]) if reason]


def to_build(portable: bool) -> Sequence[Target]:
    """The targets of an installation: levels of x86-64 if it must be portable, else this processor."""
    return PORTABLE if portable and platform.machine().lower() in ("x86_64", "amd64") else [native()]


def targets() -> Iterator[Target]:
    """The targets that this processor can run, best first."""
    yield native()
    have = _features()
    yield from (target for target in PORTABLE if target.needs <= have)


@functools.cache
def native() -> Target:
    """This processor only. Its name is a hash of the features that `-march=native` uses."""
    return Target(f"native-{hashlib.sha256(_processor().encode()).hexdigest()[:12]}", ("-march=native",))


def library_name(file: str, target: Target) -> str:
    """The file name of a library; it changes with source, flags and processor."""
    key = hashlib.sha256(repr((SOURCES[file], FLAGS, OWN_FLAGS[file], target.flags)).encode()).hexdigest()[:16]
    return f"{Path(file).stem}-{target.name}-{key}.so"


def _loaded(library: Path) -> ctypes.CDLL | None:
    """Load a library, or return None if it does not exist, was damaged, or needs a newer C library.

    A damaged library would end the process at its first call, so its last 32 bytes are the SHA-256 of the others.
    """
    try:
        content = library.read_bytes()
        return ctypes.CDLL(str(library)) if hashlib.sha256(content[:-32]).digest() == content[-32:] else None
    except OSError:
        return None


def _source(folder: Path, file: str) -> Path | None:
    """The C file in a folder, if its hash is that in SOURCES."""
    path = folder / file
    try:
        return path if hashlib.sha256(path.read_bytes()).hexdigest() == SOURCES[file] else None
    except OSError:
        return None


def _folders() -> Iterator[Path]:
    """Folders that may contain C files and libraries: here, `$MEADOW_NATIVE`, and where Meadow is installed."""
    yield Path(__file__).parent
    if given := os.environ.get("MEADOW_NATIVE"):
        yield Path(given)
    try:
        installed = metadata.distribution("meadow")
    except metadata.PackageNotFoundError:
        return
    yield Path(str(installed.locate_file("meadow/native")))
    url = str(json.loads(installed.read_text("direct_url.json") or "{}").get("url", ""))
    if url.startswith("file://"):  # an editable installation
        yield Path(url.removeprefix("file://")) / "meadow" / "native"


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meadow"
    except RuntimeError as error:
        raise NotCompiled(f"there is no home folder: {error}") from error


@functools.cache
def _processor() -> str:
    """The lines of /proc/cpuinfo that `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))


def _features() -> set[str]:
    return {word for line in _processor().splitlines() if line.startswith("flags") for word in line.split()}


if __name__ == "__main__":  # python -m meadow.native.build native|portable [FOLDER]
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / BUILT
    failed = build_all(where, to_build(portable=sys.argv[1:2] == ["portable"]))
    print("\n".join(failed) or f"compiled into {where}")
    sys.exit(bool(failed))
