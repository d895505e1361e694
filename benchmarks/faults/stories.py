"""What happens in a try: a fault is planted, and the user carries on."""

import fcntl
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from meadow.benchmarks.faults.commands import memory_of, processes, start
from meadow.benchmarks.faults.tries import Try
from meadow.native import build
from meadow.runtime.identity import ROOT

Story = Callable[[Try], None]
Damage = Callable[[Try], list[Path]]
"""Damages a run's folder; returns the files and folders to put back."""
STATES = "round-*.safetensors"


def plain(this: Try) -> None:
    """Nothing but the run: the fault is in its settings."""
    this.end(this.start())


def signalled(number: int, times: int = 1) -> Story:
    """The command gets a signal at a random moment, or several in a second, and is resumed."""

    def story(this: Try) -> None:
        command = this.start()
        this.moment(command)
        for _ in range(times):
            command.send(number)
            time.sleep(this.random.uniform(0, 0.5) if times > 1 else 0)
        this.end(command)
        this.resume()

    return story


def killed_again(this: Try) -> None:
    """The command is killed, and twice more when it is resumed."""
    for more in ((), ("--resume",), ("--resume",)):
        command = this.start(*more)
        this.moment(command)
        command.send(signal.SIGKILL)
        this.end(command)
    this.resume()


def paused(this: Try) -> None:
    """The command is stopped and continued, as when a laptop sleeps."""
    command = this.start()
    this.moment(command)
    command.send(signal.SIGSTOP)
    time.sleep(1)
    command.send(signal.SIGCONT)
    this.end(command)


def one_killed(name: str) -> Story:
    """A process of the run, by a word of its command line, is killed at a random moment."""

    def story(this: Try) -> None:
        command = this.start()
        this.rounds_to(command, 1)
        found = [pid for pid, words in processes(this.folder) if name in words]
        if found:
            os.kill(this.random.choice(found), signal.SIGKILL)
        elif command.poll() is None:
            raise RuntimeError(f"there is no {name} among {[words for _, words in processes(this.folder)]}")
        this.next_round(command)
        if this.end(command):
            this.resume()

    return story


def without(*names: str, moved: bool = False) -> Story:
    """The run folder, or a folder in it, is removed or renamed while the run goes on."""

    def story(this: Try) -> None:
        command = this.start()
        this.rounds_to(command, this.random.randrange(1, 8))
        place = this.run.joinpath(*names)
        if command.poll() is None:
            place.rename(this.folder / "elsewhere")
            if not moved:
                shutil.rmtree(this.folder / "elsewhere")
        this.end(command)

    return story


def small_files(this: Try) -> None:
    """No file may grow beyond a limit, as on a full disk; then there is room again."""
    this.end(this.start(limits=[(resource.RLIMIT_FSIZE, this.random.randrange(3_000, 40_000))]))
    this.resume()


def output_full(this: Try) -> None:
    """Standard output is on a full disk."""
    this.end(this.start(output=Path("/dev/full"), forked=False))
    this.resume()


def output_closed(this: Try) -> None:
    """The program that read standard output has ended."""
    read, write = os.pipe()
    os.close(read)
    try:
        this.end(this.start(output=write, forked=False))
    finally:
        os.close(write)
    this.resume()


def damaged(damage: Damage) -> Story:
    """A stopped run is damaged and resumed; if that was refused, it is put back and resumed."""

    def story(this: Try) -> None:
        before = this.folder / "before"
        shutil.copytree(this.run, before)
        places = damage(this)
        if not this.resume():
            return
        for place in places:
            kept = before / place.relative_to(this.run)
            if kept.is_dir():
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(kept, place)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(kept, place)
        this.resume()

    return story


def chosen(this: Try, pattern: str) -> Path:
    """A random file of the run folder."""
    return this.random.choice(sorted(path for path in this.run.rglob(pattern) if path.is_file()))


def newest_state(place: Path, draw: Random) -> Path:
    """The newest state of a random client."""
    clients = {path.parent for path in place.rglob(STATES) if path.parent.name.isdecimal()}
    return sorted(draw.choice(sorted(clients)).glob(STATES))[-1]


def newest(this: Try, ending: str) -> Path:
    return sorted(this.run.glob(f"checkpoints/*{ending}"))[-1]


