"""A world in which every algorithm can be worked out by hand: two clients with a few points each, a linear trunk and a
linear head, the squared error, full batches, float64 throughout. Whole runs go through the inline engine.

The hand's side stands here too: `gradient` is written out, without autograd, and `data` gives a client's points.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from helpers.runs import run_inline
from meadow.arrays.files import read_arrays
from meadow.arrays.named import Arrays
from meadow.config import schema
from meadow.config.schema import Experiment
from meadow.server.checkpoints import Checkpoint, latest
from meadow.strategies.check import load
from meadow.tasks.data import Inputs, Part, Raw
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

Floats = npt.NDArray[np.float64]
State = dict[str, Floats]

TRUNK = "trunk.weight"
WEIGHT, BIAS = "heads.y.weight", "heads.y.bias"
LR = 0.05
N = [3.0, 6.0]
"""Training points of the clients: three fifths of 5 and of 10."""


def points(task: schema.Task) -> Raw:
    """Client a has 5 points, b 10; a's are about a line that is not b's. "c" is whether y is above its middle."""
    draw = np.random.default_rng(5)
    x = draw.normal(size=(15, 2)).astype(np.float32)
    owner = np.array(["a"] * 5 + ["b"] * 10)
    y = np.where(owner == "a", x[:, 0] - x[:, 1], 2 * x[:, 1] + 0.5).astype(np.float32)
    columns: dict[str, npt.NDArray[Any]] = {"y": y, "c": (y > 0.2).astype(np.int64)}
    test = Part(torch.from_numpy(x[:4].copy()), {name: column[:4] for name, column in columns.items()})
    return Raw("points", Part(torch.from_numpy(x), columns, owner), test)


class Linear(nn.Linear):
    """A linear trunk without a bias, in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def linear(task: schema.Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """The trunk, in float64: two inputs, two features."""
    return Linear(2, 2, bias=False).double(), 2


def layers(task: schema.Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """The same trunk in layers that every trainer knows."""
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)), 2


def normed(task: schema.Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """A trunk for any numbers, with a batch normalisation that no name gives away."""
    size = int(np.prod(inputs.shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.BatchNorm1d(8), nn.ReLU()), 8


def experiment(*overrides: str) -> Experiment:
    """Two rounds of two full-batch steps of plain SGD, both clients; what is overridden apart."""
    plain = (
        "task.dataset=helpers.worlds:points", "task.model=helpers.worlds:linear", "task.targets=y", "task.kinds=value",
        "partition.law=natural", "partition.clients=2", "partition.min_size=3", "run.rounds=2",
        "local.batch_size=0", "local.epochs=2", "local.momentum=0", f"local.lr={LR}",
    )  # fmt: skip
    return load("fedavg", [*plain, *overrides])


def start(plan: Experiment) -> State:
    """The state before the first round."""
    return {name: value.astype(np.float64) for name, value in initial_state(plan).items()}


def data(plan: Experiment, number: int) -> tuple[Floats, Floats]:
    """A client's training points, in float64."""
    own = open_task(plan).client(number).train
    return own.x.numpy().astype(np.float64), own.y["y"].numpy().astype(np.float64)


def gradient(w: Mapping[str, Floats], points: tuple[Floats, Floats]) -> State:
    """Of the mean over points of (h . W x + b - y)^2: by h, 2 mean(r W x); by b, 2 mean(r); by W, 2 mean(r h x')."""
    x, y = points
    features = x @ w[TRUNK].T
    r = features @ w[WEIGHT][0] + w[BIAS][0] - y
    return {
        TRUNK: 2 * np.outer(w[WEIGHT][0], r @ x / len(y)),
        WEIGHT: 2 * (r @ features / len(y))[None],
        BIAS: np.array([2 * r.mean()]),
    }


def step(w: State, direction: Mapping[str, Floats], rate: float = LR) -> State:
    """w - rate * direction, for the names that it has."""
    return w | {name: w[name] - rate * value for name, value in direction.items()}


def descend(w: State, points: tuple[Floats, Floats], steps: int = 2, only: Callable[[str], bool] = bool) -> State:
    """Plain gradient steps, on the names that `only` picks."""
    for _ in range(steps):
        w = step(w, {name: value for name, value in gradient(w, points).items() if only(name)})
    return w


def mean(states: list[State], weights: list[float]) -> State:
    """The weighted mean of the states, name by name."""
    return {
        name: sum((w * s[name] for w, s in zip(weights, states, strict=True)), np.zeros(())) / sum(weights)
        for name in states[0]
    }


def run(plan: Experiment, out: Path) -> Checkpoint:
    """Run it, and return the last checkpoint: the shared arrays, and what the strategy keeps."""
    assert run_inline(plan, out)["status"] == "done"
    checkpoint, _ = latest(out / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def stored(out: Path, number: int, round_: int = 2) -> Arrays:
    """What a client has of its own after a round."""
    (place,) = (out / "state").rglob(f"clients/{number}/round-{round_:08d}.safetensors")
    return read_arrays(place)


def same(found: Mapping[str, npt.NDArray[np.generic]], by_hand: Mapping[str, Floats], digits: float = 1e-13) -> None:
    """Equal to float64 rounding: within `digits` of the larger of the value and 1."""
    assert found.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert found[name].dtype == np.float64 and found[name].shape == value.shape, name
        apart = np.abs(found[name].astype(np.float64) - value) / np.maximum(np.abs(value), 1)
        assert apart.max(initial=0.0) <= digits, (name, found[name], value)
