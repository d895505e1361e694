"""Bounds that follow from the arithmetic, and so hold on every processor, in whatever order its kernels add."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays, Named
from meadow.client.loop.training import Trained, Training, train
from meadow.config.schema import Experiment
from meadow.tasks.data import Data
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task

LAMBDA = 4.0


def rounding(operations: float, dtype: Any = np.float32) -> float:
    """How far a result may be off after so many roundings, relative to the sum of its terms' sizes.

    Each rounding is off by at most u, half an ulp of 1, up or down. n of them are off by n u at worst, and by
    LAMBDA sqrt(n) u with probability 1 - 2 exp(-LAMBDA^2 / 2) at least, which is 0.9993 (Higham and Mary 2019, "A new
    approach to probabilistic rounding error analysis", theorem 2.4); since the most of a rounding is rarely reached, far
    more often.
    """
    return LAMBDA * math.sqrt(operations) * float(np.finfo(dtype).eps) / 2


def close(found: Any, exact: Any, operations: float, terms: Any = 0.0, dtype: Any = np.float32, name: str = "") -> None:
    """Each entry of `found` is off the exact one (worked out in float64) by so many roundings of `dtype` at most.

    `terms` is the sum of the sizes of what was added up, for all entries or for each; without cancellation the size of
    the result, which is the least that it counts as.
    """
    one, other = (np.asarray(v.detach() if isinstance(v, Tensor) else v).astype(np.float64) for v in (found, exact))
    assert one.shape == other.shape, (name, one.shape, other.shape)
    apart, bound = np.abs(one - other), rounding(operations, dtype) * np.maximum(np.abs(other), terms)
    assert np.all(apart <= bound), (
        name,
        f"off by {apart.max():.3g}",
        f"{(apart / bound).max():.3g} of the bound",
        one,
        other,
    )


def same_function(found: Any, exact: Any, terms: float = 0.0) -> None:
    """Two ways of working one thing out, both in float64, agree in half of the digits: 1.5e-8 of the largest number.

    `terms`: the size of what was added up, where sums of it may cancel; the least that the largest number counts as.
    A deep network multiplies a rounding by 10^4 or so, which leaves 1e-12; what differs by more is another function.
    """
    one, other = (np.asarray(v.detach() if isinstance(v, Tensor) else v) for v in (found, exact))
    assert one.dtype == other.dtype == np.float64 and one.shape == other.shape
    apart = np.abs(one - other).max()
    bound = math.sqrt(np.finfo(np.float64).eps) * max(np.abs(other).max(), terms)
    assert apart <= bound, (f"off by {apart:.3g}", f"{apart / bound:.3g} of the bound")


def distance(a: Mapping[str, npt.NDArray[Any]], b: Mapping[str, npt.NDArray[Any]]) -> float:
    """The 2-norm of the difference of two states, over the names of the second."""
    return math.sqrt(sum(float(np.square(a[n].astype(np.float64) - b[n]).sum()) for n in b))


NEARBY = 5
OPERATIONS = 64
"""Roundings between the samples of a batch and an entry of their gradient: products and sums over features, channels and
samples forth and back, and the loss. Sums are longer than that only in wide layers, where many roundings cancel."""


def off(steps: int, weights: float, path: float) -> float:
    """How far from the exact end the end of a training in float32 may be, in the 2-norm.

    weights: the norm of the arrays, each of which a step rounds twice (rate times gradient; the sum). path: the sum of the
    steps' lengths: each is off by OPERATIONS roundings of its own length. An error is carried on by the later steps, which
    neither shrink nor stretch it where rate times curvature is small.
    """
    return rounding(2 * steps) * weights + rounding(OPERATIONS * steps) * path


@dataclass(frozen=True)
class Exact:
    """A client's training by the loop in float64. path: the sum of its steps' lengths; slope: the largest length of a
    gradient; stretch: the most that one of NEARBY small random errors of the start (a millionth of it) has grown by at the
    end, 1 at least."""

    start: Arrays
    end: Mapping[str, npt.NDArray[np.float64]]
    losses: dict[str, float]
    steps: int
    path: float
    slope: float
    stretch: float

    @property
    def moved(self) -> float:
        return distance(self.end, self.start)

    @property
    def off(self) -> float:
        """How far from the end a training in float32 may be (`off`), with what its errors become on the way."""
        return self.stretch * off(self.steps, distance(self.start, Named(self.start) * 0), self.path)

    @property
    def followed(self) -> bool:
        """Whether a training in float32 ends so near that a fault of a thousandth of the move would be seen.

        It may not where a rounding decides which of two numbers is the maximum of a pooling, or on which side of zero a
        ReLU is: such a client ends elsewhere by chance, and shows nothing.
        """
        return 0 < self.off < self.moved / 1000

    @property
    def losses_off(self) -> float:
        """How far from the losses: by their own roundings, and by those of the weights times the slope."""
        return rounding(OPERATIONS) * max(1.0, *self.losses.values()) + self.slope * self.off


def exactly(
    model: nn.Module, start: Arrays, data: Data, task: Task, experiment: Experiment, round_: int, client: int
) -> Exact:
    """Train a copy of the model from `start` in float64; and again from NEARBY starts that are off by a millionth."""
    whole, samples = copy.deepcopy(model).double(), in_double(data)

    def trained(begin: Arrays) -> tuple[Trained, Arrays, list[dict[str, Tensor]], float]:
        load_into(whole, begin)
        places: list[dict[str, Tensor]] = []
        slopes = [0.0]

        def look(learning: Mapping[str, nn.Parameter]) -> None:
            places.append({n: p.detach().clone() for n, p in learning.items()})
            slopes.append(math.sqrt(sum(float(p.grad.square().sum()) for p in learning.values() if p.grad is not None)))

        torch.set_default_dtype(torch.float64)  # of class weights
        try:
            done = train(whole, Training(samples, round_, client, experiment.local, correct=look), task, experiment)
        finally:
            torch.set_default_dtype(torch.float32)
        places.append({n: p.detach().clone() for n, p in whole.named_parameters() if n in places[-1]})
        return done, state_of(whole), places, max(slopes)

    exact_values = floats(start)
    exact_start: Arrays = {**exact_values}
    done, end, places, slope = trained(exact_start)
    path = sum(math.sqrt(sum(float((b[n] - a[n]).square().sum()) for n in a)) for a, b in itertools.pairwise(places))
    draw, stretch = np.random.default_rng(0), 1.0
    for _ in range(NEARBY):
        other: Arrays = {n: v * (1 + 1e-6 * draw.choice([-1, 1], v.shape)) for n, v in exact_values.items()}
        _, beside, *_ = trained(other)
        stretch = max(stretch, distance(beside, end) / distance(other, exact_start))
    return Exact(exact_start, floats(end), done.losses, done.steps, path, slope, stretch)


def first_followed(draws: Iterable[Data], by_loop: Callable[[Data], Exact]) -> tuple[Data, Exact]:
    """The first client's data whose training float32 follows (`Exact.followed`), and its training in float64."""
    return next((data, exact) for data, exact in ((data, by_loop(data)) for data in draws) if exact.followed)


def run_off(experiment: Experiment) -> float:
    """How far the end of a run in float32 may be from the exact one: each round adds what its clients' means are off, as
    client 0 stands for here, and the later rounds carry it on."""
    task = open_task(experiment)
    data, start = task.client(0).train, initial_state(experiment)
    exact, rounds = exactly(task.new_model(), start, data, task, experiment, 1, 0), experiment.run.rounds
    return rounds * exact.stretch ** (rounds - 1) * exact.off


def in_double(data: Data) -> Data:
    """The same samples in float64, so that what is trained on them tells a formula from one that is nearly the same."""
    y = {name: values.double() if values.is_floating_point() else values for name, values in data.y.items()}
    return Data(data.x.double(), y)


def stepped(after: Arrays, before: Arrays, by: Mapping[str, Any], dtype: Any = np.float64) -> None:
    """`after` is `before` less `by`: to a thousand roundings of numbers of size 1 (or larger), as many as a full
    batch of some fifty samples takes in a small model."""
    assert after.keys() == before.keys() >= by.keys()
    for name, value in after.items():
        assert value.dtype == dtype, name
        less = np.asarray(by[name]) if name in by else np.zeros(())
        close(value, before[name].astype(np.float64) - less, 1000, terms=1.0, dtype=dtype, name=name)


def floats(arrays: Arrays) -> dict[str, npt.NDArray[np.float64]]:
    """The arrays in float64, to be worked with."""
    return {name: value.astype(np.float64) for name, value in arrays.items()}
