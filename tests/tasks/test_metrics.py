"""Losses against torch and scikit-learn, scores against scikit-learn's own functions, masks against what they leave."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import sklearn.metrics as reference
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from helpers.rounding import OPERATIONS, close, stepped
from meadow.client.loop.training import Training, train
from meadow.strategies.check import load
from meadow.tasks.data import MISSING, Target
from meadow.tasks.evaluation import load_into, state_of
from meadow.tasks.losses import class_weights, loss, losses
from meadow.tasks.metrics import (
    LOWER_IS_BETTER,
    MOST_CLASSES,
    MOST_POINTS,
    PRIMARY,
    SHARES,
    THOROUGH,
    confusion,
    kind_of,
    roc,
    score,
)
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

DIGIT, SLANT = Target("digit", "class", 10), Target("slant", "value", 1, scale=0.25, offset=0.5)
PAIR = Target("pair", "class", 2)
SIGNS = Target("signs", "labels", 4)
STAY = Target("stay", "quantiles", 3, scale=2.0, offset=1.0, quantiles=(0.1, 0.5, 0.9))
LETTER = Target("letter", "class", 5)
ALL = (DIGIT, PAIR, SIGNS, SLANT, STAY)

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)
few = settings(max_examples=60, deadline=None)


def draw(target: Target, n: int, seed: int, gaps: float = 0.0, tokens: int = 0) -> tuple[Tensor, Tensor]:
    """A random model output and truth; the truth lacks each entry with probability `gaps`."""
    random = np.random.default_rng(seed)
    shape: tuple[int, ...] = (n, tokens) if tokens else (n, target.size) if target.kind == "labels" else (n,)
    if target.kind == "class":
        output = random.normal(size=(n, target.size, *shape[1:])) * 2
        truth: npt.NDArray[np.generic] = random.integers(0, target.size, shape)
        gap: float = MISSING
    else:
        output = random.normal(size=(n, target.size) if target.kind != "value" else shape)
        is_labels = target.kind == "labels"
        truth = (random.random(shape) < 0.3).astype(np.float32) if is_labels else random.normal(1, 2, shape)
        gap = math.nan
    truth = np.where(random.random(shape) < gaps, gap, truth).astype(np.int64 if target.kind == "class" else np.float32)
    return torch.from_numpy(output.astype(np.float32)), torch.from_numpy(truth)


def of(target: Target, output: Tensor, truth: Tensor, thorough: bool = False) -> dict[str, float]:
    return score({target.name: output}, {target.name: truth}, (target,), thorough).get(target.name, {})


def one_loss(target: Target, output: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    weights = {target.name: weight} if weight is not None else None
    return losses({target.name: output}, {target.name: truth}, (target,), weights)[target.name]


def doubled(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values


def size(target: Target, output: Tensor, truth: Tensor) -> float:
    """The largest number that an entry's loss is worked out from: a logit and the logarithm of a sum of exponentials, a
    square of a difference, or a difference for each quantile. Roundings are relative to that, and not to the loss."""
    most = float(output.detach().abs().max())
    if target.kind in ("class", "labels"):
        return 2 * most + math.log(max(2, target.size))
    known = truth[target.known(truth)]
    unit = float((known.abs().max() + abs(target.offset)) / target.scale) if len(known) else 0.0
    return (most + unit) ** 2 if target.kind == "value" else len(target.quantiles) * (most + unit)


def test_losses_by_hand() -> None:
    outputs = {"digit": torch.zeros(2, 10), "slant": torch.tensor([1.0, -1.0])}
    y = {"digit": torch.tensor([3, 7]), "slant": torch.tensor([1.0, 0.75])}
    each = losses(outputs, y, (DIGIT, SLANT))
    close(each["digit"], np.log(10), OPERATIONS)
    assert each["slant"].item() == (1 + 4) / 2  # against 2 and 1: less the offset, over the scale
    close(loss(outputs, y, (DIGIT, SLANT), (2.0, 0.5)), 2 * np.log(10) + 1.25, OPERATIONS)


@few
@given(n=sizes, seed=seeds)
def test_losses_are_torch_s_and_scikit_learn_s(n: int, seed: int) -> None:
    """Of the same numbers in float64; a loss that is a thousandth larger is seen."""

    def like(target: Target, expected: float, weight: Tensor | None = None) -> None:
        terms = size(target, output, truth) * (1.0 if weight is None else max(1.0, float(weight.max())))
        found = one_loss(target, output, truth, weight).double()
        close(found, expected, OPERATIONS, terms)
        with pytest.raises(AssertionError):
            close(found + terms / 1000, expected, OPERATIONS, terms)

    weight = torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 5, 10).astype(np.float32))
    output, truth = draw(DIGIT, n, seed)
    like(DIGIT, float(F.cross_entropy(output.double(), truth)))
    like(DIGIT, float(F.cross_entropy(output.double(), truth, weight.double(), reduction="none").sum() / n), weight)
    output, truth = draw(SIGNS, n, seed)
    for positive in (None, weight[:4]):
        by = None if positive is None else positive.double()
        like(SIGNS, float(F.binary_cross_entropy_with_logits(output.double(), truth.double(), pos_weight=by)), positive)
    output, truth = draw(SLANT, n, seed)
    like(SLANT, float(F.mse_loss(output.double() * 0.25 + 0.5, truth.double()) / 0.25**2))
    output, truth = draw(STAY, n, seed)
    unit = ((truth.double() - 1) / 2).numpy()
    pinball = sum(reference.mean_pinball_loss(unit, output[:, i], alpha=q) for i, q in enumerate(STAY.quantiles))
    like(STAY, pinball)


@few
@given(n=sizes, seed=seeds, gaps=st.floats(0, 1))
@pytest.mark.parametrize("target", [*ALL, LETTER], ids=lambda t: t.name)
def test_what_is_missing_has_neither_loss_nor_gradient(target: Target, n: int, seed: int, gaps: float) -> None:
    """The loss is the mean, over the samples that have any, of each one's mean over its known entries."""
    output, truth = draw(target, n, seed, gaps, tokens=6 if target is LETTER else 0)
    output.requires_grad_()
    found = one_loss(target, output, truth)
    found.backward()  # type: ignore[no-untyped-call]
    known = target.known(truth)
    assert output.grad is not None
    rows, exact, true = [], output.detach().double(), doubled(truth)
    for i in range(n):
        if known[i].any():
            if target is LETTER:
                rows.append(F.cross_entropy(exact[i].T[known[i]], truth[i][known[i]]))
            elif target is SIGNS:
                rows.append(F.binary_cross_entropy_with_logits(exact[i][known[i]], true[i][known[i]]))
            else:
                rows.append(one_loss(target, exact[i : i + 1], true[i : i + 1]))
    close(found, torch.stack(rows).mean() if rows else 0.0, OPERATIONS, size(target, output, truth))
    by_entry = output.grad.movedim(1, -1) if target is LETTER else output.grad
    assert not by_entry[~known].any()
    if not known.any():
        assert found.item() == 0


