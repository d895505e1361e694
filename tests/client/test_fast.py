"""`engine.exact = false` against the training loop: the same samples and steps, sums but for their order; who is covered."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers.refusals import refused
from helpers.rounding import LAMBDA, Exact, distance, exactly, first_followed, floats, off
from helpers.runs import run_inline, small
from meadow.arrays.named import Arrays, Named
from meadow.benchmarks import gpu
from meadow.benchmarks.workloads import LR
from meadow.client.loop.training import Training
from meadow.client.trainers.direct import Direct
from meadow.client.trainers.fused import Fused
from meadow.client.trainers.job import beyond_plain_steps, job_of
from meadow.client.trainers.kernel import KernelTrainer, Member
from meadow.client.trainers.network import Unknown, network
from meadow.client.trainers.stacked import Stacked
from meadow.config.schema import Engine, Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_generator, torch_seeded
from meadow.simulation.launch import engine
from meadow.strategies.check import load
from meadow.tasks.data import MISSING, Data, Inputs, Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.features import View
from meadow.tasks.models import networks
from meadow.tasks.models.multihead import Multihead
from meadow.tasks.task import Task, open_task

DIGIT, SLANT = Target("digit", "class", 10), Target("slant", "value", 1, scale=2.0, offset=0.5)
WEIGHTED = Target("digit", "class", 10, weights=tuple(0.5 + 0.1 * i for i in range(10)))


def tanh_cnn(task: object, inputs: Inputs) -> tuple[nn.Module, int]:
    """Rectangular kernels and windows, tanh, no bias, an edge that pooling leaves out."""
    trunk = nn.Sequential(
        nn.Conv2d(inputs.shape[0], 3, (3, 6), padding=(1, 2), bias=False),
        nn.Tanh(),
        nn.MaxPool2d((2, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 2, 7), nn.Tanh()),
    )
    return trunk, 7


CASES = {
    "mlp": (networks.mlp, (1, 8, 8), (DIGIT, SLANT), ()),
    "flat": (networks.mlp, (21,), (SLANT,), ("local.momentum=0.9", "local.weight_decay=0.01")),
    "cnn": (networks.cnn, (1, 9, 10), (DIGIT, SLANT), ("local.momentum=0.9", "local.nesterov=true")),
    "lenet": (networks.lenet, (2, 14, 16), (WEIGHTED,), ("local.lr_factors=trunk.conv1 0.1",)),
    "tanh": (tanh_cnn, (2, 8, 8), (DIGIT,), ("local.momentum=0.5", "local.weight_decay=0.1")),
    "last layers": (networks.cnn, (1, 8, 8), (DIGIT,), ("local.trainable=last:1", "local.momentum=0.9")),
    "steps": (networks.mlp, (1, 8, 8), (DIGIT,), ("local.steps=5",)),
}
SIZES = (37, 20, 1, 8, 23)
"""Training samples of the clients: whole batches and not, fewer than a batch, one."""


def setting(case: str) -> tuple[Experiment, Task, nn.Module, list[Data]]:
    """An experiment, its task and model, and clients of uneven sizes; some of their labels are missing."""
    make, shape, targets, settings = CASES[case]
    plan = ("local.epochs=3", "local.batch_size=8", "local.momentum=0", "task.hidden=16", "engine.exact=false")
    experiment = load("fedavg", [*plan, *settings])
    with torch_seeded(1, "test"):
        trunk, features = make(experiment.task, Inputs(shape))
        heads = {t.name: nn.Linear(features, t.size) for t in targets}
    model = Multihead(trunk, heads, {t.name: t.kind == "value" for t in targets})
    template = open_task(experiment)
    weights = (1.0, 0.3)[: len(targets)]
    task = Task(template.dataset, template.split, targets, weights, experiment.task, 0, template.held)
    return experiment, task, model, [samples(shape, size) for size in SIZES]


def samples(shape: tuple[int, ...], size: int, variant: int = 0) -> Data:
    draw = torch_generator(size, "samples", variant)
    digit, slant = torch.randint(10, (size,), generator=draw), torch.randn(size, generator=draw)
    if size > 1:
        digit[::5], slant[1::4] = MISSING, float("nan")
    return Data(torch.randn(size, *shape, generator=draw), {"digit": digit, "slant": slant})


def kernels(kind: str, experiment: Experiment, task: Task, model: nn.Module, shape: tuple[int, ...]) -> KernelTrainer:
    found = network(model, shape, task.targets, task.weights)
    return KernelTrainer(Fused if kind == "fused" else Stacked, experiment, task, found)


def members_of(trainer: KernelTrainer, clients: list[Data], round_: int = 1) -> list[Member]:
    plan = trainer.experiment.local
    return [trainer.member(Training(data, round_, number, plan)) for number, data in enumerate(clients)]


@pytest.mark.parametrize("kind", ["fused", "stacked"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_move_each_client_as_the_loop_does(kind: str, case: str) -> None:
    """Uneven clients trained together: each one's arrays and losses are those of the loop in float64, to the roundings of
    its steps, and so are two blocks' sums."""
    experiment, task, model, _ = setting(case)
    start, shape = state_of(model), CASES[case][1]

    def client(number: int) -> tuple[Data, Exact]:
        draws = (samples(shape, SIZES[number], variant) for variant in range(10))
        return first_followed(draws, lambda data: exactly(model, start, data, task, experiment, 2, number))

    clients, by_loop = map(list, zip(*map(client, range(len(SIZES))), strict=True))
    faster = kernels(kind, experiment, task, model, shape)
    members = members_of(faster, clients, 2)
    rates = faster.rates(2, experiment.local)
    done = faster.made.train(start, [members[:2], members[2:]], rates)
    for arrays, exact, member, loss in zip(done.arrays, by_loop, members, done.losses, strict=True):
        assert 0 < distance(arrays, exact.end) <= exact.off
        reported = faster.trained(member, loss)
        assert reported.steps == exact.steps
        assert reported.losses == pytest.approx(exact.losses, rel=0, abs=exact.losses_off)
        still = [n for n in start if n not in rates]
        assert all(np.array_equal(arrays[n], start[n]) for n in still)
    weights = [
        [{n: float(i + 2 + (n == next(iter(start)))) for n in start} for i in part] for part in ((0, 1), (2, 3, 4))
    ]
    sums = faster.made.train(start, [members[:2], members[2:]], rates, weights)
    for total, part, given in zip(sums.totals, (by_loop[:2], by_loop[2:]), weights, strict=True):
        assert total is not None
        exact_sum = {n: sum((w[n] * e.end[n] for w, e in zip(given, part, strict=True)), np.zeros(())) for n in start}
        assert distance(total, exact_sum) <= sum(max(w.values()) * e.off for w, e in zip(given, part, strict=True))


