"""The command as a user types it: exit statuses, messages without tracebacks, JSON, and the README's first command."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import run_inline, small
from meadow.experiments.command import main
from meadow.experiments.plan import plan
from meadow.runtime.identity import ROOT
from meadow.strategies.check import load
from meadow.tasks.task import open_task

INLINE = ["--engine", "inline"]
QUICK = ["run.rounds=2", "partition.clients=4", "task.source_samples=200", "task.source_epochs=1", *INLINE]


def in_a_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meadow", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def meadow(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported all that it needs."""
    command, out, err = ["meadow", *arguments], io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        try:
            main()
            status: Any = 0
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, status or 0, out.getvalue(), err.getvalue())


def test_run_writes_a_self_contained_folder(tmp_path: Path) -> None:
    done = in_a_process("run", "fedper", *QUICK, "--out", "r", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "r" / "summary.json").read_text())
    names = {p.name for p in (tmp_path / "r").iterdir()}
    wanted = {"experiment.toml", "manifest.json", "rounds.jsonl", "clients.csv", "summary.json", "checkpoints"}
    assert wanted | {"split.json", "report.html"} <= names
    again = meadow("run", "r/experiment.toml", "--engine", "inline", "--out", "again", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["model_sha256"] == summary["model_sha256"]
    assert again.stderr.count("Traceback") == 0


def test_compare_and_sweep_make_one_report(tmp_path: Path) -> None:
    done = meadow("compare", *QUICK, "--methods", "local,fedper", "--seeds", "2", "--out", "c", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [r["name"] for r in result["runs"]] == ["local", "fedper"] * 2
    assert len({r["split_sha256"] for r in result["runs"]}) == 2  # one split a seed, the same for every method
    assert (tmp_path / "c" / "report.html").exists()
    folders = {p.name for p in (tmp_path / "c").glob("*-seed*")}
    assert folders == {f"{method}-seed{seed}" for method in ("local", "fedper") for seed in (0, 1)}
    swept = meadow("sweep", "fedavg", *QUICK, "local.lr=0.01,0.1", "--out", "s", "--quiet", cwd=tmp_path)
    assert (swept.returncode, swept.stdout) == (0, "")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"lr-0.01-seed0", "lr-0.1-seed0", "report.html"}


@pytest.mark.parametrize(
    ("preset", "override"),
    [
        ("fedper", "cohort.size=2"),
        ("federated-transfer", "local.steps=3"),
        ("transfer", "local.batch_size=0"),
        ("pooled", "local.epochs=2"),
    ],
)
def test_a_plan_is_what_the_run_then_costs(preset: str, override: str, tmp_path: Path) -> None:
    experiment = small(preset, override)
    cost = run_inline(experiment, tmp_path)["cost"]
    planned = plan(experiment)
    assert {k: planned[k] for k in ("steps", "bytes_up", "bytes_down")} == {
        k: cost[k] for k in ("steps", "bytes_up", "bytes_down")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "fedpr"], ["fedpr", "fedper"]),
        (["run", "nowhere.toml"], ["nowhere.toml", "nowhere"]),
        (["run", "fedavg", "run.round=3"], ["run.round", "run.rounds"]),
        (["run", "fedavg", "run.rounds=many"], ["run.rounds = 'many'", "integer"]),
        (["run", "fedavg", "partition.clients=2000", *INLINE], ["partition.clients = 2000"]),
        (["run", "fedavg", "task.targets=size", *INLINE], ["size", "digit, slant"]),
        (["run", "fedavg", "task.pretrained=no.safetensors", *INLINE], ["task.pretrained", "no.safetensors"]),
        (["run", "fedavg", "--engine", "spark"], ["--engine", "spark", "inline"]),
        (["run", "fedavg", "--out", "taken", *INLINE], ["taken", "--resume"]),
        (["run", "fedavg", "--resume", *INLINE], ["--resume", "--out"]),
        (["run", "fedavg", "--resume", "--out", "nothing-here", *INLINE], ["--resume", "nothing-here"]),
        (["compare", "--methods", "fedavgg"], ["fedavgg", "fedavg"]),
        (["compare", "--seeds", "0"], ["--seeds", "0"]),
        (["sweep", "fedavg", "local.lr=0.1"], ["local.lr"]),
        (["report", "nothing"], ["nothing"]),
        (["show", "fedavg", "local.lr=x"], ["local.lr = 'x'"]),
        (["show", "fedavg", "--out", "x.png"], ["--out x.png", "--split"]),
        (["show", "fedavg", "--split", "--out", "x.gif"], ["--out x.gif", ".png"]),
        (["show", "fedavg", "--split", "--out", "no/x.png"], ["--out no/x.png", "folder no"]),
        (["show", "fedavg", "--split", "partition.law=natural"], ["natural", "task.client"]),
        (["show", "fedavg", "--split", "partition.holds=3"], ["partition.holds = ['3']", "from 1 to 2"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_wrong_input_is_one_message_and_status_2(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    done = meadow(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    message = re.sub(r"[│\s]+", " ", done.stderr)
    assert all(word in message for word in words), message
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


def test_a_process_ends_with_the_status_and_the_message(tmp_path: Path) -> None:
    done = in_a_process("run", "fedpr", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "fedpr" in done.stderr and "Traceback" not in done.stderr


def test_presets_show_and_doctor(tmp_path: Path) -> None:
    listed = meadow("presets", cwd=tmp_path).stdout
    for name in ("pooled", "local", "transfer", "finetune", "multitask", "fedavg", "fedper"):
        assert re.search(rf"^{name} +\S", listed, re.MULTILINE)
    assert 'name = "fedper"' in meadow("show", "fedper", cwd=tmp_path).stdout
    assert "flwr           1.41.0" in meadow("doctor", cwd=tmp_path).stdout


def test_show_split_prints_who_has_what_and_draws_it(tmp_path: Path) -> None:
    """20 clients with 1,527 samples, a row each; their label counts add up to the samples, as the table says itself."""
    done = meadow("show", "fedavg", "partition.holds=slant 3-7", "--split", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, hash_, names, *rows = done.stdout.splitlines()
    experiment = load("fedavg", ["partition.holds=slant 3-7"])
    split = open_task(experiment).split
    assert "law dirichlet, 1 try: 20 clients with 1,527 samples" in head and split.sha256 in hash_
    assert names.split() == ["client", "samples", "train", "validation", "test", *map(str, range(10)), "holds"]
    for client, row in enumerate(rows[:20]):
        number, *cells = row.replace(",", "").split()
        counts = [int(cell) for cell in cells if cell.isdecimal()]
        assert int(number) == client and counts[1:4] == split.sizes[client].tolist()
        assert counts[0] == sum(counts[1:4]) == sum(counts[4:14])
        assert cells[14:] == (["digit", "slant"] if 3 <= client <= 7 else ["digit"])
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")
    assert "split.png" in done.stdout


def test_show_split_of_many_clients_gives_tenths_by_size(tmp_path: Path) -> None:
    given = ["partition.clients=100", "partition.law=quantity", "partition.min_size=3", "task.targets=slant"]
    done = meadow("show", "fedavg", *given, "--split", "--out", "s.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sizes = np.sort(open_task(load("fedavg", given)).split.sizes.sum(axis=1))
    rows = [re.split(r"  +", row.strip()) for row in done.stdout.splitlines()[3:15]]
    shown = [float(row[1].replace(",", "")) for row in rows]
    assert [row[0].split()[0] for row in rows] == ["smallest:", *["tenth"] * 10, "largest:"]
    assert shown == [sizes[0], *(round(tenth.mean(), 1) for tenth in np.array_split(sizes, 10)), sizes[-1]]
    assert "tenth 10" in done.stdout.splitlines()[2] and "bubble" not in done.stdout
    assert (tmp_path / "s.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_the_readmes_first_command_in_a_fresh_clone(tmp_path: Path) -> None:
    """As a newcomer does it: clone, copy the command out of the README, look for the report."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "meadow")], check=True)
    readme = (tmp_path / "meadow" / "README.md").read_text()
    block = re.search(r"<!-- run -->\s*```sh\n(.+?)\n```", readme, re.DOTALL)
    assert block is not None and "\n" not in block[1]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MEADOW_", "PYTHONPATH", "VIRTUAL_ENV"))}
    done = subprocess.run(["bash", "-c", block[1]], cwd=tmp_path / "meadow", env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (report,) = (tmp_path / "meadow" / "runs").glob("compare-*/report.html")
    summaries = [json.loads(p.read_text()) for p in report.parent.glob("*/summary.json")]
    assert len(summaries) == 30 and {s["status"] for s in summaries} == {"done"}
    assert f"report: {report.relative_to(tmp_path / 'meadow')}" in done.stdout
