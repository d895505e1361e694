"""Start the `meadow` command in a process of its own, wait for it, and find what it leaves behind."""

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from meadow.experiments.command import main
from meadow.runtime.identity import ROOT

HUNG = 124
"""Stands for the exit status of a command that had to be killed."""
MARK = "MEADOW_FAULT_TRY"
_SHARED = Path(f"/dev/shm/meadow-{os.getuid()}")

Limit = tuple[int, int]
"""A resource of `resource.setrlimit`, and its limit."""


@dataclass
class Command:
    """A running command, which leads a session. status: as a shell's, but -N if signal N ended it."""

    pid: int
    status: int | None = None
    usage: resource.struct_rusage | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.status is None:
            pid, raw, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.status, self.usage = os.waitstatus_to_exitcode(raw), usage
        return self.status

    def wait(self, seconds: float = 180) -> int:
        """The exit status; HUNG if it had to be killed after this time."""
        until, pause = time.monotonic() + seconds, 0.001
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                self.status = HUNG
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        """SIGKILL to all its session's processes that are in its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def start(
    words: Sequence[str],
    folder: Path,
    *,
    forked: bool,
    limits: Sequence[Limit] = (),
    output: int | Path = Path("log"),
    path: Path | None = None,
) -> Command:
    """Start `meadow WORDS` in a folder, with `folder/t` for temporary files.

    forked: in a copy of this process, which saves the seconds of the imports (`preload`); else in a new one. output: its
    standard output; its errors go to `log`. path: where its code is, if elsewhere.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return Command(pid)
    status = 1
    try:
        _settle(folder, limits, output, path)
        sys.argv = ["meadow", *words]
        if not forked:
            os.execv(sys.executable, [sys.executable, "-m", "meadow", *words])
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _settle(folder: Path, limits: Iterable[Limit], output: int | Path, path: Path | None) -> None:
    """Become a process as a shell would start it."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGPIPE else signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output if isinstance(output, int) else os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    (folder / "t").mkdir(exist_ok=True)
    places = [str(folder), str(path or ROOT)]
    os.environ |= {MARK: str(folder), "TMPDIR": str(folder / "t"), "PYTHONPATH": os.pathsep.join(places)}
    sys.path[:0], tempfile.tempdir = places, None
    for what, limit in limits:
        resource.setrlimit(what, (limit, limit))


def preload(words: Sequence[str], folder: Path) -> None:
    """Import what this command imports, so that forked ones need not."""
    names, sink = os.pipe()
    before = Command(os.fork())
    if not before.pid:
        try:
            _settle(folder, (), Path("log"), None)
            sys.argv = ["meadow", *words]
            main()
        finally:
            with os.fdopen(sink, "w") as file:
                file.write("\n".join(sys.modules))
            os._exit(0)
    os.close(sink)
    with os.fdopen(names) as file:
        for name in file.read().split("\n"):
            with suppress(Exception):
                import_module(name)
    before.wait()


def processes(folder: Path) -> Iterator[tuple[int, str]]:
    """The processes that a command in this folder started and that still run, with their command lines."""
    mark = f"{MARK}={folder}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (place / "environ").read_bytes().split(b"\0") and int(place.name) != os.getpid():
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words:  # a zombie has none
                    yield int(place.name), words


def orphans(folder: Path, seconds: float = 15) -> list[tuple[int, str]]:
    """`processes`, of those that are still there after this time; they are then killed."""
    until = time.monotonic() + seconds
    while (found := list(processes(folder))) and time.monotonic() < until:
        time.sleep(0.1)
    for pid, _ in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def left_behind(folder: Path, pids: Iterable[int]) -> list[Path]:
    """What the commands in a folder, with these process ids, left: temporary files, folders in /tmp, shared memory."""
    temporary = [path for path in (folder / "t").rglob("*") if not path.is_dir()]
    own = [path for pid in pids for path in Path("/tmp").glob(f"meadow-{os.getuid()}-{pid}-*")]
    return temporary + own + [path for path in _SHARED.glob("*") if _is_of(folder, path)]


def _is_of(folder: Path, path: Path) -> bool:
    try:
        return str(folder) in (path / "in-memory").read_text()
    except OSError:
        return False


def memory_of(facts: Mapping[str, str]) -> Path:
    """Where a run, by its manifest, keeps clients' states in shared memory."""
    return _SHARED / facts["run_id"]
