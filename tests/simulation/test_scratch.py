"""What commands leave in /tmp: nothing after a normal end; the next command removes what a killed one left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.runs import small
from meadow.config.load import to_toml
from meadow.simulation.scratch import Scratch

HOLD = """
import subprocess, sys
from pathlib import Path
from meadow.simulation.scratch import Scratch
own = Scratch(Path(sys.argv[1]))
agent = subprocess.Popen(["sleep", "1000"], stdout=(own.path / "log").open("w"))
print(own.path, agent.pid, flush=True)
sys.stdin.read()
"""


def hold(place: Path) -> tuple[subprocess.Popen[str], Path, int]:
    """Another process with a folder, which its child writes to."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    path, agent = process.stdout.readline().split()
    return process, Path(path), int(agent)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"


def test_a_folder_is_removed_once_its_process_is_dead(tmp_path: Path) -> None:
    dies, its, agent = hold(tmp_path)
    lives, kept, other = hold(tmp_path)
    (its / "session").mkdir()
    dies.kill()
    dies.wait()
    own = Scratch(tmp_path)
    assert {*tmp_path.iterdir()} == {kept, own.path}
    assert not alive(agent) and alive(other)
    lives.kill()
    lives.wait()
    Scratch(tmp_path).remove()
    assert {*tmp_path.iterdir()} == {own.path} and not alive(other)
    own.remove()
    own.remove()
    assert [*tmp_path.iterdir()] == []


def test_folders_without_a_lock_and_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    strange = tmp_path / f"meadow-{os.getuid()}-link", tmp_path / f"meadow-{os.getuid()}-ports"
    strange[0].symlink_to(tmp_path / "elsewhere")
    strange[1].mkdir()
    Scratch(tmp_path).remove()
    assert {*tmp_path.iterdir()} == {tmp_path / "elsewhere", *strange} and (tmp_path / "elsewhere" / "lock").exists()


def left(session: int) -> list[str]:
    """The command lines of a session's processes that are alive."""
    found = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if not line.startswith("Z")]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["done", signal.SIGINT, signal.SIGKILL])
def test_a_run_on_ray_leaves_nothing(end: str | signal.Signals, tmp_path: Path) -> None:
    """A TMPDIR too long for a socket is no obstacle."""
    temporary = tmp_path / ("t" * 80)
    temporary.mkdir()
    (tmp_path / "e.toml").write_text(to_toml(small("fedper", f"run.rounds={3 if end == 'done' else 100_000}")))
    command = [sys.executable, "-m", "meadow", "run", str(tmp_path / "e.toml"), "--engine", "ray", "--workers", "2"]
    run = tmp_path / "run"
    environment = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen([*command, "--quiet", "--out", str(run)], env=environment, start_new_session=True)
    if isinstance(end, signal.Signals):
        while not (run / "rounds.jsonl").exists() or not (run / "rounds.jsonl").read_text():
            assert process.poll() is None
        process.send_signal(end)
    assert process.wait() == {"done": 0, signal.SIGINT: 3, signal.SIGKILL: -signal.SIGKILL}[end]
    if end == signal.SIGKILL:
        Scratch().remove()
    else:
        assert json.loads((run / "summary.json").read_text())["status"] == ("done" if end == "done" else "stopped")
    own = [*Path("/tmp").glob(f"meadow-{os.getuid()}-{process.pid}-*"), *Path("/tmp/ray").glob(f"*_{process.pid}")]
    assert own == [] and [*temporary.iterdir()] == []
    for _ in range(100):  # killed processes take a moment to end
        if not left(process.pid):
            break
        time.sleep(0.1)
    assert left(process.pid) == []
