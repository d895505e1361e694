"""Hostile input ends the command with status 2 or 3 and one message; and faults of the input are found before the run."""

import io
import os
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from helpers.refusals import refused
from helpers.runs import small
from meadow.benchmarks.hostile import FAMILIES, inputs
from meadow.config.load import to_tree
from meadow.experiments import api
from meadow.experiments.api import check_run
from meadow.experiments.command import main
from meadow.experiments.endings import outcome
from meadow.strategies.check import load

EXAMPLE = ("privacy.unit=example", "privacy.sample_rate=0.1")


def ends(*arguments: str, cwd: Path) -> tuple[int, str]:
    """The command in this process: its exit status and what it says."""
    text = io.StringIO()
    with chdir(cwd), redirect_stdout(text), redirect_stderr(text), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["meadow", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
            raise SystemExit(0)
    return int(end.value.code or 0), text.getvalue()


def test_the_generator_gives_the_same_inputs_of_every_family_again() -> None:
    few = len(FAMILIES) - 1  # without that of run folders, which needs a run
    first, again = ([(one.family, one.argv, one.files) for one in inputs(few, seed=3)] for _ in range(2))
    assert first == again and len({family for family, _, _ in first}) == few


@pytest.mark.slow
def test_hostile_inputs_end_with_a_status_and_a_short_message(tmp_path: Path) -> None:
    for number, one in enumerate(inputs(70, seed=1)):
        (tmp_path / f"{number}").mkdir()
        one.write(tmp_path / f"{number}")
        status, said = ends(*one.argv, cwd=tmp_path / f"{number}")
        assert status in (0, 2, 3) and "Traceback" not in said and len(said) < 20_000, (one.family, one.argv)


@pytest.mark.parametrize("place", ["a" * 300, "loop", "pipe", "file", "file/below", "/dev/null", "/proc/self/mem"])
def test_what_cannot_be_a_run_folder_is_refused(tmp_path: Path, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with chdir(tmp_path), refused("--out", place):
        api.run("fedavg", out=place)


def test_a_folder_may_be_named_by_way_of_one_that_is_not_there(tmp_path: Path) -> None:
    with chdir(tmp_path):
        done = api.run(to_tree(small("fedavg", "run.rounds=1", "engine.name=inline")), out="a/../b")
    assert done.status == "done" and {path.name for path in tmp_path.iterdir()} == {"b"}
    assert (tmp_path / "b" / "report.html").exists()


@pytest.mark.parametrize("unit", [EXAMPLE, ("privacy.unit=local",), ("privacy.unit=client",)])
def test_a_private_run_that_released_nothing_has_a_report(tmp_path: Path, unit: tuple[str, ...]) -> None:
    silent = small("fedavg", "engine.name=inline", "privacy.epsilon=5", "cohort.dropout=0.9999", *unit)
    done = api.run(to_tree(silent), out=tmp_path / "run")
    assert done.status == "stopped" and done.privacy["epsilon"]["max"] in (None, 0.0)
    assert (tmp_path / "run" / "report.html").exists()


def test_clients_that_train_alone_and_diverge_are_not_done(tmp_path: Path) -> None:
    alone = small("local", "engine.name=inline", "local.lr=1e30")
    done = api.run(to_tree(alone), out=tmp_path / "run")
    assert done.status == "stopped" and "finite" in done.reason


@pytest.mark.parametrize("place", ["nowhere.csv", "/dev/zero", ".", "short.csv", "text.csv"])
def test_budgets_are_read_before_the_run(tmp_path: Path, place: str) -> None:
    (tmp_path / "short.csv").write_text("client,epsilon\n0,1\n")
    (tmp_path / "text.csv").write_text("client,epsilon\n" + "".join(f"{i},x\n" for i in range(8)))
    with refused("privacy.budgets", place):
        check_run(small("fedavg", *EXAMPLE, f"privacy.budgets=file {tmp_path / place}"))


def test_budgets_may_have_a_mark_of_their_encoding_and_a_blank_in_their_name(tmp_path: Path) -> None:
    rows = "client,epsilon\n" + "".join(f"{i},{i + 1}\n" for i in range(8))
    (tmp_path / "my budgets.csv").write_text(rows, encoding="utf-8-sig")
    check_run(small("fedavg", *EXAMPLE, f"privacy.budgets=file {tmp_path / 'my budgets.csv'}"))


@pytest.mark.slow
def test_a_model_that_opacus_cannot_take_apart_is_refused_before_the_run() -> None:
    attention = ("task.dataset=stars", "task.targets=points", "task.model=vit_b_16", "task.channels=rgb")
    large = load(
        "fedavg",
        [*EXAMPLE, *attention, "task.image_size=224", "privacy.noise_multiplier=1", "privacy.grad_sample=hooks"],
    )
    with refused("privacy.grad_sample"):
        check_run(large)


@pytest.mark.parametrize(("error", "status"), [(MemoryError("large"), 3), (PermissionError(13, "denied", "x"), 2)])
def test_what_the_machine_refuses_is_told(error: Exception, status: int) -> None:
    def command() -> None:
        raise error

    assert outcome(command)[0] == status
