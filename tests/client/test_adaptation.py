"""Domain adaptation: distances by their definitions, what a step does with two domains, and where the source is."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.rounding import OPERATIONS, close, floats, in_double, stepped
from helpers.runs import run_inline, small
from meadow.arrays.files import read_arrays
from meadow.client.loop.adaptation import Adaptation
from meadow.client.loop.alignment import (
    coral,
    deep_coral,
    domain_classifier,
    mmd,
    reversal_strength,
    reversed_gradient,
)
from meadow.client.loop.training import Training, train
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_seeded
from meadow.strategies.check import load
from meadow.tasks.data import Data
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.losses import losses
from meadow.tasks.models.multihead import TwoDomains, augmented
from meadow.tasks.readers.domains import source_samples
from meadow.tasks.source import source_data
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task

WIDTHS = (0.5, 1.0, 3.0)


def samples(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=draw, dtype=torch.float64) @ torch.randn(d, d, generator=draw, dtype=torch.float64)
        + shift
    )


def test_mmd_by_a_double_loop() -> None:
    a, b = samples(7, 3, 0), samples(5, 3, 1, 0.5)
    rows = [*a, *b]
    pairs = sorted(float(((p - q) ** 2).sum()) for i, p in enumerate(rows) for q in rows[i + 1 :])
    median = pairs[(len(pairs) - 1) // 2]

    def k(p: Tensor, q: Tensor) -> float:
        return sum(math.exp(-float(((p - q) ** 2).sum()) / (w * median)) for w in WIDTHS) / len(WIDTHS)

    def mean(p: Tensor, q: Tensor) -> float:
        return sum(k(x, y) for x in p for y in q) / (len(p) * len(q))

    assert float(mmd(a, b, WIDTHS)) == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b), rel=1e-9)


def test_mmd_of_equal_samples_is_nothing() -> None:
    a = samples(9, 4, 0)
    for same in (a.clone(), a[torch.randperm(9)]):  # two means of 81 numbers of size 1, less two times a third
        close(mmd(a, same, WIDTHS), 0.0, 3 * 81, terms=4.0, dtype=np.float64)
    assert float(mmd(a, a + 3, WIDTHS)) > 0.1
    assert float(mmd(a, 100 * a, WIDTHS)) == pytest.approx(float(mmd(a / 100, a, WIDTHS)))  # the median knows the scale


def test_no_gradient_flows_through_the_median() -> None:
    """So the gradient is that of the kernel with the median as a constant, by hand for two points: w M = |a - b|^2."""
    a, b = torch.tensor([[0.0]], requires_grad=True), torch.tensor([[2.0]])
    (gradient,) = torch.autograd.grad(mmd(a, b, [1.0]), a)
    # mmd = 2 - 2 exp(-d / 4), d = (a - 2)^2: derivative 2 exp(-1) / 4 * 2 (a - 2) = -2 exp(-1)
    assert float(gradient) == pytest.approx(-2 * math.exp(-1))


def test_coral_gives_the_source_the_target_s_covariance() -> None:
    source, target = samples(50, 4, 0), samples(40, 4, 1)
    moved = coral(source, target, ridge=0.0)
    assert np.allclose(np.cov(moved.T), np.cov(target.T), rtol=1e-9, atol=1e-9)
    assert not np.allclose(np.cov(source.T), np.cov(target.T), atol=0.1)
    assert torch.allclose(coral(source, source, 1.0), source)
    flat = torch.cat([source, torch.zeros(50, 1)], 1)
    assert torch.isfinite(coral(flat, torch.cat([target, torch.zeros(40, 1)], 1), 0.0)).all()


def test_coral_with_a_ridge_by_its_formula() -> None:
    """X (C_S + I)^(-1/2) (C_T + I)^(1/2), with scipy's matrix roots."""
    from scipy.linalg import inv, sqrtm

    source, target = samples(30, 3, 2).numpy(), samples(20, 3, 3).numpy()
    expected = source @ inv(sqrtm(np.cov(source.T) + np.eye(3))) @ sqrtm(np.cov(target.T) + np.eye(3))
    assert np.allclose(coral(torch.from_numpy(source), torch.from_numpy(target), 1.0), expected)


def test_deep_coral_by_its_formula() -> None:
    source, target = samples(30, 3, 2), samples(20, 3, 3)
    expected = ((np.cov(source.T) - np.cov(target.T)) ** 2).sum() / (4 * 9)
    assert float(deep_coral(source, target)) == pytest.approx(expected, rel=1e-9)