def cut(this: Try, place: Path) -> list[Path]:
    """A file ends early, at a random place."""
    os.truncate(place, this.random.randrange(place.stat().st_size))
    return [place]


def flipped(this: Try, place: Path) -> list[Path]:
    """A bit of a file is another."""
    content = bytearray(place.read_bytes())
    content[this.random.randrange(len(content))] ^= 1 << this.random.randrange(8)
    place.write_bytes(content)
    return [place]


def gone(this: Try, place: Path) -> list[Path]:
    """A file or a folder is gone."""
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    return [place]


def replaced(place: Path, content: str) -> list[Path]:
    place.write_text(content)
    return [place]


def line_damaged(this: Try) -> list[Path]:
    """A line of rounds.jsonl before the last is damaged."""
    place = this.run / "rounds.jsonl"
    lines = place.read_text().splitlines(keepends=True)
    at = this.random.randrange(len(lines) - 1)
    lines[at] = this.random.choice(["\0" * 40 + "\n", lines[at][: len(lines[at]) // 2] + "\n", "[3]\n"])
    return replaced(place, "".join(lines))


def line_torn(this: Try) -> list[Path]:
    """A further line of rounds.jsonl ends early."""
    place = this.run / "rounds.jsonl"
    text = place.read_text()
    return replaced(place, text + text.splitlines()[-1][: this.random.randrange(1, 200)])


def other_run(this: Try) -> list[Path]:
    """The manifest names another run."""
    place = this.run / "manifest.json"
    facts = json.loads(place.read_text())
    return replaced(place, json.dumps(facts | {"run_id": "0" + facts["run_id"][1:][::-1]}))


def strays(this: Try) -> list[Path]:
    """A sync tool's copy, an editor's file, a file of another program."""
    last = newest(this, ".json")
    for name in (f"{last.stem} (1).json", "round-x.json", f"{last.name}.swp", ".DS_Store"):
        shutil.copy(last, last.with_name(name))
    return []


def in_memory(how: Callable[[Try, Path], object]) -> Story:
    """A killed run's states in shared memory are damaged, and it is resumed."""

    def story(this: Try) -> None:
        command = this.start()
        this.moment(command)
        command.send(signal.SIGKILL)
        this.end(command)
        manifest = this.run / "manifest.json"
        memory = memory_of(json.loads(manifest.read_text())) if manifest.exists() else this.folder / "none"
        if any(memory.rglob(STATES)):
            how(this, memory if how is gone else newest_state(memory, this.random))
        this.resume()
        shutil.rmtree(memory, ignore_errors=True)

    return story


def locked(this: Try) -> None:
    """Another process has the run folder; when it has ended, the run goes on."""
    with (this.run / ".lock").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        this.end(this.start("--resume"))
    this.resume()


def together(this: Try) -> None:
    """The run is resumed twice at the same time: one is refused, or finds the run done."""
    first, second = this.start("--resume"), this.start("--resume")
    ends = sorted((first.wait(), second.wait()))
    this.ends += [ends[1], ends[0]]


def library_cut(this: Try) -> None:
    """The compiled libraries of an installation are cut short, as after a power failure."""
    code = this.folder / "code"
    for room in ("meadow", "strategies", "client", "server", "simulation"):
        shutil.copytree(ROOT / room, code / room, ignore=shutil.ignore_patterns("__pycache__"))
    built = code / "meadow" / "native" / build.BUILT
    built.mkdir(exist_ok=True)
    for library in built.glob("*.so"):
        os.truncate(library, this.random.randrange(library.stat().st_size))
    this.end(this.start(forked=False, path=code))


def four_at_once(this: Try) -> None:
    """Four runs on one machine, each in its folder; the first is compared, the others by their models."""
    names = ["run", "b", "c", "d"]
    for command in [this.start(out=name) for name in names]:
        this.end(command)
    found = {json.loads((this.folder / name / "summary.json").read_text())["model_sha256"] for name in names}
    if len(found) > 1:
        raise RuntimeError(f"four equal runs end with {len(found)} models")


def reported(this: Try) -> None:
    """Reports of the run are written while it goes on."""
    command = this.start()
    this.rounds_to(command, 1)
    for _ in range(3):
        this.end(start(["report", "run", "--out", "live.html"], this.folder, forked=True))
    if command.poll() is not None:
        raise RuntimeError("the run had ended before the reports")
    this.end(command)
