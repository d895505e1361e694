"""Several targets: what each counts in a step, coupled trunks, and clients that hold different ones."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.rounding import close, floats, in_double, stepped
from helpers.runs import run_inline, small
from meadow.arrays.files import read_arrays
from meadow.arrays.named import Arrays
from meadow.client.loop.balance import BALANCES, DynamicAverage, GradNorm, PCGrad, Uncertainty, projected_sum
from meadow.client.loop.training import Training, train
from meadow.config.cohort import draw_cohort
from meadow.config.schema import Experiment, Local
from meadow.config.schema import Task as Settings
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import latest
from meadow.strategies.check import load
from meadow.tasks.data import Data, Inputs, Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.losses import losses
from meadow.tasks.models.multihead import build
from meadow.tasks.source import source_state
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task

A, B = Target("a", "class", 2), Target("b", "value", 1)


def test_projections_of_a_hand_example() -> None:
    """g1 = (1, 0), g2 = (-1, 1): g1 loses its half of -g2, g2 its -g1; (0.5, 0.5) + (0, 1)."""
    g1, g2 = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    assert projected_sum([g1, g2]).tolist() == [0.5, 1.5]
    assert projected_sum([g1, torch.tensor([1.0, 1.0])]).tolist() == [2.0, 1.0]  # no conflict: the sum
    assert projected_sum([g1, -g1]).tolist() == [0.0, 0.0]


def test_three_gradients_are_projected_in_every_order() -> None:
    """One that conflicts with both others, which do not with each other: by hand for either order of its projections."""
    g = [torch.tensor(v) for v in ([1.0, 1.0], [-2.0, 0.0], [-1.0, 0.5])]
    # g1 against g2 then g3: (1,1)->(0,1)->(0,1) (0*-1 + 0.5 > 0: stays); against g3 first: dot -0.5, |g3|^2 1.25:
    # (1,1) + 0.4 (-1,0.5) = (0.6,1.2); then against g2: dot -1.2, |g2|^2 4: + 0.3 (-2,0) = (0,1.2).
    # g2 against g1: dot -2, |g1|^2 2: (-2,0) + (1,1) = (-1,1). g3 against g1: dot -0.5: (-1,0.5) + 0.25 (1,1).
    others = torch.tensor([-1.0, 1.0]) + torch.tensor([-0.75, 0.75])
    possible = [others + torch.tensor([0.0, 1.0]), others + torch.tensor([0.0, 1.2])]
    found = set()
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            result = projected_sum(g)
        at = [i for i, p in enumerate(possible) if torch.allclose(result, p)]
        assert len(at) == 1
        found.add(at[0])
    assert found == {0, 1}


def opened(*overrides: str) -> tuple[Experiment, Task, nn.Module]:
    experiment = small(
        "fedavg", "task.hidden=16", "task.learn=all", "local.batch_size=0", "local.momentum=0", *overrides
    )
    task = open_task(experiment)
    model = task.new_model()
    load_into(model, initial_state(experiment))
    return experiment, task, model


def gradients(model: nn.Module, task: Task, data: Data) -> dict[str, dict[str, Tensor]]:
    """Each target's own gradient by parameter name, weighted by nothing."""
    names = dict(model.named_parameters())
    parts = losses(model(data.x), data.y, task.targets)
    found = {}
    for target in task.targets:
        own = torch.autograd.grad(parts[target.name], list(names.values()), retain_graph=True, materialize_grads=True)
        found[target.name] = dict(zip(names, own, strict=True))
    return found


def head_moved(
    model: nn.Module, before: Arrays, own: Mapping[str, Mapping[str, Tensor]], head: str, factor: float
) -> None:
    """The head's weight took a step of rate 0.1 by the factor times its own gradient, in float64."""
    name = f"heads.{head}.weight"
    stepped({name: state_of(model)[name]}, {name: before[name]}, {name: 0.1 * factor * own[head][name]})


