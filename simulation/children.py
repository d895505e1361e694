"""Child processes that never outlive a run: process groups, their logs, and free ports on loopback.

Each child leads its own process group, so Ctrl-C in the terminal reaches only this process, which then stops the groups in
order. If this process is killed, a watchdog stops them.
"""

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

STOP_GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
PORTS = range(15000, 32000)
"""Below the range that Linux and macOS use for outgoing connections, so that none of these takes our port."""

MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""Environment of a process that trains: glibc keeps up to 1 GiB of freed memory for reuse. Otherwise it would return large
temporaries to the system and request zeroed pages again at each step. Read at process start; no effect without glibc."""

# Reads "+GROUP" and "-GROUP" lines until its input closes, which it does however our process ends; then kills the rest.
_WATCHDOG = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
groups = []
for line in sys.stdin:
    number = int(line[1:])
    groups.append(number) if line[0] == "+" else groups.remove(number)
for number, pause in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 0.0)):
    for group in reversed(groups):
        try:
            os.killpg(group, number)
        except OSError:
            pass
    time.sleep(pause if groups else 0.0)
"""


@dataclass(frozen=True)
class Child:
    """A process that we started, leader of its own process group."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Children:
    """The processes of one run, in the order of their start."""

    log_dir: Path
    watchdog: subprocess.Popen[bytes]
    running: list[Child] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Child:
        """Start ``command`` in ``cwd``; its output goes to ``log_dir/name.log``."""
        cwd.mkdir(parents=True, exist_ok=True)
        log = self.log_dir / f"{name}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            child = Child(name, process, log)
            self.running.append(child)
            self._tell_watchdog(f"+{process.pid}")
        return child

    def require_alive(self) -> None:
        """Raise ``RuntimeError`` with the tail of its log when a child has ended."""
        for child in self.running:
            code = child.process.poll()
            if code is not None:
                raise RuntimeError(f"{child.name} ended with exit code {code}.\n{tail(child.log)}")

    def stop(self) -> None:
        """End every process group: SIGTERM (last started first), then SIGKILL after STOP_GRACE. Safe to call twice."""
        waiting = list(reversed(self.running))
        for child in waiting:
            signal_group(child, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE
        while waiting and time.monotonic() < deadline:
            waiting = [child for child in waiting if group_alive(child)]
            time.sleep(0.02)
        for child in waiting:
            signal_group(child, signal.SIGKILL)
        for child in self.running:
            child.process.wait()
            self._tell_watchdog(f"-{child.process.pid}")
        self.running.clear()

    def forget(self, child: Child) -> None:
        """Remove a child that has ended as expected."""
        child.process.wait()
        self._tell_watchdog(f"-{child.process.pid}")
        self.running.remove(child)

    def _tell_watchdog(self, line: str) -> None:
        assert self.watchdog.stdin is not None
        self.watchdog.stdin.write(f"{line}\n".encode())
        self.watchdog.stdin.flush()


@contextmanager
def children(log_dir: Path) -> Iterator[Children]:
    """A set of processes that end with the ``with`` block or with this process, whichever comes first."""
    log_dir.mkdir(parents=True, exist_ok=True)
    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHDOG], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
    )
    group = Children(log_dir, watchdog)
    try:
        yield group
    finally:
        try:
            group.stop()
        finally:
            assert watchdog.stdin is not None
            watchdog.stdin.close()  # the watchdog kills what stop() did not, for instance after a second Ctrl-C
            watchdog.wait()


def signal_group(child: Child, number: signal.Signals) -> None:
    """Send a signal to the child's process group, if it still exists."""
    with suppress(ProcessLookupError, PermissionError):  # macOS answers "permission" for a group of zombies
        os.killpg(child.process.pid, number)


def group_alive(child: Child) -> bool:
    """Whether any process of the child's group is alive: the child or a descendant."""
    child.process.poll()  # reap the leader: a zombie would count as alive
    try:
        os.killpg(child.process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def tail(log: Path, lines: int = 40) -> str:
    """The last lines of a log, below a line with its path."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return f"--- {log}\n" + "\n".join(text[-lines:])


@contextmanager
def free_port() -> Iterator[int]:
    """A free port on loopback, reserved against other runs of Meadow until the block ends.

    A lock file reserves it between our check and the bind by the process that will use it.
    """
    folder = Path(tempfile.gettempdir()) / f"meadow-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for left in folder.iterdir():  # by killed runs
        with _reserved(left):
            pass
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with _reserved(folder / str(port)) as reserved:
            if reserved and _is_free(port):
                yield port
                return
    raise RuntimeError(f"no free port between {PORTS.start} and {PORTS.stop}")


@contextmanager
def _reserved(path: Path) -> Iterator[bool]:
    """Lock a file, and remove it at the end; False if another process has it."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock.fileno()), path.stat())  # not one that was removed meanwhile
        except OSError:
            mine = False
        try:
            yield mine
        finally:
            if mine:
                path.unlink(missing_ok=True)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