@few
@given(n=sizes, seed=seeds, gaps=st.floats(0, 0.9))
@pytest.mark.parametrize("target", [*ALL, LETTER], ids=lambda t: t.name)
def test_a_batch_s_gradient_is_the_mean_of_its_samples_gradients(
    target: Target, n: int, seed: int, gaps: float
) -> None:
    """Weights included: no sample's loss depends on the others, which per-sample clipping relies on."""
    output, truth = draw(target, n, seed, gaps, tokens=6 if target is LETTER else 0)
    rows = torch.nonzero(target.known(truth).reshape(n, -1).any(1)).flatten().tolist()
    assume(rows)
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.uniform(0.2, 5, target.size).astype(np.float32))
    weight = weight if target.kind in ("class", "labels") else None  # type: ignore[assignment]
    whole = output.clone().requires_grad_()
    one_loss(target, whole, truth, weight).backward()  # type: ignore[no-untyped-call]
    single = torch.zeros_like(output, dtype=torch.float64)
    by = None if weight is None else weight.double()
    for i in rows:
        alone = output[i : i + 1].double().requires_grad_()
        one_loss(target, alone, doubled(truth[i : i + 1]), by).backward()  # type: ignore[no-untyped-call]
        assert alone.grad is not None
        single[i] = alone.grad[0] / len(rows)
    assert whole.grad is not None
    # An exponential is off by the roundings of its exponent; a weight of 5 at most, over the samples that count.
    close(whole.grad, single, OPERATIONS, 5 * (1 + size(target, output, truth)) / len(rows))


