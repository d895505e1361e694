"""The loop without its tape against the loop, whatever the layers, the optimiser and the clients' sizes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.rounding import Exact, close, distance, exactly, first_followed, run_off
from helpers.runs import run_inline, small
from meadow.arrays.sums import weighted_sum
from meadow.client.loop.training import Training
from meadow.client.trainers.choose import trainers_of
from meadow.client.trainers.direct import Direct
from meadow.client.trainers.job import job_of
from meadow.client.trainers.kernel import KernelTrainer
from meadow.client.trainers.layers import (
    Convolution,
    Descent,
    Flatten,
    Linear,
    Operation,
    OverTime,
    Pool,
    Relu,
    Tanh,
    operations,
)
from meadow.client.trainers.network import Layer, network
from meadow.config.schema import Experiment
from meadow.native import pooling
from meadow.native import sums as adding
from meadow.runtime.seeds import torch_generator, torch_seeded
from meadow.server import checkpoints
from meadow.strategies.check import load
from meadow.tasks.data import MISSING, Data, Inputs, Target
from meadow.tasks.evaluation import state_of
from meadow.tasks.features import View
from meadow.tasks.models import networks
from meadow.tasks.models.multihead import Multihead
from meadow.tasks.numerics import channels_last
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task

DIGIT = Target("digit", "class", 10)
SIZES = (37, 20, 1, 8, 23)
"""Training samples of the clients: whole batches and not, fewer than a batch, one."""


def relu_first(task: object, inputs: Inputs) -> tuple[nn.Module, int]:
    """ReLU in front of the pooling, as it is usually written; no bias; an edge that pooling leaves out."""
    trunk = nn.Sequential(
        nn.Conv2d(inputs.shape[0], 4, (3, 5), padding=(1, 2), bias=False),
        nn.ReLU(),
        nn.MaxPool2d((2, 3)),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.Tanh(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(5 * 2 * 1, 7),
        nn.ReLU(),
    )
    return trunk, 7


def wide(task: object, inputs: Inputs) -> tuple[nn.Module, int]:
    """A layer so large that oneDNN multiplies (`meadow.tasks.numerics.LARGE`)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 300), nn.ReLU()), 300


CASES = {
    "mlp": (networks.mlp, (1, 8, 8), ()),
    "flat": (networks.mlp, (21,), ("local.momentum=0.9", "local.weight_decay=0.01")),
    "cnn": (networks.cnn, (1, 9, 10), ("local.momentum=0.9", "local.nesterov=true")),
    "lenet": (networks.lenet, (3, 14, 16), ("local.lr_factors=trunk.conv1 0.1",)),
    "mcmahan": (networks.mcmahan_cnn, (1, 28, 28), ("local.momentum=0.5", "local.epochs=1")),
    "wide": (wide, (1, 32, 32), ()),
    "relu first": (relu_first, (2, 12, 12), ("local.momentum=0.5", "local.weight_decay=0.1")),
    "last layers": (networks.cnn, (1, 8, 8), ("local.trainable=last:1", "local.momentum=0.9")),
    "head": (networks.lenet, (1, 14, 14), ("local.trainable=head",)),
    "windows": (networks.cnn1d, (3, 20), ("local.momentum=0.9",)),
    "odd windows": (networks.cnn1d, (2, 21), ()),
    "window layers": (networks.cnn1d, (3, 16), ("local.trainable=last:1",)),
    "steps": (networks.mlp, (1, 8, 8), ("local.steps=5",)),
}


def setting(case: str) -> tuple[KernelTrainer, Task, nn.Module, list[Data]]:
    make, shape, settings = CASES[case]
    plan = ("local.epochs=3", "local.batch_size=8", "local.momentum=0", "task.hidden=16")
    experiment = load("fedavg", [*plan, *settings])
    with torch_seeded(1, "test"):
        trunk, features = make(experiment.task, Inputs(shape))
        model = channels_last(Multihead(trunk, {"digit": nn.Linear(features, 10)}, {"digit": False}))
    template = open_task(experiment)
    task = Task(template.dataset, template.split, (DIGIT,), (0.7,), experiment.task, 0, template.held)
    found = network(model, shape, task.targets, task.weights)
    return KernelTrainer(Direct, experiment, task, found), task, model, [samples(shape, size) for size in SIZES]