def test_the_reversed_gradient_is_minus_lambda_times_the_plain_one() -> None:
    """Of the features; the classifier's own gradient is the plain one, whatever lambda is."""
    classifier = domain_classifier(4, 6)
    features, truth = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    found = {}
    for name, strength in (("plain", None), ("reversed", 0.7)):
        x = features.clone().requires_grad_()
        seen = x if strength is None else reversed_gradient(x, strength)
        loss = F.binary_cross_entropy_with_logits(classifier(seen).squeeze(1), truth.float())
        found[name] = torch.autograd.grad(loss, [x, *classifier.parameters()])
    assert torch.equal(found["reversed"][0], -0.7 * found["plain"][0])
    assert all(torch.equal(a, b) for a, b in zip(found["plain"][1:], found["reversed"][1:], strict=True))


def test_the_reversal_grows_as_published() -> None:
    assert reversal_strength(0, 10) == 0
    assert reversal_strength(0.5, 10) == pytest.approx(math.tanh(2.5))  # 2 / (1 + e^-x) - 1 = tanh(x / 2)
    assert reversal_strength(1, 10) == pytest.approx(math.tanh(5))


def opened(method: str, *overrides: str) -> tuple[Experiment, Task, nn.Module]:
    experiment = small(
        "fedavg", f"adapt.method={method}", "task.hidden=8", "local.batch_size=0", "local.steps=1", "local.momentum=0",
        "local.lr=0.1", *overrides,
    )  # fmt: skip
    task = open_task(experiment)
    model = task.new_model()
    load_into(model, initial_state(experiment))
    return experiment, task, model


@pytest.mark.parametrize("method", ["mmd", "deep-coral", "dann"])
@pytest.mark.parametrize("labels", ["source", "both"])
def test_a_step_is_the_gradient_of_task_loss_and_lambda_times_alignment(method: str, labels: str) -> None:
    """As by autograd: the loss on the source's labels (and the target's), and lambda times the alignment."""
    experiment, task, model = opened(method, "adapt.weight=0.3", f"adapt.labels={labels}", "run.rounds=4")
    data = task.client(0).train
    source = source_samples(experiment, 0).take(torch.arange(len(data)))
    if method != "dann":  # its classifier is float32, and so is what is beside it
        model, data, source = model.double(), in_double(data), in_double(source)
    h_s, h_t = model.trunk(source.x), model.trunk(data.x)  # type: ignore[operator]
    outputs = model.on_features(torch.cat([h_s, h_t]))  # type: ignore[operator]
    known = {"digit": torch.cat([source.y["digit"], data.y["digit"]])}
    part = {"digit": outputs["digit"][: len(source)]}
    loss = losses(outputs, known, task.targets) if labels == "both" else losses(part, source.y, task.targets)
    if method == "mmd":
        aligned = mmd(h_s, h_t, experiment.adapt.widths)
    elif method == "deep-coral":
        aligned = deep_coral(h_s, h_t)
    else:
        with torch_seeded(0, "init", "domain"):
            classifier = domain_classifier(8, experiment.adapt.dann_hidden)
        strength = math.tanh(5 * (3 - 1) / 4)  # the third of four rounds begins
        both = classifier(reversed_gradient(torch.cat([h_s, h_t]), strength)).squeeze(1)
        truth = torch.tensor([0.0] * len(source) + [1.0] * len(data))
        aligned = F.binary_cross_entropy_with_logits(both, truth)
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss["digit"] + 0.3 * aligned, list(names.values()))
    before = state_of(model)
    # The client's source samples are just these, in whatever order the step takes them.
    train(model, Training(data, 3, 0, experiment.local, source=source), task, experiment)
    by = {name: 0.1 * g for name, g in zip(names, gradients, strict=True)}
    stepped(state_of(model), before, by, np.float32 if method == "dann" else np.float64)


def test_labels_of_the_target_are_not_looked_at() -> None:
    states = []
    for wrong in (False, True):
        experiment, task, model = opened("mmd", "local.steps=5", "local.batch_size=8")
        data = task.client(0).train
        if wrong:
            data = Data(data.x, {name: (y + 1) % 10 for name, y in data.y.items()})
        train(model, Training(data, 1, 0, experiment.local, source=source_samples(experiment, 0)), task, experiment)
        states.append(state_of(model))
    assert all(states[0][n].tobytes() == states[1][n].tobytes() for n in states[0])