@few
@given(n=sizes, seed=seeds, gaps=st.floats(0, 0.5))
def test_balanced_weights_are_scikit_learn_s(n: int, seed: int, gaps: float) -> None:
    target = Target("digit", "class", 10, balanced=True)
    _, truth = draw(target, n, seed, gaps)
    known = truth[truth != MISSING].numpy()
    (weights,) = class_weights([target], {"digit": truth}).values()
    occur = np.unique(known)
    expected = np.ones(10)
    if len(occur):
        expected[occur] = compute_class_weight("balanced", classes=occur, y=known)
        close(weights[known].mean(), 1.0, OPERATIONS)
    close(weights, expected, 4)  # counts, a product and a quotient


def test_label_weights_by_hand() -> None:
    nan = math.nan
    rows = torch.tensor([[1, 0, 1, nan], [0, 0, 1, nan], [0, nan, 1, nan], [nan, 1, 1, nan]])
    balanced = Target("signs", "labels", 4, balanced=True)
    # 2 negatives to 1 positive; 2 to 1 as well; only positives; nothing known.
    assert class_weights([balanced], {"signs": rows})["signs"].tolist() == [2, 2, 1, 1]
    given_ = Target("signs", "labels", 4, weights=(1.0, 2.0, 3.0, 4.0))
    assert class_weights([given_, SIGNS], {"signs": rows})["signs"].tolist() == [1, 2, 3, 4]
    assert class_weights([SIGNS], {"signs": rows}) == {}


@pytest.mark.parametrize("kind", ["class 10 weights 1 2 3 4 5 6 7 8 9 10", "class 10 balanced", "class 10"])
def test_class_weights_act_in_a_training_step(kind: str) -> None:
    """One full-batch step: w <- w - lr * sum_i weight_i * gradient_i / n, each sample's gradient taken by itself."""
    experiment = load(
        "fedavg", [f"task.kinds={kind},value", "local.batch_size=0", "local.epochs=1", "local.momentum=0.0"]
    )
    task = open_task(experiment)
    data = task.client(0).train
    labels = data.y["digit"].numpy()
    each = np.ones(10)
    if "weights" in kind:
        each = np.arange(1.0, 11.0)
    elif "balanced" in kind:
        each[np.unique(labels)] = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    trained, by_hand = task.new_model(), task.new_model()
    for model in (trained, by_hand):
        load_into(model, initial_state(experiment))
    train(trained, Training(data, 1, 0, experiment.local), task, experiment)
    logits = by_hand(data.x)["digit"]
    total = sum(float(each[c]) * F.cross_entropy(logits[i : i + 1], data.y["digit"][i : i + 1])
                for i, c in enumerate(labels))  # fmt: skip
    names = dict(by_hand.named_parameters())
    gradients = torch.autograd.grad(total / len(labels), list(names.values()))  # type: ignore[arg-type]
    by = {name: experiment.local.lr * value for name, value in zip(names, gradients, strict=True)}
    stepped(state_of(trained), state_of(by_hand), by, np.float32)  # the weights of the classes are float32


