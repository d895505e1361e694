"""Hostile inputs to the command, each in a process of its own with limits on time and memory."""

import os
import re
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from meadow.benchmarks.faults.commands import HUNG, start
from meadow.benchmarks.hostile import Hostile, inputs

SECONDS = 10
"""Of the processor. A command that waits may take three times as long, because the machine may be busy."""
MEMORY = 4 * 2**30


@dataclass(frozen=True)
class Answer:
    """How the command took an input. memory: bytes. problem: what was expected otherwise, or ""."""

    family: str
    status: int
    seconds: float
    memory: int
    traceback: bool
    hung: bool
    problem: str


def attack(count: int, seed: int, parts: int, part: int) -> list[Answer]:
    """Give the command every `parts`-th of `count` hostile inputs, from number `part` on."""
    room = _size() + MEMORY
    return [_answer(hostile, room) for hostile in islice(inputs(count, seed), part, None, parts)]


def _answer(hostile: Hostile, room: int) -> Answer:
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp")) / "in"  # some name the folder above
    folder.mkdir()
    hostile.write(folder)
    limits = [(resource.RLIMIT_AS, room), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_CORE, 0)]
    began = time.monotonic()
    command = start(hostile.argv, folder, forked=True, limits=limits)
    status = command.wait(3 * SECONDS)
    seconds = time.monotonic() - began
    used = command.usage
    spent, memory = (used.ru_utime + used.ru_stime, used.ru_maxrss * 1024) if used else (0.0, 0)
    text = (folder / "log").read_text(errors="replace")
    hung, trace = status == HUNG or spent >= SECONDS, "Traceback (most recent call last)" in text
    problem = ""
    if hung or trace or memory > MEMORY or status not in (0, 2, 3):
        lines = [line for line in text.splitlines() if line.strip()]
        last = lines[-1][:200] if lines else ""
        problem = (
            f"status {status}, {spent:.0f} s, {memory >> 20} MB: {last} ({folder}: {' '.join(hostile.argv)[:300]!r})"
        )
    else:
        shutil.rmtree(folder.parent, ignore_errors=True)
    return Answer(hostile.family, status, seconds, memory, trace, hung, problem)


def _size() -> int:
    """Bytes of address space of this process."""
    found = re.search(r"VmSize:\s*(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def families(answers: Sequence[Sequence[Answer]]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The table's lines about the inputs of each family, with the problems."""
    every = [answer for part in answers for answer in part]
    for family in dict.fromkeys(answer.family for answer in every):
        some = [answer for answer in every if answer.family == family]
        yield (
            {
                "fault": f"hostile {family}",
                "engine": "inline",
                "tries": len(some),
                "slowest_s": round(max(answer.seconds for answer in some), 1),
                "largest_mb": max(answer.memory for answer in some) >> 20,
                "tracebacks": sum(answer.traceback for answer in some),
                "hangs": sum(answer.hung for answer in some),
                "unmet": sum(bool(answer.problem) for answer in some),
                "exit": ", ".join(f"{s} ({n})" for s, n in Counter(answer.status for answer in some).most_common()),
            },
            [answer.problem for answer in some if answer.problem],
        )