def test_paired_samples_are_brought_together() -> None:
    """The pairs stay pairs in every order: the source is a copy of the pool with its ink doubled."""
    experiment, task, model = opened(
        "match", "adapt.weight=0.5", "adapt.dataset=digits", "local.batch_size=7", "local.steps=1"
    )
    data, source = task.client(2).train, source_samples(experiment, 2)
    assert torch.equal(source.x, data.x) and torch.equal(source.y["digit"], data.y["digit"])
    doubled = Data(2 * source.x, source.y)
    adapting = Adaptation(experiment, task, doubled, data, 1, 2, {})
    index = torch.tensor([5, 0, 3])
    batch = adapting.batch(index, data.take(index))
    assert torch.equal(batch.x[:3], 2 * batch.x[3:]) and torch.equal(batch.x[3:], data.x[index])
    _, term = adapting.outputs(model, batch.x, 0.0)
    model.double()
    h_s, h_t = (model.trunk(x.double()).detach() for x in (batch.x[:3], batch.x[3:]))  # type: ignore[operator]
    assert term is not None
    close(term, 0.5 * float(((h_s - h_t) ** 2).sum(1).mean()), OPERATIONS, 2 * float((h_s**2 + h_t**2).sum(1).max()))
    pooled = source_samples(experiment, None)
    assert torch.equal(pooled.x, task.pool().x)
    with pytest.raises(UserError, match=r'adapt.method = "match"'):
        source_samples(small("fedavg", "adapt.method=match"), 0)


def test_augmented_features_by_hand() -> None:
    h = torch.tensor([[1.0, 2.0]])
    assert augmented(h, source=True).tolist() == [[1, 2, 1, 2, 0, 0]]
    assert augmented(h, source=False).tolist() == [[1, 2, 0, 0, 1, 2]]
    plain = nn.Linear(2, 3)
    head = TwoDomains(plain)
    assert torch.equal(head(h), plain(h)) and torch.equal(head(augmented(h, source=True)), plain(h))
    with torch.no_grad():
        head.weight[0] = torch.tensor([1.0, 1, 10, 10, 100, 100])
        head.bias.zero_()
    with torch.no_grad():
        assert float(head(h)[0, 0]) == 3 + 300 and float(head(augmented(h, source=True))[0, 0]) == 3 + 30


def test_each_domain_s_part_of_a_head_learns_from_its_own_samples() -> None:
    experiment, task, model = opened("augment", "adapt.labels=both")
    data, source = in_double(task.client(0).train), in_double(source_samples(experiment, 0))
    model.double()
    outputs = {}
    for name, part in (("source", source.take(torch.arange(len(data)))), ("target", data)):
        h = augmented(model.trunk(part.x), source=name == "source")  # type: ignore[operator]
        outputs[name] = losses(model.on_features(h), part.y, task.targets)["digit"]  # type: ignore[operator]
    weight = model.get_parameter("heads.digit.weight")
    s, t = (torch.autograd.grad(outputs[n], weight, retain_graph=True)[0] / 2 for n in ("source", "target"))
    assert not s[:, 16:].any() and not t[:, 8:16].any() and torch.allclose(s[:, :8], s[:, 8:16])
    before = state_of(model)
    train(model, Training(data, 1, 0, experiment.local, source=source.take(torch.arange(len(data)))), task, experiment)
    moved = (floats(before)["heads.digit.weight"] - floats(state_of(model))["heads.digit.weight"]) / 0.1
    stepped({"w": moved}, {"w": np.zeros(moved.shape)}, {"w": -(s + t)})


def test_coral_trains_on_recoloured_samples_or_features() -> None:
    """One full-batch step is one on the recoloured source alone; its labels are the source's."""
    experiment, task, model = opened("coral", "adapt.ridge=0.5")
    model, data = model.double(), in_double(task.client(0).train)
    source = in_double(source_samples(experiment, 0).take(torch.arange(len(data))))
    recoloured = coral(source.x.flatten(1), data.x.flatten(1), 0.5).view_as(source.x)
    loss = losses(model(recoloured), source.y, task.targets)["digit"]
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()))
    before = state_of(model)
    train(model, Training(data, 1, 0, experiment.local, source=source), task, experiment)
    stepped(state_of(model), before, {name: 0.1 * g for name, g in zip(names, gradients, strict=True)})