@few
@given(n=sizes, seed=seeds)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@pytest.mark.parametrize("target", [PAIR, LETTER, DIGIT], ids=lambda t: t.name)
def test_class_scores_are_scikit_learn_s(target: Target, n: int, seed: int) -> None:
    output, truth = draw(target, n, seed)
    true, predicted = truth.numpy(), output.argmax(1).numpy()
    probability = output.double().softmax(1).numpy()
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy": reference.accuracy_score(true, predicted),
        "balanced_accuracy": reference.balanced_accuracy_score(true, predicted),
        "precision": reference.precision_score(true, predicted, **macro),
        "recall": reference.recall_score(true, predicted, **macro),
        "f1": reference.f1_score(true, predicted, **macro),
        "loss": reference.log_loss(true, probability, labels=range(target.size)),
    }
    assert of(target, output, truth) == pytest.approx(expected, rel=1e-9)
    occur = np.unique(true)
    if len(occur) > 1:
        if target is PAIR:
            expected["auroc"] = reference.roc_auc_score(true, probability[:, 1])
        elif len(occur) == target.size:
            expected["auroc"] = reference.roc_auc_score(true, probability, multi_class="ovr")
        else:
            one_hot = true[:, None] == occur
            areas = [reference.roc_auc_score(one_hot[:, i], probability[:, c]) for i, c in enumerate(occur)]
            expected["auroc"] = np.mean(areas)
    assert of(target, output, truth, thorough=True) == pytest.approx(expected, rel=1e-9)


@few
@given(n=sizes, seed=seeds, labels=st.integers(1, 6))
def test_label_scores_are_scikit_learn_s(n: int, seed: int, labels: int) -> None:
    target = Target("signs", "labels", labels)
    output, truth = draw(target, n, seed)
    true, predicted, probability = truth.numpy(), (output > 0).numpy(), output.double().sigmoid().numpy()
    expected = {
        "accuracy": reference.accuracy_score(true.ravel(), predicted.ravel()),
        "exact_match": (true == predicted).all(1).mean(),
        "loss": np.mean([reference.log_loss(true[:, i], probability[:, i], labels=[0, 1]) for i in range(labels)]),
    }
    either = [i for i in range(labels) if true[:, i].any() or predicted[:, i].any()]
    for name in ("precision", "recall", "f1"):
        one = getattr(reference, f"{name}_score")
        if either:
            expected[name] = np.mean([one(true[:, i], predicted[:, i], zero_division=0) for i in either])
    assert of(target, output, truth) == pytest.approx(expected, rel=1e-9)
    if labels > 1 and len(either) == labels:
        assert expected["f1"] == pytest.approx(reference.f1_score(true, predicted, average="macro", zero_division=0))
        assert expected["exact_match"] == pytest.approx(reference.accuracy_score(true, predicted))
    if both := [i for i in range(labels) if 0 < true[:, i].sum() < n]:
        expected["auroc"] = reference.roc_auc_score(true[:, both], probability[:, both], average="macro")
    assert of(target, output, truth, thorough=True) == pytest.approx(expected, rel=1e-9)


@few
@given(n=sizes, seed=seeds)
def test_value_and_quantile_scores_are_scikit_learn_s(n: int, seed: int) -> None:
    output, truth = draw(SLANT, n, seed)
    true, predicted = truth.double().numpy(), output.double().numpy() * 0.25 + 0.5
    expected = {
        "mae": reference.mean_absolute_error(true, predicted),
        "rmse": reference.root_mean_squared_error(true, predicted),
        "loss": reference.mean_squared_error(true, predicted) / 0.25**2,
    }
    if n > 1:
        expected["r2"] = reference.r2_score(true, predicted)
    assert of(SLANT, output, truth, thorough=True) == pytest.approx(expected, rel=1e-9)
    output, truth = draw(STAY, n, seed)
    true, several = truth.double().numpy(), output.double().numpy() * 2 + 1
    pinball = [reference.mean_pinball_loss(true, several[:, i], alpha=q) for i, q in enumerate(STAY.quantiles)]
    expected = {"pinball": np.mean(pinball), "loss": sum(pinball) / 2}
    expected |= {f"coverage_{q}": np.mean(true <= several[:, i]) for i, q in enumerate(STAY.quantiles)}
    assert of(STAY, output, truth, thorough=True) == pytest.approx(expected, rel=1e-9)


