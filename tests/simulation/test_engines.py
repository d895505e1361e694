"""One experiment, every engine, the same bits; and a grid that loses a node loses that node's clients only."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from helpers.runs import SAME, run_inline, small
from meadow.config.load import from_flat, to_flat, to_toml
from meadow.runtime.identity import ROOT
from meadow.simulation.children import children
from meadow.simulation.launch import Launch, engine
from meadow.simulation.processes import run_app, superlink
from meadow.strategies.check import load

PRESETS = ("fedavg", "fedper", "transfer", "federated-finetune", "multitask", "pooled")


@pytest.fixture(scope="module", params=[1, 2, 3])
def ray_launch(request: pytest.FixtureRequest) -> Iterator[Launch]:
    with engine("ray", request.param) as launch:
        yield launch


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("clients", ["partition.clients=23", "cohort.size=7"])
def test_ray_gives_the_bits_of_inline(ray_launch: Launch, preset: str, clients: str, tmp_path: Path) -> None:
    experiment = small(preset, clients) if preset != "pooled" else small(preset)
    inline, on_ray = run_inline(experiment, tmp_path / "inline"), ray_launch(experiment, tmp_path / "ray")
    assert [on_ray[key] for key in SAME] == [inline[key] for key in SAME]


@pytest.mark.parametrize("ray_launch", [2], indirect=True)
def test_ray_refuses_whoever_has_not_its_token(ray_launch: Launch) -> None:
    code = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for given in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        command = [sys.executable, "-c", code, ray.get_runtime_context().gcs_address]
        done = subprocess.run(command, env=stranger | given, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "InvalidAuthToken" in done.stderr


@pytest.mark.parametrize("deaths", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_a_killed_worker_comes_back(deaths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed once in a round it answers again, with the same bits; killed whenever asked, its clients fail that round."""
    import meadow.simulation.ray_engine

    class Mortal(meadow.simulation.ray_engine.NodeActor):
        """Dies by SIGKILL of the second round's message for client 0, as often as told."""

        def handle(self, message: Any, context: Any, names: list[str], *records: Any) -> Any:
            rounds = [c["round"] for c in message.content.config_records.values() if "keep-from" in c]
            lives = tmp_path / "lives"
            died = len(lives.read_text()) if lives.exists() else 0
            asked: Any = message.content.config_records["pack"]["requests"] if rounds == [2] else [""]
            if asked[0].startswith("0 ") and died < deaths:
                lives.write_text("x" * (died + 1))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().handle(message, context, names, *records)

    monkeypatch.setattr(meadow.simulation.ray_engine, "NodeActor", Mortal)
    experiment = small("fedper", "run.rounds=4", "partition.clients=23", "partition.min_size=3")
    with engine("ray", 2) as launch:
        summary = launch(experiment, tmp_path / "ray")
    records = [json.loads(line) for line in (tmp_path / "ray" / "rounds.jsonl").read_text().splitlines()]
    failed = [[f["client"] for f in r["failed"]] for r in records]
    assert failed[:1] + failed[2:] == [[], [], []] and (deaths == 1) == (failed[1] == [])
    assert deaths == 1 or (
        failed[1][:10] == list(range(10)) and len(failed[1]) < 23
    )  # its first block, on one of two nodes
    assert summary["status"] == "done" and (tmp_path / "lives").exists()
    if deaths == 1:
        expected = run_inline(experiment, tmp_path / "inline")
        assert [summary[key] for key in SAME] == [expected[key] for key in SAME]


def test_a_call_that_cannot_be_read_costs_itself_and_not_the_worker() -> None:
    from meadow.simulation.ray_engine import NodeActor

    assert "UnpicklingError" in pickle.loads(NodeActor().handle_pickled(b"no pickle"))


def simulate(out: Path, preset: str, *overrides: str) -> dict[str, Any]:
    """What a user's `flwr run .` does, on ports and a FLWR_HOME of its own: Flower's own simulation runtime."""
    experiment = load(preset, overrides)
    config: dict[str, bool | int | float | str] = {**to_flat(experiment), "out": str(out), "resume": False}
    nodes = {"num-supernodes": experiment.partition.clients, "client-resources-num-cpus": 1}
    os.environ["MEADOW_STATE"] = str(out.parent / "state")
    try:
        with children(out.parent / "logs") as group, superlink(group, out.parent / "flower", simulation=True) as link:
            run_app(group, link, ROOT, config, federation_config=nodes)
    finally:
        del os.environ["MEADOW_STATE"]
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


QUICK = ("run.rounds=2", "partition.clients=4", "task.source_samples=200", "task.source_epochs=1")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fedper", "federated-transfer"])
def test_flwr_run_gives_the_bits_of_inline(preset: str, tmp_path: Path) -> None:
    expected = run_inline(load(preset, QUICK), tmp_path / "inline")
    found = simulate(tmp_path / "run", preset, *QUICK)
    assert [found[key] for key in SAME] == [expected[key] for key in SAME]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "nodes"), [("fedper", 2), ("fedavg", 3)])
def test_processes_give_the_bits_of_inline(preset: str, nodes: int, tmp_path: Path) -> None:
    experiment = load(preset, QUICK)
    expected = run_inline(experiment, tmp_path / "inline")
    with engine("processes", nodes) as launch:
        found = launch(experiment, tmp_path / "run")
    assert [found[key] for key in SAME] == [expected[key] for key in SAME]


@pytest.mark.slow
def test_processes_run_in_a_relative_folder_behind_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at that proxy; the nodes are on loopback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    experiment = load("fedper", QUICK)
    with engine("processes", 2) as launch:
        found = launch(experiment, Path("runs/one"))
    assert found["status"] == "done"


@pytest.mark.slow
def test_processes_killed_leave_nothing_behind_and_resume(tmp_path: Path) -> None:
    experiment = load("fedper", QUICK)
    (tmp_path / "e.toml").write_text(to_toml(experiment))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "meadow", "run", str(tmp_path / "e.toml"), "--engine", "processes"]
    command += ["--workers", "2", "--quiet", "--resume", "--out", str(run)]
    process = subprocess.Popen(command)
    while not (run / "rounds.jsonl").exists() or not (run / "rounds.jsonl").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = 1
    for _ in range(100):
        found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True).stdout.split()
        left = len(found)
        if not left:
            break
        subprocess.run(["sleep", "0.2"], check=True)
    assert left == 0
    assert subprocess.run(command).returncode == 0
    expected = run_inline(experiment, tmp_path / "inline")
    found_summary = json.loads((run / "summary.json").read_text())
    assert [found_summary[key] for key in SAME] == [expected[key] for key in SAME]


def test_run_config_carries_the_whole_experiment() -> None:
    experiment = load("fedper", QUICK)
    assert from_flat({**to_flat(experiment), "out": "x", "resume": True}) == experiment
