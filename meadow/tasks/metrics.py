"""Losses for training and scores for reports, for each target of a model.

The scores are scikit-learn's, told not to check its input again: a client is scored thousands of times a run. Those of
classes are counted here, by its formulas, because importing it takes as long as a round of a thousand clients.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from meadow.tasks.data import MISSING, Target

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PRIMARY: dict[str, str] = {"class": "accuracy", "labels": "f1", "value": "rmse", "quantiles": "pinball"}
"""For each kind of target, the metric that methods are ranked by."""

LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse", "pinball"})
"""Of all other metrics more is better; coverage alone has an aim, its level."""

SHARES = frozenset({"accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc", "exact_match"})
"""Metrics that are fractions in 0..1, as coverage is; mae, rmse and pinball have the value's unit, the others none."""

THOROUGH = frozenset({"auroc"})
"""Metrics that only a thorough evaluation has: that of the global test set, and the clients' last."""

MOST_CLASSES = 50
"""With more classes or labels, AUROC, ROC curves and confusion counts are left out: they cost too much and tell little."""

MOST_POINTS = 200
"""Points of a ROC curve that are kept."""


def kind_of(metrics: Collection[str]) -> str:
    """The kind of target that has these metrics: a run folder does not say the kind, but its metrics tell."""
    tells = {"exact_match": "labels", "rmse": "value", "pinball": "quantiles"}
    return next((kind for metric, kind in tells.items() if metric in metrics), "class")


def losses(
    outputs: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    targets: Sequence[Target],
    weights: Mapping[str, Tensor] | None = None,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Each target's loss, a mean over the samples that have it, as a scalar tensor; 0 if none has.

    A class target: cross-entropy of logits (n, classes, ...) in nats, times the weight of the sample's class. Labels:
    binary cross-entropy of logits (n, labels), a positive's times its weight. A value: the mean squared error of the
    output (n,) against (value - offset) / scale, so it has no unit. Quantiles: the pinball loss of outputs
    (n, quantiles) in the same unit, max(q e, (q - 1) e) with e = truth - output, summed over the quantiles (Koenker and
    Bassett 1978). A sample with several entries (labels, a class at each token) has the mean over those that are known.
    `weights`: `class_weights` of the targets. `smoothing`: this share of a class label is spread evenly over all classes
    (Szegedy et al. 2016, section 7); other kinds of target keep their loss. The mean is over the count of samples, not
    over their weights or entries, so that a sample's loss does not depend on the others in its batch.
    """
    samples = sample_losses(outputs, y, targets, weights, smoothing)
    result = {}
    for target in targets:
        known = target.known(y[target.name])
        present = known.flatten(1).any(1) if known.ndim > 1 else known
        result[target.name] = samples[target.name].sum() / present.sum().clamp(min=1)
    return result


def mean_loss(target: Target, outputs: Mapping[str, Tensor], y: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """What `losses` gives for a class target whose labels are all known, without weights, but for the last bits."""
    return F.cross_entropy(outputs[target.name], y[target.name], label_smoothing=smoothing)


def sample_losses(
    outputs: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    targets: Sequence[Target],
    weights: Mapping[str, Tensor] | None = None,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Each target's loss of each sample, (n,): its mean over the entries (tokens, labels) that the sample has, 0 if none.

    A sample's loss depends on that sample alone, as DP-SGD needs it. Where samples have one entry each, and all of them
    have it, the mean over the samples is `losses`.
    """
    result = {}
    for target in targets:
        output, truth = outputs[target.name], y[target.name]
        known = target.known(truth)
        each = _each(target, output, truth, known, (weights or {}).get(target.name), smoothing)
        result[target.name] = each.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1) if each.ndim > 1 else each
    return result