@pytest.mark.parametrize("kind", ["fused", "stacked"])
def test_a_block_with_infinite_numbers_has_no_sum(kind: str) -> None:
    experiment, task, model, clients = setting("mlp")
    clients[1].x[3] = float("inf")
    faster = kernels(kind, experiment, task, model, (1, 8, 8))
    members = members_of(faster, clients)
    weights = [[dict.fromkeys(state_of(model), 1.0)] * 2, [dict.fromkeys(state_of(model), 1.0)] * 3]
    rates = faster.rates(1, experiment.local)
    totals = faster.made.train(state_of(model), [members[:2], members[2:]], rates, weights).totals
    assert totals[0] is None and totals[1] is not None


def test_fused_clients_do_not_depend_on_their_neighbours() -> None:
    """To the bit: together with others of other sizes, or alone."""
    experiment, task, model, clients = setting("cnn")
    faster = kernels("fused", experiment, task, model, (1, 9, 10))
    members = members_of(faster, clients)
    rates, start = faster.rates(1, experiment.local), state_of(model)
    together = faster.made.train(start, [members], rates).arrays
    for member, arrays in zip(members, together, strict=True):
        alone = kernels("fused", experiment, task, model, (1, 9, 10)).made.train(start, [[member]], rates).arrays[0]
        assert all(np.array_equal(alone[n], arrays[n]) for n in start)