def test_quantile_scores_by_hand() -> None:
    target = Target("stay", "quantiles", 2, scale=10.0, offset=5.0, quantiles=(0.25, 0.75))
    output, truth = torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor([5.0, 10.0])
    # Predicted 5 and 15 for 5, 5 and 25 for 10: errors 0 and -10, 5 and -15; times q or q - 1: 0 and 2.5, 1.25 and 3.75.
    scores = of(target, output, truth)
    assert scores == pytest.approx({"pinball": 1.875, "loss": 0.375, "coverage_0.25": 0.5, "coverage_0.75": 1.0})


@few
@given(n=sizes, seed=seeds, gaps=st.floats(0, 1))
@pytest.mark.parametrize("target", [DIGIT, PAIR, SLANT, STAY], ids=lambda t: t.name)
def test_a_sample_without_its_target_counts_for_nothing(target: Target, n: int, seed: int, gaps: float) -> None:
    output, truth = draw(target, n, seed, gaps)
    known = target.known(truth)
    expected = of(target, output[known], truth[known], thorough=True) if known.any() else {}
    assert of(target, output, truth, thorough=True) == pytest.approx(expected)


@few
@given(n=sizes, seed=seeds, gaps=st.floats(0, 1))
def test_a_label_that_is_missing_counts_for_nothing(n: int, seed: int, gaps: float) -> None:
    """Each label's figures are those over its own known entries; the means are over the labels and the known samples."""
    output, truth = draw(SIGNS, n, seed, gaps)
    known = SIGNS.known(truth)
    scores = of(SIGNS, output, truth, thorough=True)
    if not known.any():
        assert scores == {}
        return
    alone: dict[str, list[float]] = {}
    for i in range(4):
        one, there = Target("signs", "labels", 1), known[:, i]
        if there.any():
            found = of(one, output[there, i : i + 1], truth[there, i : i + 1], thorough=True)
            for name, value in found.items():
                alone.setdefault(name, []).append(value)
    for name in ("precision", "recall", "f1", "auroc"):
        assert scores.get(name) == (pytest.approx(np.mean(alone[name])) if name in alone else None)
    right = (output > 0) == (truth > 0)
    assert scores["accuracy"] == pytest.approx(np.mean(right[known].numpy()))
    exact = [bool(right[i][known[i]].all()) for i in range(n) if known[i].any()]
    assert scores["exact_match"] == pytest.approx(np.mean(exact))


@few
@given(n=st.integers(1, 8), seed=seeds, gaps=st.floats(0, 1))
def test_a_class_at_each_token_is_scored_over_all_positions(n: int, seed: int, gaps: float) -> None:
    output, truth = draw(LETTER, n, seed, gaps, tokens=7)
    flat, true = output.movedim(1, -1).reshape(-1, 5), truth.reshape(-1)
    assert of(LETTER, output, truth, thorough=True) == pytest.approx(of(LETTER, flat, true, thorough=True))
    assert np.array_equal(confusion(LETTER, output, truth), confusion(LETTER, flat, true))


@few
@given(n=sizes, seed=seeds, gaps=st.floats(0, 1))
@pytest.mark.parametrize("target", [DIGIT, PAIR], ids=lambda t: t.name)
def test_confusion_is_scikit_learn_s(target: Target, n: int, seed: int, gaps: float) -> None:
    output, truth = draw(target, n, seed, gaps)
    known = truth != MISSING
    counts = confusion(target, output, truth)
    if not known.any():
        assert not counts.any()
        return
    expected = reference.confusion_matrix(truth[known], output.argmax(1)[known], labels=range(target.size))
    assert np.array_equal(counts, expected)
    assert counts.trace() / counts.sum() == pytest.approx(of(target, output, truth)["accuracy"])