def _each(
    target: Target, output: Tensor, truth: Tensor, known: Tensor, weight: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    """The loss of each entry of `truth`, 0 where it is missing."""
    if target.kind == "class":
        return F.cross_entropy(output, truth, weight, ignore_index=MISSING, reduction="none", label_smoothing=smoothing)
    truth = torch.where(known, truth, 0.0)
    if target.kind == "labels":
        each = F.binary_cross_entropy_with_logits(output, truth, pos_weight=weight, reduction="none")
    elif target.kind == "value":
        each = F.mse_loss(output, (truth - target.offset) / target.scale, reduction="none")
    else:
        error = ((truth - target.offset) / target.scale)[:, None] - output
        level = torch.tensor(target.quantiles, dtype=output.dtype, device=output.device)
        each = torch.maximum(level * error, (level - 1) * error).sum(1)
    return each * known


def class_weights(targets: Sequence[Target], y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights for `losses` of those targets that have any, float32 (size,), on the device of `y`.

    A balanced class target: n / (k n_c) with n_c of the n known labels in `y`, the client's own training part, of
    class c, and k classes that occur there; their mean over the samples is 1. 1 for a class that does not occur.
    Balanced labels: negatives over positives of each, 1 where it has only one of the two.
    """
    result = {}
    for target in targets:
        truth = y[target.name]
        if target.weights:
            result[target.name] = torch.tensor(target.weights, device=truth.device)
        elif target.balanced:
            known = target.known(truth)
            if target.kind == "class":
                counts = torch.bincount(truth[known], minlength=target.size).float()
                weight = counts.sum() / ((counts > 0).sum() * counts)
            else:
                positive = torch.where(known, truth, 0.0).sum(0)
                weight = (known.sum(0) - positive) / positive
            result[target.name] = torch.where(torch.isfinite(weight) & (weight > 0), weight, 1.0)
    return result


def loss(
    outputs: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    targets: Sequence[Target],
    weights: Sequence[float],
) -> Tensor:
    """The sum over targets of weight times loss, a scalar tensor. Raises ValueError unless each target has a weight."""
    each = losses(outputs, y, targets)
    terms = [weight * each[target.name] for weight, target in zip(weights, targets, strict=True)]
    return sum(terms[1:], start=terms[0])


def score(
    outputs: Mapping[str, Tensor], y: Mapping[str, Tensor], targets: Sequence[Target], thorough: bool = False
) -> dict[str, dict[str, float]]:
    """Each target's metrics over pooled predictions of n >= 1 samples: {target: {metric: value}}.

    Missing entries of `y` are left out, and so are a target of which nothing is known, and a metric that is not
    defined or not a finite number. All are scikit-learn's. Of every target `loss`: that of `losses` without weights,
    but the mean over all known entries.

    class (with one at each token: over all known positions): accuracy; balanced_accuracy, the mean recall over the
    classes that occur; precision, recall and f1, macro over the classes that occur or were predicted, 0 where a
    quotient has a zero denominator. If `thorough` and there are at most MOST_CLASSES, auroc: of two classes that of the
    second one's probability, of more the mean over the classes that occur of each one's against all others; not
    defined if only one class occurs.

    labels, each predicted where its probability is above 1/2: accuracy over all entries; exact_match, the share of
    samples with every known label right; precision, recall and f1, macro over the labels that some sample has or was
    predicted to have, not defined if there is none, else as above. If `thorough`, as above, auroc: macro over the
    labels that some samples have and some have not.

    value: mae and rmse in the value's own unit; r2, not defined if all values are equal.

    quantiles: pinball, the mean pinball loss over samples and quantiles, in the value's own unit; for each level
    coverage_<level>, the share of values at or below the predicted quantile.

    Raises ValueError if there is no sample.
    """
    result: dict[str, dict[str, float]] = {}
    for target in targets:
        # In float64: a loss near zero is a small difference of logits.
        output, truth = outputs[target.name].detach().double(), y[target.name]
        truth = truth.double() if truth.is_floating_point() else truth
        if not len(truth):
            raise ValueError(f"no samples to score {target.name} on")
        known = target.known(truth)
        if not known.any():
            continue
        if target.kind == "class":
            metrics = _class_scores(output, truth, known)
        elif target.kind == "labels":
            metrics = _labels_scores(output, truth, known)
        elif target.kind == "value":
            metrics = _value_scores(target, output, truth, known)
        else:
            metrics = _quantile_scores(target, output, truth, known)
        if thorough:
            with _scikit_learn() as sk:
                areas = [float(sk.auc(*sk.roc_curve(*asked)[:2])) for _, *asked in _questions(target, output, truth)]
            metrics |= {"auroc": float(np.mean(areas))} if areas else {}
        metrics["loss"] = float(_each(target, output, truth, known, None).sum() / known.sum())
        result[target.name] = {name: value for name, value in metrics.items() if np.isfinite(value)}
    return result


@contextmanager
def _scikit_learn() -> Iterator[Any]:
    """scikit-learn's metrics (a large half of a second to import), told not to check their input."""
    import sklearn.metrics

    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        yield sklearn.metrics


def confusion(target: Target, output: Tensor, truth: Tensor) -> Ints:
    """How often a class (row) was predicted as which (column), int64 (classes, classes), over all known entries."""
    known = target.known(truth)
    if not known.any():
        return np.zeros((target.size, target.size), dtype=np.int64)
    true, predicted = truth[known], output.movedim(1, -1)[known].argmax(1)
    counts = np.bincount((true * target.size + predicted).numpy(force=True), minlength=target.size**2)
    return counts.astype(np.int64, copy=False).reshape(target.size, target.size)


def roc(target: Target, output: Tensor, truth: Tensor) -> dict[int, tuple[Floats, Floats, float]]:
    """ROC curves: class or label -> (false positive rates, true positive rates, area under the whole curve).

    Of two classes that of the second; else each against all others, of those that have positives and negatives. Points
    on a straight line between others are left out, and of what remains at most MOST_POINTS are kept, evenly by rank.
    Empty for other kinds of target, and for more than MOST_CLASSES.
    """
    curves = {}
    for which, positive, rank in _questions(target, output, truth):
        with _scikit_learn() as sk:
            false, true, _ = sk.roc_curve(positive, rank)
            area = float(sk.auc(false, true))
        keep = np.unique(np.linspace(0, len(false) - 1, min(len(false), MOST_POINTS)).round().astype(int))
        curves[which] = (false[keep], true[keep], area)
    return curves


def _class_scores(output: Tensor, truth: Tensor, known: Tensor) -> dict[str, float]:
    true = truth[known].numpy(force=True)
    predicted = output.movedim(1, -1)[known].argmax(1).numpy(force=True)
    size = int(max(true.max(), predicted.max())) + 1
    support, named = np.bincount(true, minlength=size), np.bincount(predicted, minlength=size)
    there = (support > 0) | (named > 0)
    support, named = support[there], named[there]
    hits = np.bincount(true[true == predicted], minlength=size)[there]
    recall = hits / np.maximum(support, 1)
    return {
        "accuracy": float((true == predicted).mean()),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "precision": float((hits / np.maximum(named, 1)).mean()),
        "recall": float(recall.mean()),
        "f1": float((2 * hits / (support + named)).mean()),
    }


def _labels_scores(output: Tensor, truth: Tensor, known: Tensor) -> dict[str, float]:
    predicted, true = (output > 0) & known, (truth > 0) & known
    right = predicted == true
    metrics = {
        "accuracy": float(right[known].double().mean()),
        "exact_match": float(right.all(1)[known.any(1)].double().mean()),
    }
    if (either := (predicted | true).any(0)).any():
        # An entry that is not known is neither true nor predicted here, which counts for none of the three. The empty
        # column is there because scikit-learn takes a single one for two classes.
        padded = (F.pad(rows, (0, 1)).numpy(force=True) for rows in (true, predicted))
        with _scikit_learn() as sk:
            found = sk.precision_recall_fscore_support(*padded, zero_division=0)[:3]
        of_labels = (values[:-1][either.numpy(force=True)] for values in found)
        metrics |= {name: float(v.mean()) for name, v in zip(("precision", "recall", "f1"), of_labels, strict=True)}
    return metrics


def _value_scores(target: Target, output: Tensor, truth: Tensor, known: Tensor) -> dict[str, float]:
    true = truth[known].numpy(force=True)
    predicted = output[known].numpy(force=True) * target.scale + target.offset
    with _scikit_learn() as sk:
        metrics = {
            "mae": float(sk.mean_absolute_error(true, predicted)),
            "rmse": float(sk.root_mean_squared_error(true, predicted)),
        }
        if true.min() < true.max() and true.var() > 0:
            metrics["r2"] = float(sk.r2_score(true, predicted))
    return metrics


def _quantile_scores(target: Target, output: Tensor, truth: Tensor, known: Tensor) -> dict[str, float]:
    true = truth[known].numpy(force=True)
    predicted = output[known].numpy(force=True) * target.scale + target.offset
    with _scikit_learn() as sk:
        pinball = [sk.mean_pinball_loss(true, predicted[:, i], alpha=q) for i, q in enumerate(target.quantiles)]
    coverage = (true[:, None] <= predicted).mean(0)
    return {"pinball": float(np.mean(pinball))} | {
        f"coverage_{level:g}": float(share) for level, share in zip(target.quantiles, coverage, strict=True)
    }


def _questions(target: Target, output: Tensor, truth: Tensor) -> Iterator[tuple[int, npt.NDArray[np.bool_], Floats]]:
    """The yes-or-no questions of a target: (class or label, whether so, what rises with its probability), the last two
    (n,) over the known entries; only those that have both answers, and none if the model's outputs are not finite."""
    if target.kind not in ("class", "labels") or target.size > MOST_CLASSES or not output.isfinite().all():
        return
    known = target.known(truth)
    flat = output.movedim(1, -1)[known].double().softmax(1) if target.kind == "class" else output.double()
    for which in range(1 if (target.kind, target.size) == ("class", 2) else 0, target.size):
        if target.kind == "class":
            positive, rank = truth[known] == which, flat[:, which]
        else:
            there = known[:, which]
            positive, rank = truth[there, which] > 0, flat[there, which]
        if 0 < int(positive.sum()) < len(positive):
            yield which, positive.numpy(force=True), rank.numpy(force=True)
