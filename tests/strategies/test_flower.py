"""Flower's own strategies: a run that was interrupted has the bits of one that was not, and what cannot be kept is named."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from helpers.runs import run_inline, small
from helpers.worlds import experiment, run, start
from meadow.arrays.named import Arrays, arrays_sha256
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest
from meadow.simulation.grid import become_server
from meadow.strategies import algorithm
from meadow.strategies.adaptors.flower import FlowerServer, flower
from meadow.strategies.protocol import Algorithm, ClientUpdate, Roles, Setup

ADAM = FedAdam(eta=0.1, beta_1=0.8)
AVGM = Algorithm(lambda setup: FedAvgM(server_momentum=0.7))  # type: ignore[arg-type,return-value]
YOGI = flower(lambda setup: FedYogi(eta=0.05))
MEAN = FedAvg()


@pytest.mark.parametrize("name", ["ADAM", "AVGM", "YOGI"])
def test_interrupted_and_resumed(name: str, tmp_path: Path) -> None:
    plan = small("fedavg", f"strategy.name={__name__}:{name}", "run.rounds=4")
    whole = run_inline(plan, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for left in (tmp_path / "resumed" / "checkpoints").glob("round-0000000[34].*"):
        left.unlink()
    (tmp_path / "resumed" / "summary.json").unlink()
    resumed = run_inline(plan, tmp_path / "resumed", resume=True)
    assert resumed["model_sha256"] == whole["model_sha256"]
    kept = [latest(tmp_path / folder / "checkpoints")[0] for folder in ("whole", "resumed")]
    assert kept[0] is not None and kept[1] is not None and kept[0].strategy
    assert arrays_sha256(kept[0].strategy) == arrays_sha256(kept[1].strategy)


def test_flowers_mean_is_ours(tmp_path: Path) -> None:
    ours = run(experiment(), tmp_path / "ours").arrays
    theirs = run(experiment(f"strategy.name={__name__}:MEAN"), tmp_path / "theirs").arrays
    assert ours.keys() == theirs.keys() == start(experiment()).keys()
    for name, value in ours.items():
        assert np.allclose(value, theirs[name], rtol=1e-6, atol=1e-7)


class Odd(FedAvg):
    """Keeps a value of each kind."""

    def __init__(self) -> None:
        super().__init__(min_available_nodes=1)
        self.kept: Any = {}

    def configure_train(self, server_round: int, *args: Any) -> Any:
        self.kept = {
            server_round: [np.float32(1.5), (b"bytes", None, True), np.zeros((), np.int64), float("inf")],
            "record": ArrayRecord([np.arange(3)]),
            "before": len(self.kept),
        }
        return super().configure_train(server_round, *args)


class Opaque(FedAvg):
    def configure_train(self, *args: Any) -> Any:
        self.draw = np.random.default_rng(0)
        return super().configure_train(*args)


def updated(strategy: Strategy, state: Any = None) -> Any:
    become_server()
    plan = experiment()
    model: Arrays = {"w": np.array([1, 2], np.float32)}
    setup = Setup(plan.strategy, plan.local, 0, Roles(("w",), ("w",), (), ()), {"w": 2}, equal_weights=False)
    replies = [
        ClientUpdate(c, 1, {"w": np.array([c, 0], np.float32)}, {"w": 1.0}, {"num-examples": 1 + c}) for c in (0, 1)
    ]
    return FlowerServer(setup, strategy).update(state or {}, replies, model)


def test_what_a_strategy_keeps_goes_in_and_out() -> None:
    model, state = updated(Odd())
    assert model["w"].tolist() == pytest.approx([2 / 3, 0]) and model["w"].dtype == np.float32
    assert state["flower"].keys() >= {"structure"} and all(isinstance(v, np.ndarray) for v in state["flower"].values())
    _, again = updated(Odd(), state)
    text = bytes(again["flower"]["structure"].tobytes()).decode()
    assert '["before", 3]' in text and '["before", 0]' in bytes(state["flower"]["structure"].tobytes()).decode()


def test_what_no_checkpoint_can_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"Opaque\.draw"):
        updated(Opaque())


def test_a_strategy_is_an_algorithm() -> None:
    assert isinstance(algorithm(f"{__name__}:MEAN"), Algorithm)