def samples(shape: tuple[int, ...], size: int, variant: int = 0) -> Data:
    draw = torch_generator(size, "samples", variant)
    return Data(torch.randn(size, *shape, generator=draw), {"digit": torch.randint(10, (size,), generator=draw)})


def followed(case: str, model: nn.Module, task: Task, experiment: Experiment, number: int) -> tuple[Data, Exact]:
    """A client's data, of one of ten draws, and its second round by the loop in float64."""
    draws = (samples(CASES[case][1], SIZES[number], variant) for variant in range(10))
    start = state_of(model)
    return first_followed(draws, lambda data: exactly(model, start, data, task, experiment, 2, number))


@pytest.mark.parametrize("case", CASES)
def test_clients_move_as_by_the_loop(case: str) -> None:
    """Each client's arrays and losses are those of the loop in float64, to the roundings of its steps; what does not learn
    stays as it was; and a block's sum is what `weighted_sum` defines of them, bit for bit."""
    faster, task, model, _ = setting(case)
    start, plan = state_of(model), faster.experiment.local
    rates = faster.rates(2, plan)
    clients, by_loop = zip(*(followed(case, model, task, faster.experiment, n) for n in range(len(SIZES))), strict=True)
    members = [faster.member(Training(data, 2, number, plan)) for number, data in enumerate(clients)]
    done = faster.made.train(start, [members], rates)
    for number, (exact, arrays, losses) in enumerate(zip(by_loop, done.arrays, done.losses, strict=True)):
        assert 0 < distance(arrays, exact.end) <= exact.off
        assert all(np.array_equal(arrays[n], start[n]) for n in start.keys() - rates.keys())
        reported = faster.trained(members[number], losses)
        assert reported.steps == exact.steps
        assert reported.losses == pytest.approx(exact.losses, rel=0, abs=exact.losses_off)
    weights = [{n: float(i + 2 + (n == next(iter(start)))) for n in start} for i in range(len(clients))]
    for given in (weights, [dict.fromkeys(start, float(i + 1)) for i in range(len(clients))]):
        (total,) = faster.made.train(start, [members], rates, [given]).totals
        expected = weighted_sum(zip(given, done.arrays, strict=True)).sums
        assert total is not None and all(total[n].tobytes() == expected[n].tobytes() for n in start)


def test_a_block_with_infinite_numbers_has_no_sum() -> None:
    faster, _, model, clients = setting("mlp")
    clients[1].x[3] = float("inf")
    plan = faster.experiment.local
    members = [faster.member(Training(data, 1, number, plan)) for number, data in enumerate(clients)]
    weights = [[dict.fromkeys(state_of(model), 1.0)] * 2, [dict.fromkeys(state_of(model), 1.0)] * 3]
    rates = faster.rates(1, faster.experiment.local)
    totals = faster.made.train(state_of(model), [members[:2], members[2:]], rates, weights).totals
    assert totals[0] is None and totals[1] is not None