@pytest.mark.parametrize("kind", ["fused", "stacked"])
def test_each_training_begins_where_it_is_told(kind: str) -> None:
    experiment, task, model, clients = setting("mlp")
    faster = kernels(kind, experiment, task, model, (1, 8, 8))
    (member, *_), rates = members_of(faster, clients), faster.rates(1, experiment.local)
    start = state_of(model)
    other: Arrays = {name: (value + 0.01).astype(np.float32) for name, value in floats(start).items()}
    first = [faster.made.train(begin, [[member]], rates).arrays[0] for begin in (start, other, start)]
    again = kernels(kind, experiment, task, model, (1, 8, 8)).made.train(other, [[member]], rates).arrays[0]
    assert all(np.array_equal(first[0][n], first[2][n]) and np.array_equal(first[1][n], again[n]) for n in start)
    assert distance(first[0], first[1]) > 0


RUN = ("engine.exact=false", "partition.clients=23", "partition.min_size=3", "evaluate.every=2")


@pytest.mark.parametrize("preset", ["fedavg", "fedadam", "krum", "fedper"])
def test_blocks_and_single_clients_give_the_same_bits(preset: str, tmp_path: Path) -> None:
    """Whether a node sums a block up itself or answers client by client; with personal layers and robust rules too."""
    experiment = small(preset, *RUN)
    whole = run_inline(experiment, tmp_path / "blocks")
    # A bound on updates lets each client answer for itself; this one bounds nothing.
    single = run_inline(small(preset, *RUN, "cohort.max_norm=1e6"), tmp_path / "single")
    assert [single[key] for key in ("model_sha256", "metrics")] == [whole[key] for key in ("model_sha256", "metrics")]
    exact = run_inline(small(preset, *RUN, "engine.exact=true"), tmp_path / "exact")
    assert exact["model_sha256"] != whole["model_sha256"]
    assert [run["engine"]["training"].keys() for run in (whole, single, exact)] == [{"fused"}, {"fused"}, {"direct"}]


def test_ray_gives_the_bits_of_inline(tmp_path: Path) -> None:
    experiment = small("fedavg", *RUN)
    with engine("ray", 2) as launch:
        on_ray = launch(experiment, tmp_path / "ray")
    inline = run_inline(experiment, tmp_path / "inline")
    assert [on_ray[key] for key in ("model_sha256", "metrics")] == [inline[key] for key in ("model_sha256", "metrics")]


@pytest.mark.parametrize(
    "setting",
    ["local.optimizer=adam", "local.batch_size=0", "local.clip_norm=1", "local.label_smoothing=0.1", "anchor.l2=1"],
)
def test_what_is_not_covered_is_trained_exactly(setting: str, tmp_path: Path) -> None:
    """And says which setting it is."""
    experiment = small(
        "fedavg", "engine.exact=false", setting, *(["anchor.to=received"] if "anchor" in setting else [])
    )
    task = open_task(experiment)
    job = job_of(experiment, View(task.new_model(), task))
    assert setting.split("=")[0] in beyond_plain_steps(job)
    assert all(kernel.why_not(job) == beyond_plain_steps(job) for kernel in (Stacked, Fused, Direct))
    exact = experiment.model_copy(update={"engine": Engine(exact=True)})
    runs = [run_inline(e, tmp_path / str(i))["model_sha256"] for i, e in enumerate((experiment, exact))]
    assert runs[0] == runs[1]


def test_without_compiled_code_torch_trains() -> None:
    """In a process of its own, which has loaded no library."""
    code = """
from meadow.experiments.plan import plan
from meadow.config.load import load
print(plan(load("fedavg", ["engine.exact=false"]))["training"][0]["trainer"])
"""
    asked = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MEADOW_NATIVE": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.strip().startswith("direct")