def test_a_step_with_projected_gradients() -> None:
    """On the trunk the two projected gradients; each head its own one. The clients' data are such that some conflict."""
    conflicts = 0
    for client in range(8):
        experiment, task, model = opened(
            "local.balance=pcgrad", "local.epochs=1", "task.target_weights=1,2", "local.lr=0.1"
        )
        model, data = model.double(), in_double(task.client(client).train)
        own, before = gradients(model, task, data), state_of(model)
        trunk = [n for n in before if n.startswith("trunk.")]
        one, two = (torch.cat([w * own[t][n].flatten() for n in trunk]) for t, w in (("digit", 1), ("slant", 2)))
        dot = float(one @ two)
        expected = one + two
        if dot < 0:
            conflicts += 1
            expected = one - dot / float(two @ two) * two + two - dot / float(one @ one) * one
        train(model, Training(data, 1, client, experiment.local), task, experiment)
        parts = torch.split(0.1 * expected, [before[n].size for n in trunk])
        by = {n: part.view(before[n].shape) for n, part in zip(trunk, parts, strict=True)}
        for head, weight in (("digit", 1), ("slant", 2)):
            by |= {n: 0.1 * weight * own[head][n] for n in before if n.startswith(f"heads.{head}.")}
        stepped(state_of(model), before, by)
    assert conflicts


def test_projection_leaves_a_teacher_its_gradient() -> None:
    balance = PCGrad(Local(), (A, B), {})
    theta = nn.Parameter(torch.tensor([2.0, 3.0]))
    each = {"a": theta[0], "b": -theta[0] + theta[1]}  # the gradients of the hand example
    balance.backward(each, {"a", "b"}, 10 * theta[1], {"trunk.x.weight": theta})
    assert theta.grad is not None and theta.grad.tolist() == [0.5, 11.5]


def test_uncertainty_finds_its_optimum_on_quadratics() -> None:
    """L = (theta - 2)^2 + c: theta goes to 2, and sigma^2 to 2 c for a class, to c for a value (the derivative's zero)."""
    balance = Uncertainty(Local(), (A, B), {})
    theta = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([theta, *balance.parameters], lr=0.05)
    for _ in range(3000):
        optimizer.zero_grad()
        loss = (theta - 2) ** 2 + torch.tensor([0.3, 1.7])
        balance.backward({"a": loss[0], "b": loss[1]}, {"a", "b"}, None, {"heads.x": theta})
        optimizer.step()
    assert theta.tolist() == pytest.approx([2, 2], abs=1e-4)
    assert [math.exp(s) for s in balance.remember()[Uncertainty.NAME]] == pytest.approx([0.6, 1.7], rel=1e-4)


def test_uncertainty_in_training_and_from_round_to_round() -> None:
    """One full-batch step: the head moves by exp(-s) times (half for a value) its own gradient; s by its own rule."""
    experiment, task, model = opened("local.balance=uncertainty", "local.epochs=1", "local.lr=0.1")
    model, data = model.double(), in_double(task.client(0).train)
    memory: Arrays = {Uncertainty.NAME: np.array([0.5, -0.25])}
    own, before = gradients(model, task, data), state_of(model)
    parts = losses(model(data.x), data.y, task.targets)
    done = train(model, Training(data, 2, 0, experiment.local, memory=memory), task, experiment)
    for head, factor in (("digit", math.exp(-0.5)), ("slant", 0.5 * math.exp(0.25))):
        name = f"heads.{head}.weight"
        moved, step = floats(before)[name] - floats(state_of(model))[name], 0.1 * factor * own[head][name]
        close(
            moved, step, 4, terms=float(step.abs().max()), name=name
        )  # the factor is a float32: its exponential is off
    slopes = [
        0.5 - math.exp(-0.5) * float(parts["digit"].detach()),
        0.5 - 0.5 * math.exp(0.25) * float(parts["slant"].detach()),
    ]
    expected = [0.5 - 0.1 * slopes[0], -0.25 - 0.1 * slopes[1]]
    # The variances learn in float32: three numbers of size 1 are added up, by some ten roundings.
    close(done.memory[Uncertainty.NAME], expected, 16, terms=1.0)


def test_dynamic_weights_by_hand() -> None:
    """r = (0.5, 1), T = 2: 2 softmax(0.25, 0.5). A target without two epochs counts 1, the others by themselves."""
    seen = np.array([[2.0, 1.0], [1.0, 1.0]])
    weights = DynamicAverage(Local(), (A, B), {DynamicAverage.NAME: seen}).weights()
    low, high = math.exp(0.25), math.exp(0.5)
    assert weights == pytest.approx({"a": 2 * low / (low + high), "b": 2 * high / (low + high)})
    assert DynamicAverage(Local(), (A, B), {}).weights() == {"a": 1, "b": 1}
    three = (A, B, Target("c", "value", 1))
    holes = np.array([[2.0, np.nan, 1.0], [1.0, 5.0, 1.0]])
    weights = DynamicAverage(Local(dwa_temperature=1.0), three, {DynamicAverage.NAME: holes}).weights()
    low, high = math.exp(0.5), math.exp(1.0)
    assert weights == pytest.approx({"a": 2 * low / (low + high), "b": 1, "c": 2 * high / (low + high)})