@pytest.mark.parametrize("preset", ["fedavg", "fedadam", "krum", "fedper", "ditto"])
def test_runs_have_the_same_bits_by_blocks_and_by_clients(preset: str, tmp_path: Path) -> None:
    """Whether blocks are trained and added up as one, or clients one by one; and a run by the loop is hardly another."""
    settings = ("local.momentum=0", "partition.clients=23", "partition.min_size=3", "evaluate.every=2")
    blocks = run_inline(small(preset, *settings), tmp_path / "blocks")
    # A bound on updates lets each client answer for itself; this one bounds nothing.
    single = run_inline(small(preset, *settings, "cohort.max_norm=1e6"), tmp_path / "single")
    assert [single[key] for key in ("model_sha256", "metrics")] == [blocks[key] for key in ("model_sha256", "metrics")]
    loop = run_inline(small(preset, *settings, "engine.trainer=loop"), tmp_path / "loop")
    assert "direct" in blocks["engine"]["training"] and loop["engine"]["training"].keys() == {"loop"}
    found, by_loop = (checkpoints.latest(tmp_path / run / "checkpoints")[0] for run in ("blocks", "loop"))
    assert found is not None and by_loop is not None
    experiment = small(preset, *settings, "engine.trainer=loop")
    start = initial_state(experiment)
    moved = distance(by_loop.arrays, {n: start[n] for n in by_loop.arrays})
    assert distance(found.arrays, by_loop.arrays) <= 2 * run_off(experiment) < moved / 500


def test_what_the_loop_alone_can_do_is_left_to_it() -> None:
    """Missing labels, weights of classes, several targets, values."""
    experiment = load("fedavg")
    task = open_task(experiment)
    job = job_of(experiment, View(task.new_model(), task))
    assert not Direct.why_not(job)
    others: list[dict[str, Any]] = [
        {"complete": False},
        {"weighted": True},
        {"kinds": ("class", "value")},
        {"kinds": ("value",)},
    ]
    others += [{"correction": True}, {"term": True}]
    assert len({Direct.why_not(replace(job, **other)) for other in others} - {""}) == 5
    trainers = trainers_of(experiment, View(task.new_model(), task))
    data = Data(torch.zeros(2, 64), {t.name: torch.tensor([1, MISSING]) for t in task.targets})
    assert trainers.choice(data).trainer.name == "loop"


def test_relu_comes_after_the_pooling_that_follows_its_layer() -> None:
    trunk, features = relu_first(None, Inputs((2, 12, 12)))
    model = Multihead(trunk, {"digit": nn.Linear(features, 10)}, {"digit": False})
    found = operations(network(model, (2, 12, 12), [DIGIT], [1.0]), Descent(load("fedavg").local))
    kinds = [Convolution, Pool, Convolution, Tanh, Pool, Flatten, Linear, Relu, Linear]
    assert [type(operation) for operation in found] == kinds


