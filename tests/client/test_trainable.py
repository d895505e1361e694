"""What is trained: that nothing else moves by a bit, what is added to layers, the mask's entries, the stages, the roles."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.rounding import LAMBDA, OPERATIONS, close, floats, in_double, stepped
from helpers.runs import run_inline, small
from meadow.arrays.files import read_arrays
from meadow.client.loop.fisher import empirical_fisher, true_fisher
from meadow.client.loop.trainable import freeze, mask, top
from meadow.client.loop.training import Training, train
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_generator
from meadow.server.checkpoints import latest
from meadow.strategies.check import load
from meadow.strategies.roles import roles
from meadow.strategies.trainable import layers, rate_factors, stage, trained
from meadow.tasks.data import Data, Inputs, Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.models.multihead import Multihead, build
from meadow.tasks.models.peft import Added, extend, merged
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task

FAMILIES: dict[str, tuple[str, ...]] = {"mlp": ("task.model=mlp",), "cnn": ("task.model=cnn",), "batchnorm": ()}
"""Models on the default data: what the experiment file says to get them. The last one is built here, below."""

OTHERS = {
    "lenet": Inputs((1, 28, 28)),
    "mcmahan-cnn": Inputs((1, 12, 12)),
    "cnn1d": Inputs((3, 24)),
    "bilstm": Inputs((9,), tokens=30),
    "charlstm": Inputs((9,), tokens=30),
    "resnet18": Inputs((3, 32, 32)),
    "mobilenet_v3_small": Inputs((3, 32, 32)),
    "squeezenet1_1": Inputs((3, 48, 48)),
    "densenet121": Inputs((3, 32, 32)),
    "efficientnet_b0": Inputs((3, 32, 32)),
}
"""The other families, and what they take here."""

KINDS: dict[str, tuple[str, ...]] = {
    "head": (),
    "last:0": (),
    "last:1": (),
    "last:2": (),
    "gradual": (),
    "lora": ("local.lora_rank=2",),
    "lora b": ("local.lora_rank=2", "local.lora_share=b"),
    "adapters": ("local.adapter_size=2",),
    "adapters parallel": ("local.adapter_size=2", "local.adapter_place=parallel"),
    "fisher": ("local.fisher_on=local",),
}


def batchnorm_model(targets: tuple[Target, ...]) -> Multihead:
    """Convolutions, batch norms and dropout: state that moves without any gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3),
            nn.Flatten(), nn.Linear(256, 12), nn.ReLU(),
        )  # fmt: skip
        heads = {t.name: nn.Linear(12, t.size) for t in targets}
    return Multihead(trunk, heads, {t.name: t.kind == "value" for t in targets})


def opened(family: str, *overrides: str) -> tuple[Experiment, Task, nn.Module]:
    """An experiment of a family, its task, and its model at the start."""
    experiment = small("fedavg", "task.hidden=16", "local.epochs=1", *FAMILIES[family], *overrides)
    task = open_task(experiment)
    if family == "batchnorm":
        return experiment, task, extend(batchnorm_model(task.targets), task.added, 0)
    model = task.new_model()
    load_into(model, initial_state(experiment))
    return experiment, task, model


def unlike(family: str, experiment: Experiment) -> tuple[Task, nn.Module, Data]:
    """A model of one of the other families, with random samples for it and a task around them."""
    form, draw = OTHERS[family], torch.Generator().manual_seed(5)
    settings = experiment.task.model_copy(update={"model": family})
    target = Target("t", "class", form.tokens or 3)
    task = replace(open_task(experiment), targets=(target,), weights=(1.0,), settings=settings, pipeline=None)
    model = extend(build(settings, task.targets, form), task.added, 0)
    if form.tokens:
        x = torch.randint(1, form.tokens, (12, *form.shape), generator=draw)
        y = x.roll(1, 1) if family == "charlstm" else x[:, 0]
        return task, model, Data(x, {"t": y})
    return task, model, Data(torch.randn(12, *form.shape, generator=draw), {"t": torch.arange(12) % 3})