def test_dynamic_weights_in_training() -> None:
    """Rounds of one full-batch epoch: what is remembered are the losses, and the third round's step has their weights."""
    memory: Arrays = {}
    seen = []
    for round_ in (1, 2, 3):
        experiment, task, model = opened("local.balance=dwa", "local.epochs=1", "local.lr=0.1")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + round_ / 10)
        model, data = model.double(), in_double(task.client(0).train)
        own, before = gradients(model, task, data), state_of(model)
        done = train(model, Training(data, round_, 0, experiment.local, memory=memory), task, experiment)
        memory = done.memory
        seen.append([done.losses["digit"], done.losses["slant"]])
    assert memory[DynamicAverage.NAME].tolist() == [pytest.approx(seen[1]), pytest.approx(seen[2])]
    power = np.exp(np.array(seen[1]) / np.array(seen[0]) / 2)
    factors = dict(zip(("digit", "slant"), 2 * power / power.sum(), strict=True))
    for head, factor in factors.items():
        head_moved(model, before, own, head, factor)
    assert abs(factors["digit"] - 1) > 1e-3


def test_an_epoch_s_loss_is_the_mean_over_its_steps() -> None:
    balance = DynamicAverage(Local(), (A, B), {})
    for loss, present in ((1.0, {"a", "b"}), (3.0, {"a"})):
        theta = nn.Parameter(torch.tensor(loss))
        balance.backward({"a": theta * 1, "b": theta * 2}, present, None, {"heads.x": theta})
    balance.epoch_ends()
    assert balance.remember()[DynamicAverage.NAME][1].tolist() == [2.0, 2.0]


def test_gradnorm_by_hand() -> None:
    """|g| = (1, 3), w = (1, 1), r = (1, 1): G - mean G = (-1, 1), so w moves by lr (1, -3), then is scaled to sum 2."""
    balance = GradNorm(Local(gradnorm_lr=0.1), (A, B), {})
    theta = nn.Parameter(torch.tensor([1.0]))
    balance.backward({"a": theta.sum(), "b": 3 * theta.sum() - 2}, {"a", "b"}, None, {"trunk.x.weight": theta})
    scale = 2 / (1.1 + 0.7)
    w, first = balance.remember()[GradNorm.NAME]
    assert w.tolist() == pytest.approx([1.1 * scale, 0.7 * scale]) and first.tolist() == [1.0, 1.0]
    assert theta.grad is not None and float(theta.grad) == pytest.approx(1.1 * scale * 1 + 0.7 * scale * 3)


def test_gradnorm_moves_down_its_objective() -> None:
    """Against autograd on sum |w_i n_i - (mean w n) r_i^alpha|, the target being held constant, as the paper has it."""
    three = (A, B, Target("c", "value", 1))
    start, first = np.array([0.5, 1.5, 1.0]), np.array([2.0, 1.0, 4.0])
    balance = GradNorm(Local(gradnorm_lr=0.01, gradnorm_alpha=0.7), three, {GradNorm.NAME: np.stack([start, first])})
    theta, slopes = nn.Parameter(torch.tensor([1.0, 2.0])), (2.0, 0.5, 1.0)
    each = {t.name: s * theta.norm() for t, s in zip(three, slopes, strict=True)}
    now = np.array([float(v.detach()) for v in each.values()])
    balance.backward(each, {"a", "b", "c"}, None, {"trunk.x.weight": theta})
    w, lengths = torch.tensor(start, requires_grad=True), torch.tensor(slopes, dtype=torch.float64)
    rate = now / first / (now / first).mean()
    aim = (w * lengths).mean().detach() * torch.tensor(rate**0.7)
    (w * lengths - aim).abs().sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    moved = start - 0.01 * w.grad.numpy()
    assert balance.remember()[GradNorm.NAME][0] == pytest.approx(moved * 3 / moved.sum(), rel=1e-6)
    assert balance.remember()[GradNorm.NAME][1].tolist() == first.tolist()


