"""Killed and resumed: the run that was cut off ends with the bits of the run that never was."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from helpers.refusals import refused
from helpers.runs import RESUMED, clients_answer, run_inline, run_with, small
from meadow.arrays.files import DamagedFile, read_arrays, write_arrays
from meadow.client.app import app
from meadow.client.node import Node
from meadow.config.load import to_toml, to_tree
from meadow.config.schema import Experiment
from meadow.experiments import api
from meadow.experiments.report import write_report
from meadow.runtime.errors import RunStopped, UserError
from meadow.server.checkpoints import Checkpoint, latest, save
from meadow.server.folder import RunFolder
from meadow.server.listeners import Listener, RoundDone, RunBegins
from meadow.server.writer import EVERY, Writer
from meadow.strategies.wire.packing import Answer, Request


class Killed(BaseException):
    """Stands for SIGKILL: nothing below it is caught, nothing after it is written."""


def kill_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Let everything end when the given file is about to get its name; half of it is on the disk, under another name."""
    count, honest = [0], os.replace

    def replace(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == number:
            os.truncate(source, source.stat().st_size // 2)
        if count[0] >= number:
            raise Killed
        honest(source, target)

    monkeypatch.setattr(os, "replace", replace)
    return count


def writes_of(
    experiment: Experiment, out: Path, monkeypatch: pytest.MonkeyPatch, every: float = EVERY
) -> tuple[int, dict[str, Any]]:
    """The number of files that a run writes, and its summary."""
    with monkeypatch.context() as patch:
        count = kill_at_write(patch, 10**9)
        summary = run_with(app, experiment, out, checkpoint_every=every)
    return count[0], summary


PLATEAU = ("local.schedule=plateau", "local.schedule_patience=0", "local.lr=0.3")


@pytest.mark.parametrize(
    ("method", "every"),
    [
        (("fedper",), 3600),
        (("fedper", "engine.state_memory=0"), 3600),
        (("local", "engine.state_memory=0"), 3600),
        (("fedavg", *PLATEAU), 3600),
        (("fedavg",), 3600),
        (("fedavg",), 0),
    ],
    ids=str,
)
def test_killed_at_any_write_and_resumed_gives_the_same_bits(
    method: tuple[str, ...], every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`every`: seconds between checkpoints; where clients keep something there is one a round whatever it says."""
    quick = ("local.steps=1", "task.hidden=8", "evaluate.on=clients", "evaluate.every=9")
    experiment = small(*method, *quick, "cohort.size=3", "partition.clients=4")
    total, expected = writes_of(experiment, tmp_path / "whole", monkeypatch, every)
    assert total > 3 * 3
    for number in range(1, total + 1):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at_write(patch, number)
            run_with(app, experiment, out, checkpoint_every=every)
        resumed = run_with(app, experiment, out, resume=True, checkpoint_every=every)
        assert [resumed[k] for k in RESUMED] == [expected[k] for k in RESUMED], number


def test_rounds_share_a_checkpoint_only_where_clients_keep_nothing(tmp_path: Path) -> None:
    """The first round has one, and the last, however the run ends; a run that was stopped goes on from there."""
    private = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "cohort.sampling=poisson", "cohort.fraction=0.5")
    kept = []
    for number, method in enumerate([("fedavg",), ("fedper",), ("fedavg", *private), ("fedavg", *PLATEAU)]):
        run_with(app, small(*method, "run.rounds=4"), tmp_path / str(number), checkpoint_every=3600)
        kept.append([int(p.stem[-8:]) for p in sorted((tmp_path / str(number) / "checkpoints").glob("*.json"))])
    assert kept == [[1, 4], [2, 3, 4], [2, 3, 4], [2, 3, 4]]

    def stopped(message: Message, context: Context) -> Message:
        if any(record.get("round") == 4 for record in message.content.config_records.values()):
            raise KeyboardInterrupt
        return app(message, context)

    summary = run_with(stopped, small("fedavg", "run.rounds=4"), tmp_path / "stopped", checkpoint_every=3600)
    assert summary["status"] == "stopped"
    found, _ = latest(tmp_path / "stopped" / "checkpoints")
    assert found is not None and found.round == 3
    resumed = run_inline(small("fedavg", "run.rounds=4"), tmp_path / "stopped", resume=True)
    whole = run_inline(small("fedavg", "run.rounds=4"), tmp_path / "whole")
    assert [resumed[k] for k in RESUMED] == [whole[k] for k in RESUMED]


def test_there_is_no_checkpoint_without_its_rounds_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.cut_back(0)
    writer = Writer(folder, "run", every=3600)
    for round_, loss in enumerate((1.0, 2.0, float("nan")), 1):
        writer.round_done(RoundDone(round_, {"round": round_, "loss": loss}, {}))
    with pytest.raises(ValueError):
        writer.settle()
    writer.rounds_end()
    found, _ = latest(folder.checkpoints)
    assert found is not None and found.round == 1 and [r["round"] for r in folder.rounds()] == [1, 2]


def test_damaged_lines_are_kept_aside_and_no_other_record_is_lost(tmp_path: Path) -> None:
    """After a power failure a line may lack what stood before the next one; the last one may end early."""
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b'{"round": 1}\n\0\0\0\n[3]\n{"round": 4}\n{"round": 5}\n{"rou')
    folder = RunFolder(tmp_path)
    folder.cut_back(4)
    assert folder.rounds() == [{"round": 1}, {"round": 4}]
    assert path.read_bytes() == b'{"round": 1}\n{"round": 4}\n'
    assert (tmp_path / "rounds-damaged.txt").read_bytes() == b"\0\0\0\n[3]\n"


@pytest.mark.parametrize("name", ["round-x.json", "round-00000003 (1).json", "round-00000002.json.swp"])
def test_strays_among_the_checkpoints_are_ignored_and_told(name: str, tmp_path: Path) -> None:
    save(tmp_path, Checkpoint(2, {"w": np.zeros(1, np.float32)}))
    (tmp_path / name).write_text("[1]")
    found, told = latest(tmp_path)
    assert found is not None and found.round == 2 and len(told) == 1 and name in told[0]


def test_a_resumed_run_needs_the_manifest_of_its_states(tmp_path: Path) -> None:
    experiment = small("fedper", "run.rounds=2")
    run_inline(experiment, tmp_path)
    (tmp_path / "summary.json").unlink()
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_text()
    for damaged in (None, whole[:100], "[1]"):
        manifest.unlink() if damaged is None else manifest.write_text(damaged)
        with refused("manifest.json", tmp_path):
            run_inline(experiment, tmp_path, resume=True)
    manifest.write_text(whole.replace('"run_id": "', '"run_id": "0'))
    summary = run_inline(experiment, tmp_path, resume=True)
    assert summary["status"] == "stopped" and "run_id" in summary["reason"]


def test_one_process_runs_a_folder(tmp_path: Path) -> None:
    """The second one is refused; a killed one leaves no lock behind."""
    experiment = small("fedavg", "run.rounds=2")
    run_inline(experiment, tmp_path)
    hold = (
        "import sys; from pathlib import Path; from meadow.arrays.files import locked\n"
        "with locked(Path(sys.argv[1])): print(flush=True); input()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None and other.stdout.readline()
        with refused("--out", tmp_path, other.pid):
            run_inline(experiment, tmp_path, resume=True)
        other.kill()
    assert run_inline(experiment, tmp_path, resume=True)["status"] == "done"


class RemovesRun(Listener):
    """Removes the run's folder, or a folder in it, after the second round."""

    gone = "."

    def run_begins(self, begins: RunBegins) -> None:
        self.folder = begins.folder

    def round_done(self, done: RoundDone) -> None:
        if done.round == 2:
            shutil.rmtree(self.folder / self.gone)


class RemovesState(RemovesRun):
    gone = "state"


class MovesRun(RemovesRun):
    """Renames the run's folder after the second round."""

    def round_done(self, done: RoundDone) -> None:
        if done.round == 2:
            self.folder.rename(self.folder.with_name("moved"))


@pytest.mark.parametrize("memory", [0, 1024])
@pytest.mark.parametrize("listener", ["RemovesRun", "MovesRun"])
def test_a_run_folder_that_is_removed_during_the_run_stops_it(listener: str, memory: int, tmp_path: Path) -> None:
    """It is not made again; a moved one can be resumed where it is."""
    settings = ("fedper", "run.rounds=4", f"engine.state_memory={memory}")
    with refused(str(tmp_path / "run"), kind=RunStopped):
        run_inline(small(*settings, f"run.listeners={__name__}:{listener}"), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    if listener == "MovesRun":
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        resumed = run_inline(small(*settings), tmp_path / "moved", resume=True)
        whole = run_inline(small(*settings), tmp_path / "whole")
        assert [resumed[k] for k in RESUMED] == [whole[k] for k in RESUMED]


def test_states_that_are_removed_during_the_run_stop_it(tmp_path: Path) -> None:
    experiment = small("fedper", "run.rounds=4", "engine.state_memory=0", f"run.listeners={__name__}:RemovesState")
    summary = run_inline(experiment, tmp_path)
    assert summary["status"] == "stopped" and "state" in summary["reason"]


def test_models_on_disk_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run_inline(small("fedper", "run.rounds=2"), tmp_path / "run")
    finally:
        os.umask(before)
    arrays = [*(tmp_path / "run").rglob("*.safetensors")]
    assert {path.parent.parent.name for path in arrays} >= {"run", "clients"}
    for path in arrays:
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_killed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = small("fedper", "run.rounds=6")
    total, expected = writes_of(experiment, tmp_path / "whole", monkeypatch)
    for number in (total // 2, total // 4, total // 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at_write(patch, number)
            run_inline(experiment, tmp_path / "cut", resume=True)
    resumed = run_inline(experiment, tmp_path / "cut", resume=True)
    assert [resumed[k] for k in RESUMED] == [expected[k] for k in RESUMED]


@pytest.mark.parametrize("damage", ["torn arrays", "flipped bit", "torn json", "lost json", "torn line", "both newest"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(damage: str, tmp_path: Path) -> None:
    experiment = small("fedper", "run.rounds=6")
    expected = run_inline(experiment, tmp_path)
    (tmp_path / "summary.json").unlink()
    folder = tmp_path / "checkpoints"
    newest, older = (sorted(folder.glob("*.safetensors"))[i] for i in (-1, -2))
    content = bytearray(newest.read_bytes())
    if damage == "torn arrays":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped bit":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    elif damage == "torn json":
        newest.with_suffix(".json").write_bytes(b'{"round": 6, "sha')
    elif damage == "lost json":
        newest.with_suffix(".json").unlink()
    elif damage == "both newest":
        newest.write_bytes(b"")
        older.write_bytes(b"")
    else:
        with (tmp_path / "rounds.jsonl").open("a") as file:
            file.write('{"round": 7, "coh')
    found, damaged = latest(folder)
    assert found is not None
    assert found.round == {"torn line": 6, "both newest": 4}.get(damage, 5)
    assert len(damaged) == 6 - found.round
    resumed = run_inline(experiment, tmp_path, resume=True)
    assert [resumed[k] for k in RESUMED] == [expected[k] for k in RESUMED]


def test_a_flipped_bit_anywhere_in_a_file_of_arrays_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"w": np.arange(6, dtype=np.float32)})
    whole = path.read_bytes()
    assert read_arrays(path)["w"].tolist() == [0, 1, 2, 3, 4, 5]
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DamagedFile, match="SHA-256"):
            read_arrays(path)


def test_a_flipped_bit_in_what_a_checkpoint_says_is_found(tmp_path: Path) -> None:
    """The privacy that was spent is there alone."""
    save(tmp_path, Checkpoint(2, {"w": np.zeros(1, np.float32)}, privacy={"bound": 1.0, "made": ["ab"]}, run="r"))
    path = tmp_path / "round-00000002.json"
    whole, expected = path.read_bytes(), latest(tmp_path)[0]
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found, _ = latest(tmp_path)
        assert found is None or repr(found) == repr(expected), place  # but for blanks, and the name of the SHA-256


def test_arrays_of_another_round_are_no_checkpoint(tmp_path: Path) -> None:
    for round_ in (1, 2):
        save(tmp_path, Checkpoint(round_, {"w": np.array([round_], dtype=np.float32)}))
    (tmp_path / "round-00000001.safetensors").replace(tmp_path / "round-00000002.safetensors")
    found, damaged = latest(tmp_path)
    assert found is None and len(damaged) == 2


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    experiment = small("fedavg")
    first = run_inline(experiment, tmp_path)
    before = (tmp_path / "rounds.jsonl").stat().st_mtime_ns
    assert run_inline(experiment, tmp_path, resume=True) == first
    assert (tmp_path / "rounds.jsonl").stat().st_mtime_ns == before


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    experiment = small("fedavg")
    run_inline(experiment, tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"data_sha256": "', '"data_sha256": "00'))
    with pytest.raises(UserError, match="data_sha256"):
        run_inline(experiment, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_sigkill_at_random_moments(engine: str, tmp_path: Path) -> None:
    """A real process and a real SIGKILL, until the run gets through."""
    experiment = small("fedper", "run.rounds=40")
    (tmp_path / "e.toml").write_text(to_toml(experiment))
    command = [sys.executable, "-m", "meadow", "run", str(tmp_path / "e.toml"), "--quiet", "--engine", engine]
    command += ["--out", str(tmp_path / "run"), "--resume"]
    expected = run_inline(experiment, tmp_path / "whole")
    moments = random.Random(5)
    for _ in range(4):
        process = subprocess.Popen(command)
        while not (tmp_path / "run" / "rounds.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command).returncode == 0
    resumed = run_inline(experiment, tmp_path / "run", resume=True)
    assert [resumed[k] for k in RESUMED] == [expected[k] for k in RESUMED]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("engine", ["inline", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ray", "processes"))])
def test_signals_end_a_run_like_ctrl_c(engine: str, number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    main = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    main += "signal.signal(signal.SIGHUP, signal.SIG_DFL); from meadow.experiments.command import main; main()"
    command = [sys.executable, "-c", main, "run", "fedavg", "run.rounds=2000", "--quiet", "--engine", engine]
    with subprocess.Popen([*command, "--out", out], stderr=subprocess.PIPE, text=True) as process:
        while not (out / "rounds.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate()
    assert process.returncode == 3 and "Traceback" not in told
    summary = RunFolder(out).summary()
    assert summary is not None and summary["status"] == "stopped"
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout
    assert not left, left


@pytest.mark.parametrize(("preset", "name"), [("fedper", "rounds.jsonl"), ("fedper", "checkpoints")])
def test_what_cannot_be_read_is_told_and_nothing_begins_again(preset: str, name: str, tmp_path: Path) -> None:
    experiment = small(preset, "run.rounds=2")
    run_inline(experiment, tmp_path)
    (tmp_path / "summary.json").unlink()
    path = tmp_path / name
    path.rename(tmp_path / "elsewhere")
    path.mkdir() if name == "rounds.jsonl" else path.write_text("a file")
    try:
        reason = run_inline(experiment, tmp_path, resume=True)["reason"]
    except UserError as error:
        reason = str(error)
    assert str(path) in reason
    path.rmdir() if name == "rounds.jsonl" else path.unlink()
    (tmp_path / "elsewhere").rename(path)
    assert run_inline(experiment, tmp_path, resume=True)["status"] == "done"


def test_damaged_releases_stop_a_private_run(tmp_path: Path) -> None:
    """They count what the budget was spent on. A run that released nothing has a report, too."""
    private = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "cohort.sampling=poisson", "cohort.fraction=0.5")
    experiment = small("fedavg", *private, "run.rounds=2")
    run_inline(experiment, tmp_path)
    releases = tmp_path / "releases.json"
    whole = releases.read_text()
    for damaged in ("{", "[]", whole.replace(json.loads(whole)[0][:9], "0" * 9), ""):
        (tmp_path / "summary.json").unlink()
        releases.write_text(damaged) if damaged else releases.unlink()
        summary = run_inline(experiment, tmp_path, resume=True)
        assert summary["status"] == "stopped" and "releases.json" in summary["reason"]
    assert write_report([tmp_path], tmp_path / "report.html").exists()


def test_a_run_whose_clients_cannot_be_evaluated_at_the_end_is_not_done(tmp_path: Path) -> None:
    def fails(node: Node, request: Request) -> Answer:
        raise OSError("no data")

    experiment = small("fedper", "run.rounds=2")
    summary = run_with(clients_answer(evaluate_one=fails), experiment, tmp_path)
    assert summary["status"] == "stopped" and "no data" in summary["reason"]
    assert run_inline(experiment, tmp_path, resume=True)["status"] == "done"


def test_a_done_run_is_not_started_again(tmp_path: Path) -> None:
    """Neither an engine nor the data is opened: they are not even there any more."""
    tree = to_tree(small("fedper", "run.rounds=2", "engine.name=inline"))
    first = api.run(tree, out=tmp_path)
    report = (tmp_path / "report.html").stat().st_mtime_ns
    again = api.run(tree, out=tmp_path, resume=True, engine={"name": "ray", "address": "127.0.0.1:1"})
    assert again == first and (tmp_path / "report.html").stat().st_mtime_ns == report


def test_flowers_way_to_end_a_server_is_a_stop(tmp_path: Path) -> None:
    """After SIGTERM, Flower's ServerApp process ends by SystemExit(0), wherever it is."""

    def ended(message: Message, context: Context) -> Message:
        if any(record.get("round") == 2 for record in message.content.config_records.values()):
            sys.exit(0)
        return app(message, context)

    experiment = small("fedper", "run.rounds=3")
    with pytest.raises(SystemExit):
        run_with(ended, experiment, tmp_path)
    assert (RunFolder(tmp_path).summary() or {})["status"] == "stopped"
    assert run_inline(experiment, tmp_path, resume=True)["status"] == "done"