def differ(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {n for n in before if before[n].tobytes() != after[n].tobytes()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_keeps_its_bits_and_what_is_not_moves(family: str, kind: str) -> None:
    if (family, kind) == ("batchnorm", "fisher"):
        pytest.skip("the mask's model is the experiment's own")
    experiment, task, model = opened(
        family, f"local.trainable={kind.split()[0]}", *KINDS[kind], "local.weight_decay=0.01", "run.rounds=4"
    )
    before = state_of(model)
    round_ = 3
    train(model, Training(task.client(0).train, round_, 0, experiment.local), task, experiment)
    allowed = trained(experiment, before, stage(experiment, round_, 0))
    everything = kind == "fisher" or (family == "mlp" and kind in ("last:2", "gradual"))  # two layers
    assert (allowed == set(before)) == everything
    changed = differ(before, state_of(model))
    assert changed <= allowed
    if kind != "fisher":  # its entries may leave a small array out
        assert changed >= {n for n in allowed if n.endswith("weight")}
    if family == "batchnorm" and kind == "last:1":
        assert not any("running" in n for n in changed)
    if family == "batchnorm" and kind in ("last:2", "gradual"):  # the linear layer and the second norm
        assert {n for n in changed if "running" in n} == {"trunk.4.running_mean", "trunk.4.running_var"}


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fisher"])
def test_what_is_frozen_keeps_its_bits_in_every_other_family(family: str, kind: str) -> None:
    overrides = (f"local.trainable={kind.split()[0]}", *KINDS[kind], "local.weight_decay=0.01", "local.epochs=1")
    experiment = small("fedavg", *overrides, "task.learn=first", "task.hidden=16")
    if "lstm" in family and ("lora" in kind or "adapters" in kind):
        with pytest.raises(UserError, match=r"local.trainable"):
            unlike(family, experiment)
        return
    task, model, data = unlike(family, experiment)
    before = state_of(model)
    train(model, Training(data, 2, 0, experiment.local), task, experiment)
    allowed = trained(experiment, before, stage(experiment, 2, 0))
    changed = differ(before, state_of(model))
    assert changed <= allowed < set(before) or allowed == changed == set(before)
    assert changed >= {n for n in allowed if n.startswith("heads.")} and len(changed) > 2 * (
        kind not in ("head", "last:0")
    )


def test_modes_follow_what_learns() -> None:
    model = batchnorm_model((Target("digit", "class", 10),))
    names = set(model.state_dict())
    freeze(model, {n for n in names if n.startswith(("heads.", "trunk.8.", "trunk.4."))})
    trunk = model.trunk
    assert isinstance(trunk, nn.Sequential)
    assert [trunk[i].training for i in (0, 1, 3, 4, 8)] == [False, False, False, True, True]
    freeze(model, {n for n in names if n.startswith("heads.")})
    assert not any(m.training for m in trunk.modules()) and model.heads["digit"].training
    assert all(not p.requires_grad for p in trunk.parameters())


def test_a_frozen_norm_without_parameters_keeps_its_statistics() -> None:
    """Nothing of it could be frozen by `requires_grad`: it has statistics only. Its layer says whether they may move."""
    norm = nn.BatchNorm1d(3, affine=False)
    model = Multihead(
        nn.Sequential(nn.Linear(2, 3), norm, nn.Linear(3, 3), nn.Dropout()), {"t": nn.Linear(3, 2)}, {"t": False}
    )
    names = set(model.state_dict())
    freeze(model, {n for n in names if n.startswith(("heads.", "trunk.2."))})
    assert not norm.training and model.get_submodule("trunk.3").training
    freeze(model, {n for n in names if not n.startswith("trunk.0.")})
    assert norm.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "series", "parallel"])
