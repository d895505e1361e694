"""What trains by default, held to a gradient that is written out in float64: two rounds of federated averaging of a linear
trunk and a softmax head, in batches of two, by SGD with momentum and weight decay. The trainer works in float32.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from helpers.rounding import close, rounding
from helpers.runs import run_inline
from helpers.worlds import Floats, N, State, experiment, mean
from meadow.config.schema import Experiment
from meadow.runtime.seeds import torch_generator
from meadow.server.checkpoints import latest
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

TRUNK, WEIGHT, BIAS = "trunk.1.weight", "heads.c.weight", "heads.c.bias"
PLAN = experiment(
    "task.model=helpers.worlds:layers", "task.targets=c", "task.kinds=class", "local.batch_size=2", "local.epochs=3",
    "local.lr=0.2", "local.momentum=0.9", "local.weight_decay=0.01",
)  # fmt: skip
OPERATIONS = 32
"""Roundings of a weight in a step: sums of 2 features, 2 classes and 2 samples on the way forth and back (12 products and
sums), the softmax's exponential, sum, logarithm and difference, the mean; decay, momentum and step."""


def gradient(w: State, x: Floats, y: npt.NDArray[np.int64]) -> State:
    """Of the mean over the batch of -log softmax(H W x + b)_y: with d = (p - e_y) / n, by H, d' (W x); by b, sum d; by W,
    (d H)' x."""
    features = x @ w[TRUNK].T
    scores = features @ w[WEIGHT].T + w[BIAS]
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    d = (p - np.eye(2)[y]) / len(y)
    return {TRUNK: (d @ w[WEIGHT]).T @ x, WEIGHT: d.T @ features, BIAS: d.sum(0)}


def by_hand(plan: Experiment, momentum: float = 0.9) -> tuple[State, float, int]:
    """The last model; the sum of the sizes of what was added to its weights; and a client's steps."""
    w = {name: value.astype(np.float64) for name, value in initial_state(plan).items()}
    terms, steps = max(float(np.abs(value).max()) for value in w.values()), 0
    for round_ in (1, 2):
        ends, largest = [], 0.0
        for client in (0, 1):
            own = open_task(plan).client(client).train
            x, y = own.x.numpy().astype(np.float64), own.y["c"].numpy()
            at, velocity, moved, taken = dict(w), dict[str, Floats](), 0.0, 0
            for epoch in range(plan.local.epochs):
                draw = torch_generator(plan.run.seed, "shuffle", round_, client, epoch)
                order = torch.randperm(len(y), generator=draw).numpy()
                for batch in (order[i : i + 2] for i in range(0, len(y), 2)):
                    slope = gradient(at, x[batch], y[batch])
                    for name, value in slope.items():
                        with_decay = value + plan.local.weight_decay * at[name]
                        velocity[name] = momentum * velocity[name] + with_decay if name in velocity else with_decay
                    at = {name: value - plan.local.lr * velocity[name] for name, value in at.items()}
                    moved += plan.local.lr * max(float(np.abs(v).max()) for v in velocity.values())
                    taken += 1
            ends.append(at)
            largest, steps = max(largest, moved), max(steps, taken)
        w = mean(ends, N)
        terms += largest
    return w, terms, steps


def test_the_default_trainer_is_the_hand_s(tmp_path: Path) -> None:
    """To the roundings of two rounds' steps, of the sizes that were added up: 1e-5 or so of a weight."""
    summary = run_inline(PLAN, tmp_path)
    assert (summary["status"], summary["engine"]["training"]) == ("done", {"direct": 4})
    checkpoint, _ = latest(tmp_path / "checkpoints")
    expected, terms, steps = by_hand(PLAN)
    assert checkpoint is not None and checkpoint.arrays.keys() == expected.keys()
    for name, value in expected.items():
        close(checkpoint.arrays[name], value, 2 * steps * OPERATIONS, terms, name=name)
    other, *_ = by_hand(PLAN, momentum=0.899)  # a thousandth less would be seen
    with pytest.raises(AssertionError):
        for name, value in other.items():
            close(checkpoint.arrays[name], value, 2 * steps * OPERATIONS, terms, name=name)
    assert rounding(2 * steps * OPERATIONS) * terms < 1e-4