def test_source_only_sees_the_source_only() -> None:
    """One full-batch step is one on the source's labelled samples; the client's own count for how many they are."""
    experiment, task, model = opened("source-only")
    model, data = model.double(), in_double(task.client(0).train)
    source = in_double(source_samples(experiment, 0).take(torch.arange(len(data))))
    names = dict(model.named_parameters())
    loss = losses(model(source.x), source.y, task.targets)["digit"]
    gradients = torch.autograd.grad(loss, list(names.values()))
    before = state_of(model)
    train(model, Training(data, 1, 0, experiment.local, source=source), task, experiment)
    stepped(state_of(model), before, {name: 0.1 * g for name, g in zip(names, gradients, strict=True)})


def test_source_samples_are_public_or_dealt_once() -> None:
    public, dealt = (small("fedavg", "adapt.method=mmd", f"adapt.where={w}") for w in ("public", "clients"))
    whole = source_data(public).train
    assert all(torch.equal(source_samples(public, c).x, whole.x) for c in (0, 7, None))
    shares = [source_samples(dealt, c) for c in range(8)]
    assert [len(s) for s in shares] == [25] * 8
    rows = sorted(row for s in shares for row in s.x.flatten(1).tolist())
    assert rows == sorted(whole.x.flatten(1).tolist())
    assert len(source_samples(dealt, None)) == 200


def test_every_source_sample_has_its_turn() -> None:
    experiment, task, _ = opened("mmd")
    data, source = task.client(0).train, source_samples(experiment, 0)
    adapting = Adaptation(experiment, task, source, data, 1, 0, {})
    first = [adapting.batch(torch.arange(16), data.take(torch.arange(16))).x[:16] for _ in range(25)]
    rows = [row for batch in first for row in batch.flatten(1).tolist()]
    assert len(rows) == 2 * len(source) and sorted(rows) == sorted(2 * source.x.flatten(1).tolist())
    assert rows[: len(source)] != rows[len(source) :]


@pytest.mark.parametrize("where", ["public", "clients"])
@pytest.mark.parametrize("placement", ["federated", "local", "pooled"])
def test_a_domain_classifier_lasts_with_its_client(where: str, placement: str, tmp_path: Path) -> None:
    """It goes on from round to round, and only features' gradients, never it, get into what is shared."""
    experiment = small("fedavg", "adapt.method=dann", f"adapt.where={where}", f"run.placement={placement}")
    assert run_inline(experiment, tmp_path)["status"] == "done"
    kept = sorted((tmp_path / "state").rglob("round-00000003.safetensors"))
    assert len(kept) == (1 if placement == "pooled" else 8)
    names = {f"loop@adapt/{n}" for n in domain_classifier(4, 4).state_dict()}
    assert all({n for n in read_arrays(path) if n.startswith("loop@")} == names for path in kept)


@pytest.mark.parametrize("preset", ["federated-transfer", "lora", "federated-multitask"])
@pytest.mark.parametrize("method", ["coral", "augment", "mmd"])
def test_adaptation_composes(preset: str, method: str, tmp_path: Path) -> None:
    """A frozen trunk's cached features, low-rank factors and two targets are just other settings."""
    if method == "mmd" and preset == "federated-transfer":
        pytest.skip("refused, below")
    labels = "both" if method == "augment" else "source"
    experiment = small(preset, f"adapt.method={method}", f"adapt.labels={labels}", "run.rounds=1", "local.epochs=1")
    assert run_inline(experiment, tmp_path)["status"] == "done"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapt.method=mmd", "local.trainable=head"], ["adapt.method", "local.trainable"]),
        (["adapt.method=augment"], ["adapt.labels", 'labels = "both"']),
        (["adapt.widths=1,0"], ["widths"]),
        (
            [
                "adapt.method=dann",
                "privacy.unit=example",
                "privacy.sample_rate=0.1",
                "privacy.epsilon=8",
                "local.steps=3",
            ],
            ['adapt.method = "dann"', 'privacy.unit = "client"'],
        ),
    ],
)
def test_wrong_settings_are_named_with_a_way_out(overrides: list[Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("fedavg", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_source_of_another_form_is_refused() -> None:
    with pytest.raises(UserError, match=r'adapt.dataset = "stars"'):
        source_samples(small("fedavg", "adapt.method=mmd", "adapt.dataset=stars", "adapt.targets=points,size"), 0)
    with pytest.raises(UserError, match=r"adapt.targets = \['digit'\]"):
        source_samples(small("fedavg", "adapt.method=mmd", "adapt.dataset=printed-digits", "adapt.targets=digit"), 0)