def test_what_is_added_changes_nothing_at_first(family: str, kind: Any) -> None:
    _, task, plain = opened(family)
    _, _, model = opened(family)
    start = extend(model, Added(kind, 2, 0.5), seed=1)
    x = task.client(0).train.x
    plain.eval(), start.eval()
    a, b = plain(x), start(x)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [n for n in start.state_dict() if "lora" not in n and "adapter" not in n] == list(plain.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_factors_merge_into_the_weights(family: str) -> None:
    """Of grouped and strided convolutions too. Worked out in float64, the two differ by one rounding of each merged weight
    to float32, which does not more than some half an ulp each way of them does, drawn at random."""
    _, task, plain = opened(family)
    _, _, model = opened(family)
    extend(model, Added("lora", 2, 0.7), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    load_into(plain, merged(state_of(model), 0.7))
    x = task.client(0).train.x
    model.eval(), plain.eval()
    model.double(), plain.double()
    with torch.no_grad():
        a, b = model(x.double()), plain(x.double())
        draw = torch.Generator().manual_seed(0)
        for parameter in plain.parameters():
            parameter.mul_(1 + (2 * torch.randint(2, parameter.shape, generator=draw) - 1) * 2.0**-24)
        shaken = plain(x.double())
        for name, parameter in model.named_parameters():  # what a thousandth more would do
            if "lora_b" in name:
                parameter.mul_(1.001)
        more = model(x.double())
    for name in a:
        bound = LAMBDA * float((shaken[name] - b[name]).abs().max())
        assert float((a[name] - b[name]).abs().max()) <= bound < float((more[name] - a[name]).abs().max()), name


def test_a_layer_that_low_rank_would_not_make_smaller_is_left_alone() -> None:
    trunk = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Linear(30, 40))
    model = extend(Multihead(trunk, {}, {}), Added("lora", 3), seed=0)
    assert [n for n in model.state_dict() if "lora" in n] == ["trunk.1.lora_a.weight", "trunk.1.lora_b.weight"]
    with pytest.raises(UserError, match=r"local.lora_rank = 64"):
        open_task(small("lora", "local.lora_rank=64", "task.hidden=16")).new_model()


@pytest.mark.parametrize("family", ["mlp", "cnn"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_full_mask_is_full_fine_tuning(family: str, optimizer: str) -> None:
    states = []
    for kind in ("all", "fisher"):
        experiment, task, model = opened(
            family, f"local.trainable={kind}", "local.fisher_on=local", "local.fisher_fraction=1.0",
            f"local.optimizer={optimizer}", "local.lr=0.01", "local.weight_decay=0.1",
        )  # fmt: skip
        train(model, Training(task.client(0).train, 1, 0, experiment.local), task, experiment)
        states.append(state_of(model))
    assert not differ(*states)


@pytest.mark.parametrize("on", ["source", "local"])
def test_a_mask_changes_exactly_its_entries(on: str) -> None:
    experiment, task, model = opened(
        "cnn", "local.trainable=fisher", f"local.fisher_on={on}", "local.fisher_fraction=0.05",
        "task.pretrained=source", "local.optimizer=adamw", "local.lr=0.01", "local.weight_decay=0.1",
    )  # fmt: skip
    before = state_of(model)
    held = mask(model, experiment, 0)
    assert held is not None and all(n.startswith("trunk.") for n in held.entries)
    count = sum(int(e.sum()) for e in held.entries.values())
    assert count == math.ceil(0.05 * sum(e.numel() for e in held.entries.values()))
    train(model, Training(task.client(0).train, 1, 0, experiment.local), task, experiment)
    after = state_of(model)
    for name, entries in held.entries.items():
        assert np.array_equal(before[name] != after[name], entries.numpy()), name
    assert differ(before, after) >= {n for n in before if n.startswith("heads.")}


def test_the_mask_takes_the_largest_and_of_equals_the_first() -> None:
    fisher = {"a": torch.tensor([[1.0, 3.0], [2.0, 3.0]]), "b": torch.tensor([3.0, 0.0])}
    chosen = top(fisher, 0.4)  # 3 of 6 entries: ceil(2.4)
    assert chosen["a"].tolist() == [[False, True], [False, True]] and chosen["b"].tolist() == [True, False]
    chosen = top(fisher, 0.3)
    assert chosen["a"].tolist() == [[False, True], [False, True]] and chosen["b"].tolist() == [False, False]


def linear(target: Target, features: int) -> tuple[Task, Multihead, Tensor]:
    """A linear model of one target on `features` inputs, with a task around it, and 40 samples."""
    draw = torch.Generator().manual_seed(3)
    model = Multihead(
        nn.Flatten(), {target.name: nn.Linear(features, target.size)}, {target.name: target.kind == "value"}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=draw)
    task = replace(open_task(small("fedavg")), targets=(target,), weights=(1.5,))
    return task, model, torch.randn(40, features, generator=draw)


def test_fisher_information_of_a_logistic_model() -> None:
    """F(W_cj) = E[p_c (1 - p_c) x_j^2]; with the labels' own gradients E[(p_c - y_c)^2 x_j^2] (Bishop 2006, 4.3.4)."""
    task, model, x = linear(Target("t", "class", 3), 5)
    y = torch.arange(40) % 3
    p = torch.softmax(in_float64(model, x), 1)
    true = true_fisher(model, Data(x, {"t": y}), task, 100)
    squares = x.double() ** 2
    closed = 1.5 * torch.einsum("nc,nj->cj", p * (1 - p), squares) / 40
    # A gradient is a difference of numbers in 0..1 times x, and is squared: two times its roundings.
    terms = 1.5 * squares.mean(0).numpy()
    close(true["heads.t.weight"], closed, 4 * OPERATIONS, terms)
    close(true["heads.t.bias"], 1.5 * (p * (1 - p)).mean(0), 4 * OPERATIONS, 1.5)
    with pytest.raises(AssertionError):  # a thousandth more is seen
        close(true["heads.t.weight"] * 1.001, closed, 4 * OPERATIONS, terms)
    empirical = empirical_fisher(model, Data(x, {"t": y}), task, 100)
    error = p - torch.nn.functional.one_hot(y, 3)
    closed = 1.5**2 * torch.einsum("nc,nj->cj", error**2, squares) / 40
    close(empirical["heads.t.weight"], closed, 4 * OPERATIONS, 1.5 * terms)


def in_float64(model: nn.Module, x: Tensor) -> Tensor:
    """The output of the model's target, worked out in float64."""
    return copy.deepcopy(model).double()(x.double())["t"].detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["value", "labels", "quantiles"])
def test_fisher_information_of_the_other_kinds(kind: Any) -> None:
    """A value is normal with variance 1/2: F = 2 E[x_j^2]. Labels p (1 - p); quantiles q (1 - q)."""
    target = Target("t", kind, 1 if kind == "value" else 2, quantiles=(0.1, 0.7) if kind == "quantiles" else ())
    task, model, x = linear(target, 4)
    y = torch.zeros(40) if kind != "labels" else torch.zeros(40, 2)
    p = torch.sigmoid(in_float64(model, x))
    curvature = {
        "value": torch.full((40, 1), 2.0),
        "labels": p * (1 - p) if kind == "labels" else p,
        "quantiles": torch.tensor([[0.09, 0.21]]).expand(40, 2),
    }[kind].double()
    fisher = true_fisher(model, Data(x, {"t": y}), task, 100)["heads.t.weight"]
    squares = x.double() ** 2
    terms = 1.5 * float(curvature.max()) * squares.mean(0).numpy()
    close(fisher, 1.5 * torch.einsum("nc,nj->cj", curvature, squares) / 40, 4 * OPERATIONS, terms)


def test_a_sample_of_the_samples_is_drawn_from_the_seed() -> None:
    task, model, x = linear(Target("t", "value", 1), 4)
    data = Data(x, {"t": torch.zeros(40)})
    some = true_fisher(model, data, task, 7)["heads.t.weight"]
    order = torch.randperm(40, generator=torch_generator(task.seed, "fisher"))[:7]
    close(some[0], 1.5 * 2 * (x[order].double() ** 2).mean(0), OPERATIONS)


def test_layers_are_counted_from_the_top() -> None:
    experiment, _, model = opened("cnn", "local.trainable=last:2")
    names = list(model.state_dict())
    assert layers(names) == [f"trunk.{n}" for n in ("linear", "norm2", "conv2", "norm1", "conv1")]
    expected = {n for n in names if n.startswith(("heads.", "trunk.linear.", "trunk.norm2."))}
    assert trained(experiment, names) == expected
    assert trained(small("fedavg", "local.trainable=last:99"), names) == set(names)
    assert trained(small("fedavg", "local.trainable=last:0"), names) == {n for n in names if n.startswith("heads.")}


@pytest.mark.parametrize("unit", ["rounds", "epochs"])
def test_gradual_unfreezes_what_it_says_when_it_says(unit: str) -> None:
    """Every two rounds (or epochs, three a round) a layer more; the layers that move in a round are those of its stages."""
    experiment, task, model = opened(
        "cnn", "local.trainable=gradual", "local.gradual_every=2", f"local.gradual_unit={unit}", "run.rounds=5",
        f"local.epochs={1 if unit == 'rounds' else 3}",
    )  # fmt: skip
    order = ["linear", "norm2", "conv2", "norm1", "conv1"]
    deepest = {"rounds": [0, 0, 1, 1, 2], "epochs": [1, 2, 4, 5, 5]}[
        unit
    ]  # epochs done before the last: 2, 5, 8, 11, 14
    for round_, depth in enumerate(deepest, start=1):
        before = state_of(model)
        train(model, Training(task.client(0).train, round_, 0, experiment.local), task, experiment)
        moved = {n.split(".")[1] for n in differ(before, state_of(model)) if n.startswith("trunk.")}
        assert moved == set(order[:depth]), round_
    union = {n.split(".")[1] for n in trained(experiment, state_of(model)) if n.startswith("trunk.")}
    assert union == set(order[: deepest[-1]])


def test_each_stage_divides_the_rate() -> None:
    """One step of plain SGD from the same state: in stage k a head moves by 3^-k of what it moves in stage 0."""
    steps = []
    for round_ in (1, 2, 3):
        experiment, task, model = opened(
            "mlp", "local.trainable=gradual", "local.gradual_divide=3", "local.steps=1", "local.batch_size=0"
        )
        before = floats(state_of(model.double()))
        train(model, Training(in_double(task.client(0).train), round_, 0, experiment.local), task, experiment)
        steps.append(floats(state_of(model))["heads.digit.bias"] - before["heads.digit.bias"])
    for k in (1, 2):
        stepped({"b": steps[k] * 3**k}, {"b": steps[0]}, {})


def test_rates_by_depth_and_by_name() -> None:
    experiment, _, model = opened("cnn", "local.trunk_lr_factor=0.5", "local.depth_lr_factor=0.1",
                                  "local.lr_factors=trunk.conv 3,trunk.conv1.weight 2,heads.digit 7")  # fmt: skip
    factors = rate_factors(experiment.local, model.state_dict())
    expected = {
        "heads.digit.weight": 7, "trunk.linear.weight": 0.5, "trunk.norm2.bias": 0.05, "trunk.conv2.weight": 0.015,
        "trunk.norm1.weight": 0.0005, "trunk.conv1.bias": 0.00015, "trunk.conv1.weight": 0.0001,
    }  # fmt: skip
    assert {n: factors[n] for n in expected} == pytest.approx(expected)


def test_roles_of_low_rank_factors() -> None:
    def divided(preset: str) -> dict[str, set[str]]:
        experiment = small(preset, "local.lora_rank=2", "task.hidden=16")
        parts = roles(experiment, initial_state(experiment))
        return {r: {n.removeprefix("trunk.") for n in getattr(parts, r)} for r in ("shared", "personal", "fixed")}

    a, b = ({f"{layer}.lora_{p}.weight" for layer in ("linear1", "linear2")} for p in "ab")
    heads = {"heads.digit.weight", "heads.digit.bias"}
    weights = {f"{layer}.{kind}" for layer in ("linear1", "linear2") for kind in ("weight", "bias")}
    assert divided("lora") == {"shared": a | b | heads, "personal": set(), "fixed": weights}
    assert divided("ffa-lora") == {"shared": b | heads, "personal": set(), "fixed": weights | a}
    assert divided("fedsa-lora") == {"shared": a | heads, "personal": b, "fixed": weights}


@pytest.mark.parametrize("preset", ["lora", "ffa-lora", "fedsa-lora", "adapters", "gradual", "last-layers"])
def test_only_what_changes_travels_and_the_summary_says_what_that_saved(preset: str, tmp_path: Path) -> None:
    experiment = small(preset, "local.gradual_every=1" if preset == "gradual" else "run.seed=0")
    summary = run_inline(experiment, tmp_path)
    start = initial_state(experiment)
    parts = roles(experiment, start)
    checkpoint, _ = latest(tmp_path / "checkpoints")
    assert checkpoint is not None and set(checkpoint.arrays) == set(parts.shared)
    up = 3 * 8 * sum(start[n].nbytes for n in parts.shared)
    once = 8 * sum(start[n].nbytes for n in (*parts.personal, *parts.fixed))
    whole = sum(v.nbytes for n, v in start.items() if "lora" not in n and "adapter" not in n)
    assert (summary["cost"]["bytes_up"], summary["cost"]["bytes_down"]) == (up, up + once)
    assert summary["cost"]["bytes_saved"] == 2 * 3 * 8 * whole - 2 * up - once
    assert summary["cost"]["trained_parameters"] == sum(start[n].size for n in parts.trained)
    if preset == "fedsa-lora":
        kept = [read_arrays(p) for p in (tmp_path / "state").rglob("round-00000003.safetensors")]
        assert len(kept) == 8 and all(k.keys() == set(parts.personal) for k in kept)
    if preset == "ffa-lora":
        assert all(np.array_equal(checkpoint.arrays.get(n, start[n]), start[n]) for n in start if "lora_a" in n)


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_a_masked_run_changes_the_masked_entries_of_the_shared_model(family: str, tmp_path: Path) -> None:
    experiment = small("fisher-mask", *FAMILIES[family], "task.hidden=16")
    run_inline(experiment, tmp_path)
    start, task = initial_state(experiment), open_task(experiment)
    model = task.new_model()
    load_into(model, start)
    held = mask(model, experiment, 0)
    checkpoint, _ = latest(tmp_path / "checkpoints")
    assert held is not None and checkpoint is not None
    for name, entries in held.entries.items():
        assert not ((checkpoint.arrays[name] != start[name]) & ~entries.numpy()).any(), name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["local.trainable=last"], ["local.trainable = 'last'", "last:2"]),
        (["local.trainable=last:0", "strategy.share=body"], ["strategy.share", "local.trainable"]),
        (["local.trainable=lora", "local.lora_share=a"], ["local.lora_share", 'share = "trainable"']),
        (["local.trainable=fisher"], ["local.fisher_on", 'pretrained = "source"']),
        (["local.trainable=gradual", "local.gradual_unit=epochs", "local.steps=3"], ["local.steps = 0"]),
        (["local.lr_factors=trunk.conv1"], ["local.lr_factors", "trunk.linear1 0.1"]),
        (["local.nesterov=true", "local.optimizer=adam"], ["nesterov", 'optimizer = "sgd"']),
    ],
)
def test_wrong_settings_are_named_with_a_way_out(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("fedavg", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_kept_statistics_do_not_move_while_the_rest_of_a_normalisation_learns() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert set(freeze(model, set(model.state_dict()), "kept")) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    before = {name: value.clone() for name, value in model[1].named_buffers()}
    x = torch.arange(6.0).reshape(2, 3)
    both, one = model(x), model(x[:1])
    assert torch.equal(both[:1], one)  # a sample's output does not depend on the others in its batch
    both.sum().backward()
    assert model[1].weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in model[1].named_buffers())
    freeze(model, set(model.state_dict()))
    assert not torch.equal(model(x)[:1], one)
