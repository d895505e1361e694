"""Every point of (strategy, trainable, placement, share): two rounds, or a refusal with a reason. And what must last."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message

from helpers.runs import run_inline, run_with, small
from meadow.client.app import app
from meadow.config.algorithms import ALGORITHMS
from meadow.config.schema import SHARES
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest

TINY = (
    "partition.clients=3", "partition.law=iid", "run.rounds=2", "task.hidden=3", "local.steps=1", "evaluate.on=global",
    "evaluate.every=2", "task.dataset=helpers.worlds:points", "task.targets=c", "task.kinds=class", "partition.min_size=3",
)  # fmt: skip

PATTERN = "heads.c.bias,trunk.*"
"""All but the head's weights."""

NORMED = "helpers.worlds:normed"


TRAINABLE = ("all", "head", "last:1", "gradual", "lora", "adapters", "fisher")
FEW = [("all", "mlp"), ("body", "mlp"), ("all-but-norms", NORMED), ("trainable", "mlp"), (PATTERN, "mlp")]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_combination_runs_or_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    every_combination(name, tmp_path, FEW, TRAINABLE[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_combination_of_all_kinds(name: str, tmp_path: Path) -> None:
    every_combination(name, tmp_path, list(itertools.product((*SHARES, PATTERN), (NORMED, "mlp"))), TRAINABLE)


def every_combination(name: str, out: Path, pairs: list[tuple[str, str]], trainable: Sequence[str]) -> None:
    ran = 0
    points = itertools.product(trainable, ("federated", "local", "pooled"), pairs)
    for number, (learns, placement, (share, model)) in enumerate(points):
        settings = (
            f"strategy.name={name}", f"local.trainable={learns}", f"run.placement={placement}",
            f"strategy.share={share}", f"task.model={model}", "local.fisher_on=local",
        )  # fmt: skip
        try:
            experiment = small("fedavg", *TINY, *settings)
            summary = run_inline(experiment, out / str(number))
        except UserError as error:
            assert "write" in str(error).lower(), (settings, str(error))
            continue
        assert summary["status"] == "done" and summary["rounds"] == 2, (settings, summary["reason"])
        checkpoint, _ = latest(out / str(number) / "checkpoints")
        assert checkpoint is not None
        assert all(np.isfinite(v).all() for v in (checkpoint.arrays | checkpoint.strategy).values()), settings
        ran += 1
    assert ran >= 3


STATEFUL = (
    "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "feddyn", "moon", "ditto", "apfl", "pfedme", "fedrod",
    "fedrep", "median",
)  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("name", STATEFUL)
def test_a_resumed_run_has_the_same_bits(name: str, tmp_path: Path) -> None:
    """Killed in the third of four rounds, after the clients trained and before the server wrote anything."""
    share = "body" if name == "fedrep" else "all"
    settings = (f"strategy.share={share}", "strategy.bucket=2") if name == "median" else (f"strategy.share={share}",)
    cohort = ("run.rounds=4", "cohort.size=3", "partition.clients=4", "strategy.mix_lr=0.1", "local.epochs=1")
    experiment = small("fedavg", f"strategy.name={name}", *settings, *cohort)
    expected = run_inline(experiment, tmp_path / "whole")

    def killed(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if any(record.get("round") == 3 for record in message.content.config_records.values()):
            raise Killed
        return reply

    with pytest.raises(Killed):
        run_with(killed, experiment, tmp_path / "cut")
    resumed = run_inline(experiment, tmp_path / "cut", resume=True)
    for key in ("model_sha256", "personal_sha256", "metrics", "rounds"):
        assert resumed[key] == expected[key], key
    one, other = (latest(tmp_path / n / "checkpoints")[0] for n in ("whole", "cut"))
    assert one is not None and other is not None and one.strategy.keys() == other.strategy.keys()
    assert all(np.array_equal(one.strategy[n], other.strategy[n]) for n in one.strategy)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "processes"])
def test_strategies_have_the_same_bits_on_every_engine(engine: str, tmp_path: Path) -> None:
    from meadow.simulation.launch import engine as launcher

    with launcher(engine, 2, 1) as launch:
        for name in ("scaffold", "ditto", "fednova", "median") if engine == "ray" else ("scaffold", "ditto"):
            few = ("run.rounds=2", f"engine.name={engine}", "engine.workers=2")
            experiment = small("fedavg", f"strategy.name={name}", *few)
            found = launch(experiment, tmp_path / name, False)
            expected = run_inline(experiment, tmp_path / f"{name}-inline")
            for key in ("model_sha256", "personal_sha256", "metrics"):
                assert found[key] == expected[key], (name, key)