def test_gradnorm_in_training_looks_at_the_trunk_s_top() -> None:
    experiment, task, model = opened("local.balance=gradnorm", "local.epochs=1", "local.gradnorm_lr=0.2")
    model, data = model.double(), in_double(task.client(0).train)
    own = gradients(model, task, data)
    lengths = [
        math.sqrt(sum(float((own[t][f"trunk.linear2.{k}"] ** 2).sum()) for k in ("weight", "bias")))
        for t in ("digit", "slant")
    ]
    done = train(model, Training(data, 1, 0, experiment.local), task, experiment)
    signs = np.sign(np.array(lengths) - np.mean(lengths))
    moved = np.maximum(1 - 0.2 * signs * lengths, GradNorm.LEAST)
    close(done.memory[GradNorm.NAME][0], moved * 2 / moved.sum(), 1000, dtype=np.float64)


@pytest.mark.parametrize("kind", ["fixed", "uncertainty", "dwa", "gradnorm", "pcgrad"])
def test_a_target_without_labels_in_the_batch_has_no_part(kind: Any) -> None:
    """Its loss is 0, and would otherwise pull its weight up or its variance down."""
    balance = BALANCES[kind](Local(balance=kind), (A, B), {})
    trunk, head = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    before = balance.remember()
    balance.backward(
        {"a": 2 * trunk.sum(), "b": 0 * head.sum()}, {"a"}, None, {"trunk.x.weight": trunk, "heads.b": head}
    )
    balance.epoch_ends()
    assert head.grad is not None and head.grad.tolist() == [0.0]
    assert trunk.grad is not None and trunk.grad.tolist() == [2.0]
    if kind == "uncertainty":
        assert balance.parameters[1].grad is None and balance.remember()[Uncertainty.NAME].tolist() == [0, 0]
    if kind == "gradnorm":
        assert np.isnan(balance.remember()[GradNorm.NAME][1, 1]) and balance.remember()[GradNorm.NAME][0, 1] == 1
    if kind == "dwa":
        assert np.isnan(balance.remember()[DynamicAverage.NAME][:, 1]).all() and before


@pytest.mark.parametrize("kind", ["uncertainty", "dwa", "gradnorm", "pcgrad"])
def test_every_balance_runs_federated_with_lora_and_an_anchor(kind: str, tmp_path: Path) -> None:
    """Three settings: they compose. What is remembered is in the client's store, and in no reply."""
    experiment = small(
        "lora", f"local.balance={kind}", "task.learn=all", "anchor.kl=0.5", "local.lora_rank=2", "task.hidden=16"
    )
    assert run_inline(experiment, tmp_path)["status"] == "done"
    kept = [read_arrays(p) for p in (tmp_path / "state").rglob("round-00000003.safetensors")]
    names = {"uncertainty": Uncertainty.NAME, "dwa": DynamicAverage.NAME, "gradnorm": GradNorm.NAME}
    assert len(kept) == (8 if kind in names else 0)
    assert all(k.keys() == {f"loop@{names[kind]}"} for k in kept)
    checkpoint, _ = latest(tmp_path / "checkpoints")
    assert checkpoint is not None and all(n.startswith(("trunk.", "heads.")) for n in checkpoint.arrays)


def test_clients_with_different_targets_are_averaged_key_by_key(tmp_path: Path) -> None:
    """The trunk over all clients by their samples, a head over those who hold its target, by the labels they have."""
    settings = ("partition.clients=3", "partition.holds=digit 0-1,slant 1-2", "run.rounds=1", "task.learn=all")
    experiment = small("fedavg", *settings)
    run_inline(experiment, tmp_path)
    task, start = open_task(experiment), initial_state(experiment)
    states, sizes = [], []
    for client in range(3):
        model = task.new_model()
        load_into(model, start)
        data = task.client(client).train
        train(model, Training(data, 1, client, experiment.local), task, experiment)
        states.append(state_of(model))
        sizes.append(len(data))
    checkpoint, _ = latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    for name, value in checkpoint.arrays.items():
        who = {"heads.digit": [0, 1], "heads.slant": [1, 2]}.get(name.rpartition(".")[0], [0, 1, 2])
        mean = sum(sizes[c] * states[c][name].astype(np.float64) for c in who) / sum(sizes[c] for c in who)
        close(value, mean, 1, name=name)  # a sum in float64, rounded once


def test_a_head_that_nobody_trained_is_unchanged(tmp_path: Path) -> None:
    settings = ("partition.clients=4", "partition.holds=digit 0-2,slant 3", "cohort.size=2", "task.learn=all")
    seed = next(s for s in range(9) if 3 not in draw_cohort(small("fedavg", *settings, f"run.seed={s}"), 1))
    experiment = small("fedavg", *settings, f"run.seed={seed}", "run.rounds=1")
    run_inline(experiment, tmp_path)
    start = initial_state(experiment)
    checkpoint, _ = latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    same = {n for n, v in checkpoint.arrays.items() if v.tobytes() == start[n].tobytes()}
    assert same == {"heads.slant.weight", "heads.slant.bias"}