@pytest.mark.parametrize("compiled", [True, False])
def test_sums_have_the_bits_of_their_definition(compiled: bool) -> None:
    """Compiled or by NumPy, in one go or in two, with weights by array; numbers that are not finite are found."""
    if compiled and not adding.available():
        pytest.skip("sums.c does not compile here")
    draw = np.random.default_rng(0)
    begins, size = {"a": 0, "b": 16, "c": 16 + 70_000}, 16 + 70_000 + 33
    works = [draw.normal(size=size).astype(np.float32) for _ in range(4)]
    weights = [dict.fromkeys(begins, float(3 * k + 1)) | ({"c": 0.3} if k == 2 else {}) for k in range(4)]
    stops = [*list(begins.values())[1:], size]
    arrays = [{n: w[b:e] for (n, b), e in zip(begins.items(), stops, strict=True)} for w in works]
    expected = weighted_sum(zip(weights, arrays, strict=True)).sums
    total = np.full(size, np.nan)
    assert adding.add_up(total, works[:3], weights[:3], begins, True, compiled)
    assert adding.add_up(total, works[3:], weights[3:], begins, False, compiled)
    assert all(total[b:e].tobytes() == expected[n].tobytes() for (n, b), e in zip(begins.items(), stops, strict=True))
    for wrong in (np.inf, -np.inf, np.nan):
        works[2][size - 1] = wrong
        assert not adding.add_up(total, works, weights, begins, True, compiled)
    assert adding.add_up(total, works[:2], weights[:2], begins, True, compiled)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("window", [(2, 2), (1, 2), (3, 2), (2, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 6, 16, 17, 40])
@pytest.mark.parametrize("relu", [False, True])
def test_compiled_pooling_has_the_bits_of_torchs(
    channels: int, window: tuple[int, int], ceil: bool, relu: bool
) -> None:
    """Forward and back, where edges are left out or part of a window, where numbers are equal, and where some are none."""
    if not pooling.available():
        pytest.skip("pooling.c does not compile here")
    draw, whole = torch.Generator().manual_seed(channels), math.ceil if ceil else math.floor
    for h, w in ((2, 5), (7, 11), (12, 10)):
        after = (channels, whole(h / window[0]), whole(w / window[1]))
        if 0 in after:
            continue
        x = torch.randint(4, (3, channels, h, w), generator=draw).float().contiguous(memory_format=torch.channels_last)
        x[0, :, -1, -1] = -0.0
        x[1, 0, 0, 1] = x[2, -1, 1, 0] = torch.nan
        x[:, :, :, 3] -= 3  # so that ReLU has something to do
        given = x.clone().requires_grad_()
        expected = F.max_pool2d(given, window, ceil_mode=ceil)
        expected = expected.relu() if relu else expected
        back = torch.randn(expected.shape, generator=draw)
        expected.backward(back)  # type: ignore[no-untyped-call]
        pool = Pool(Layer("pool", (channels, h, w), after, kernel=window, ceil=ceil), relu)
        found = [each.nan_to_num(-1).contiguous().view(torch.int32) for each in (pool.forward(x), expected.detach())]
        assert torch.equal(*found) and given.grad is not None
        assert torch.equal(pool.backward(back, further=True), given.grad)


@pytest.mark.parametrize("channels", [1, 6, 17])
def test_compiled_pooling_writes_nothing_behind_its_arrays(channels: int) -> None:
    room = 64
    if not pooling.available():
        pytest.skip("pooling.c does not compile here")
    sizes = (4, 6, channels, 2, 3, 2, 2)
    large, small = (torch.full((2 * h * w * channels + room,), 7.0) for h, w in ((4, 6), (2, 3)))
    places = torch.full((len(small),), 7, dtype=torch.int32)
    x, out, where = (
        each[:-room].view(2, h, w, channels) for each, h, w in ((large, 4, 6), (small, 2, 3), (places, 2, 3))
    )
    pooling.pool_forward(x, out, where, sizes, relu=False)
    pooling.pool_backward(out, where, x, sizes)
    assert all(bool((each[-room:] == 7).all()) for each in (large, small, places))
    assert int(large[:-room].long().sum()) == 7 * (len(small) - room)


def test_pooling_without_a_compiler_is_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    x, back = torch.randn(4, 6, 9, 8, generator=draw), torch.randn(4, 6, 4, 4, generator=draw)
    found = []
    for native in (True, False):
        for relu in (False, True):
            pool = Pool(Layer("pool", (6, 9, 8), (6, 4, 4), kernel=(2, 2)), relu, native)
            found.append((pool.forward(x), pool.backward(back, further=True)))
    compiled, by_torch = found[:2], found[2:]
    assert all(
        torch.equal(a, b)
        for one, other in zip(compiled, by_torch, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_equal_maxima_have_torchs_gradients() -> None:
    """Small whole numbers, of which many are equal: of a pair the first learns; over time they share."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(3, (5, 8, 12), generator=draw).float()
    cases: list[tuple[Operation, nn.Module]] = [
        (Pool(Layer("pool", (8, 1, 12), (8, 1, 6), kernel=(1, 2))), networks.HalfOfTime()),
        (OverTime(), networks.MeanAndMaximum()),
    ]
    for operation, module in cases:
        given = x.clone().requires_grad_()
        expected = module(given)
        back = torch.randn(expected.shape, generator=draw)
        expected.backward(back)
        window = x.transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(2)
        found = operation.forward(window)
        assert torch.equal(found.reshape(expected.shape), expected) and given.grad is not None
        found_back = operation.backward(back if back.dim() == 2 else back.unsqueeze(2), further=True)
        # Each entry is a share of the maximum's gradient and of the mean's: two quotients and a sum.
        close(found_back.squeeze(2), given.grad.double(), 8, float(back.abs().max()))