@pytest.mark.parametrize(
    ("trunk", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout()), "trunk.2 is a Dropout"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Flatten(), nn.Linear(18, 8)),
            "trunk.0 is a convolution with stride",
        ),
        (nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(9, 8)), "trunk.0"),
        (nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 8)), "trunk.0 does not follow"),
        (nn.LSTM(8, 8), "trunk is a LSTM"),
    ],
)
def test_other_layers_are_named(trunk: nn.Module, reason: str) -> None:
    model = Multihead(trunk, {"digit": nn.Linear(8, 10)}, {"digit": False})
    with pytest.raises(Unknown, match=reason):
        network(model, (1, 8, 8), [DIGIT], [1.0])


def test_large_convolutions_and_windows_stay_with_torch() -> None:
    """The limit is between LeNet's (240,000 multiplications a sample) and those of McMahan et al. (10 million)."""
    experiment = load("fedavg", ["engine.exact=false"])
    task = open_task(experiment)
    made = ((networks.lenet, (1, 28, 28)), (networks.mcmahan_cnn, (1, 28, 28)), (networks.cnn1d, (3, 16)))
    fits = []
    for make, shape in made:
        trunk, features = make(experiment.task, Inputs(shape))
        model = Multihead(trunk, {"digit": nn.Linear(features, 10)}, {"digit": False})
        job = replace(job_of(experiment, View(task.new_model(), task)), network=network(model, shape, [DIGIT], [1.0]))
        forced = replace(job, experiment=load("fedavg", ["engine.trainer=stacked"]))
        fits.append((not Fused.why_not(job), not Stacked.why_not(forced)))
    assert fits == [(True, True), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("engine.precision=bfloat16", "engine.device=cuda"), "engine.precision"),
        (("engine.precision=bfloat16", "engine.exact=false"), "engine.precision"),
    ],
)
def test_settings_that_do_not_go_together(settings: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load("fedavg", list(settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    with refused('engine.device = "cuda"'):
        run_inline(small("fedavg", "engine.exact=false", "engine.device=cuda"), tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_gpu_benchmark_trains_the_same_on_both_sides() -> None:
    """On the CPU: the stacked clients' sum is the plain loop's, which leaves its last client in the model."""
    work = gpu.make("mlp", 3, 30, Engine.model_construct(device="cpu", precision="float32", exact=False))
    start = state_of(work.model)
    gpu.plain(work)()
    by_plain = state_of(work.model)
    load_into(work.model, start)
    found = network(work.model, (1, 28, 28), [gpu.TARGET], [1.0])
    experiment = load("fedavg", ["local.momentum=0"]).model_copy(update={"engine": work.engine})
    done = Stacked(found, experiment).train(start, [work.members], dict.fromkeys(start, LR))
    # Both are float32: each is off by its roundings.
    moved = distance(by_plain, start)
    bound = 2 * off(len(work.members[-1].order.flatten()), distance(start, Named(start) * 0), moved)
    assert distance(done.arrays[-1], by_plain) <= bound < moved / 1000


def test_half_precision_is_near_float32() -> None:
    """bfloat16 has 8 bits: each of a step's 5 products rounds two operands and its result by up to 2^-8 (`rounding`)."""
    experiment, task, model, clients = setting("mlp")
    found = network(model, (1, 8, 8), task.targets, task.weights)
    half = Engine.model_construct(device="cpu", precision="bfloat16", exact=False)
    start = state_of(model)
    faster = kernels("stacked", experiment, task, model, (1, 8, 8))
    members = members_of(faster, clients)
    rates = faster.rates(1, experiment.local)
    full = faster.made.train(start, [members], rates).arrays
    rough = Stacked(found, experiment.model_copy(update={"engine": half})).train(start, [members], rates).arrays
    for number, (a, b, data) in enumerate(zip(rough, full, clients, strict=True)):
        path = exactly(model, start, data, task, experiment, 1, number).path
        assert 1e-5 * path < distance(a, b) < LAMBDA * math.sqrt(5 * 3) * 2**-8 * path