@few
@given(n=st.integers(2, 900), seed=seeds)
@pytest.mark.parametrize("target", [PAIR, LETTER, SIGNS], ids=lambda t: t.name)
def test_roc_curves_are_scikit_learn_s(target: Target, n: int, seed: int) -> None:
    output, truth = draw(target, n, seed)
    scores, curves = of(target, output, truth, thorough=True), roc(target, output, truth)
    assert ("auroc" in scores) == bool(curves)
    if curves:
        assert np.mean([area for _, _, area in curves.values()]) == pytest.approx(scores["auroc"])
    assert not (target is PAIR and 0 in curves)
    for which, (false, true, area) in curves.items():
        probability = output.double().sigmoid() if target is SIGNS else output.double().softmax(1)
        positive = truth[:, which] > 0 if target is SIGNS else truth == which
        whole = reference.roc_curve(positive, probability[:, which])
        assert area == pytest.approx(reference.roc_auc_score(positive, probability[:, which]))
        assert len(false) <= MOST_POINTS and (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
        assert set(zip(false, true, strict=True)) <= set(zip(*whole[:2], strict=True))
        if len(whole[0]) <= MOST_POINTS:
            assert reference.auc(false, true) == pytest.approx(area)


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.name)
def test_what_is_not_defined_is_left_out(target: Target) -> None:
    output, truth = draw(target, 6, 0)
    same = truth[:1].expand(6, *truth.shape[1:]).clone()
    assert {"auroc", "r2"}.isdisjoint(of(target, output, same, thorough=True))
    assert of(target, output, torch.full_like(truth, MISSING if target.kind == "class" else math.nan)) == {}
    broken = of(target, torch.full_like(output, math.nan), truth, thorough=True)
    assert all(map(math.isfinite, broken.values())) and {"loss", "rmse", "pinball", "auroc"}.isdisjoint(broken)
    with pytest.raises(ValueError, match="no samples"):
        of(target, output[:0], truth[:0])


def test_labels_that_nobody_has_and_nobody_expects_have_no_f1() -> None:
    scores = of(SIGNS, -torch.ones(3, 4), torch.zeros(3, 4), thorough=True)
    assert scores == pytest.approx({"accuracy": 1.0, "exact_match": 1.0, "loss": math.log1p(math.exp(-1))})


def test_many_classes_have_no_auroc() -> None:
    for size, there in ((MOST_CLASSES, True), (MOST_CLASSES + 1, False)):
        many = Target("word", "class", size)
        output, truth = draw(many, 200, 0)
        assert ("auroc" in of(many, output, truth, thorough=True)) == there == bool(roc(many, output, truth))


@pytest.mark.parametrize("target", ALL, ids=lambda t: t.name)
def test_metrics_tell_the_kind_and_every_kind_has_its_primary(target: Target) -> None:
    output, truth = draw(target, 30, 1)
    scores = of(target, output, truth, thorough=True)
    assert kind_of(scores) == target.kind and PRIMARY[target.kind] in scores
    quick = of(target, output, truth)
    assert scores.keys() - quick.keys() == (THOROUGH if target.kind in ("class", "labels") else set())
    # What SHARES and LOWER_IS_BETTER say, held to a perfect model: shares are 1 there, errors 0 (the loss by rounding).
    perfect: Callable[[], Tensor] = {
        "class": lambda: 1e4 * F.one_hot(truth.long().clamp(min=0), target.size).float(),
        "labels": lambda: 1e4 * (truth - 0.5),
        "value": lambda: (truth - target.offset) / target.scale,
        "quantiles": lambda: ((truth - target.offset) / target.scale)[:, None].expand(-1, target.size),
    }[target.kind]
    for name, value in of(target, perfect(), truth, thorough=True).items():
        if not name.startswith("coverage"):
            assert value == pytest.approx(0 if name in LOWER_IS_BETTER else 1, abs=1e-6)
            assert (name in SHARES) == (name not in LOWER_IS_BETTER and name != "r2")
