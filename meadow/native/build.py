"""C files of the rooms, compiled at first use by the machine's own compiler (`cc`), and kept in `~/.cache/meadow` (or
`$XDG_CACHE_HOME/meadow`) under a hash of source, flags, compiler and processor."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
"""None of them lets the compiler reorder sums: the order is that of the source."""


class NotCompiled(Exception):
    """Why there is no compiled form of a file on this machine."""


def compiled(file: str, *flags: str) -> ctypes.CDLL:
    """The compiled form of a C file of this folder, with these flags beside FLAGS. Raises NotCompiled where it cannot
    be had."""
    source = Path(__file__).with_name(file)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NotCompiled("there is no C compiler (cc)")
    if not source.exists():  # Flower lets no C file in an app bundle
        raise NotCompiled(f"{source.name} is not in the app bundle")
    about = _about(compiler) + repr((FLAGS + flags, _processor())).encode()
    key = hashlib.sha256(source.read_bytes() + about).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meadow"
    built = folder / f"{source.stem}-{key}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            made = built.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, *flags, "-o", str(made), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip() or "no reason").splitlines()[-1]
                raise NotCompiled(f"{source.name} does not compile here: {reason}")
            made.replace(built)  # several workers may compile it at once; each result is whole
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise NotCompiled(f"{source.name} cannot be built or loaded here: {error}") from error


@functools.cache
def _about(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