def stitched(model: str, shape: tuple[int, ...]) -> nn.Module:
    return build(Settings(model=model, hidden=6, trunks="cross-stitch"), (A, B), Inputs(shape), seed=2)


def test_coupled_trunks_by_hand() -> None:
    """Two trunks of the MLP: h_i <- sum_j alpha_ij h_j after each ReLU, then each one's bounded features and own head."""
    model = stitched("mlp", (7,))
    for number in (0, 1):
        alpha = model.get_parameter(f"trunk.units.{number}.alpha")
        assert torch.allclose(alpha[:, :, 0], torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
        with torch.no_grad():
            alpha.copy_(torch.tensor([[0.75, 0.25], [0.5, 0.625]])[:, :, None].expand_as(alpha))
    state = {n: t.detach().double() for n, t in model.state_dict().items()}
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    h = [x, x]
    for number in (1, 2):
        prefix = "trunk.columns.{}.linear" + str(number)
        h = [
            torch.relu(h[i] @ state[f"{prefix.format(i)}.weight"].T + state[f"{prefix.format(i)}.bias"])
            for i in range(2)
        ]
        h = [0.75 * h[0] + 0.25 * h[1], 0.5 * h[0] + 0.625 * h[1]]
    centred = [v - v.mean(1, keepdim=True) for v in h]
    h = [v / (v.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * math.sqrt(8 / 6) for v in centred]
    outputs = model.double()(x)
    for i, name in enumerate(("a", "b")):
        own = h[i] @ state[f"heads.{name}.head.weight"].T + state[f"heads.{name}.head.bias"]
        close(outputs[name], own.squeeze(-1) if name == "b" else own, 1000, terms=1.0, dtype=np.float64)


@pytest.mark.parametrize(
    ("model", "shape"), [("mlp", (7,)), ("cnn", (1, 8, 8)), ("lenet", (1, 28, 28)), ("cnn1d", (3, 16))]
)
def test_trunks_that_take_nothing_of_each_other_are_two_models(model: str, shape: tuple[int, ...]) -> None:
    net = stitched(model, shape)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("alpha"):
                parameter.copy_(torch.eye(2)[:, :, None].expand_as(parameter))
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    outputs = net.double()(x)
    state = state_of(net)
    for i, target in enumerate((A, B)):
        plain = build(Settings(model=model, hidden=6), (target,), Inputs(shape))
        own = {n: state.get(n.replace("trunk.", f"trunk.columns.{i}.")) for n in plain.state_dict()}
        own |= {f"heads.{target.name}.{k}": state[f"heads.{target.name}.head.{k}"] for k in ("weight", "bias")}
        load_into(plain, own)  # type: ignore[arg-type]
        close(plain.double()(x)[target.name], outputs[target.name], 1000, terms=1.0, dtype=np.float64)
    (gradient,) = torch.autograd.grad(
        outputs["a"].sum(), [net.get_parameter(next(n for n in state if n.startswith("trunk.columns.1.")))]
    )
    assert not gradient.any()


def test_coupled_trunks_start_from_the_pretrained_one_and_run(tmp_path: Path) -> None:
    experiment = small("federated-multitask", "task.trunks=cross-stitch", "task.pretrained=source", "task.hidden=12")
    start, source = initial_state(experiment), source_state(experiment)
    for i in range(2):
        for name, value in source.items():
            if name.startswith("trunk."):
                assert np.array_equal(start[name.replace("trunk.", f"trunk.columns.{i}.")], value)
    assert run_inline(experiment, tmp_path)["status"] == "done"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["local.balance=pcgrad", "local.trainable=head"], ["local.balance", "dwa"]),
        (["task.trunks=cross-stitch", "local.trainable=last:1"], ["task.trunks", "lr_factors"]),
        (["task.trunks=cross-stitch", "anchor.ewc=1", "task.pretrained=source"], ["anchor.l2"]),
    ],
)
def test_wrong_settings_are_named_with_a_way_out(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("fedavg", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_trunks_that_cannot_be_coupled_are_refused() -> None:
    with pytest.raises(UserError, match=r'task.model = "resnet18"'):
        build(Settings(model="resnet18", trunks="cross-stitch"), (A, B), Inputs((3, 32, 32)))
