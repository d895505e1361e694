"""Losses for training and scores for reports, for each target of a model.

The scores are computed with NumPy from one confusion matrix. scikit-learn's functions, against which the tests hold
them, spend about two milliseconds a score on checking their input, and a client is scored thousands of times a run.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.data import MISSING, Target

PRIMARY: dict[str, tuple[str, bool]] = {"class": ("accuracy", True), "value": ("rmse", False)}
"""For each kind of target, the metric that methods are ranked by, and whether higher is better."""


def losses(
    outputs: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    targets: Sequence[Target],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each target's loss, a mean over the samples that have it, as a scalar tensor; 0 if none has.

    A class target: cross-entropy of logits (n, classes, ...) in nats, times the weight of the sample's class. Labels:
    binary cross-entropy of logits (n, labels), a positive's times its weight. A value: the mean squared error of the
    output (n,) against (value - offset) / scale, so it has no unit. Quantiles: the pinball loss of outputs
    (n, quantiles) in the same unit, max(q e, (q - 1) e) with e = truth - output, summed over the quantiles (Koenker and
    Bassett 1978). `weights`: `class_weights` of the targets. The mean is over the count of samples, not over their
    weights, so that a sample's loss does not depend on the others in its batch.
    """
    result = {}
    for target in targets:
        output, truth = outputs[target.name], y[target.name]
        known = target.known(truth)
        each = _each(target, output, truth, known, (weights or {}).get(target.name))
        result[target.name] = each.mean() if known.all() else each.sum() / known.sum().clamp(min=1)
    return result


def _each(target: Target, output: Tensor, truth: Tensor, known: Tensor, weight: Tensor | None) -> Tensor:
    """The loss of each entry of `truth`, 0 where it is missing."""
    if target.kind == "class":
        each = F.cross_entropy(output, truth, ignore_index=MISSING, reduction="none")
        return each if weight is None else each * weight[truth.clamp(min=0)] * known
    truth = torch.where(known, truth, 0.0)
    if target.kind == "labels":
        each = F.binary_cross_entropy_with_logits(output, truth, pos_weight=weight, reduction="none")
    elif target.kind == "value":
        each = F.mse_loss(output, (truth - target.offset) / target.scale, reduction="none")
    else:
        error = ((truth - target.offset) / target.scale)[:, None] - output
        level = torch.tensor(target.quantiles, dtype=output.dtype)
        each = torch.maximum(level * error, (level - 1) * error).sum(1)
    return each * known


def class_weights(targets: Sequence[Target], y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights for `losses` of those targets that have any, float32 (size,).

    A balanced class target: n / (classes n_c) of the labels in `y`, the client's own training part, 1 for a class that
    it has not. Balanced labels: negatives over positives of each, 1 where it has only one of the two.
    """
    result = {}
    for target in targets:
        if target.weights:
            result[target.name] = torch.tensor(target.weights)
        elif target.balanced:
            truth = y[target.name]
            known = target.known(truth)
            if target.kind == "class":
                counts = torch.bincount(truth[known], minlength=target.size).float()
                weight = counts.sum() / (target.size * counts)
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
    outputs: Mapping[str, Tensor], y: Mapping[str, Tensor], targets: Sequence[Target]
) -> dict[str, dict[str, float]]:
    """Each target's metrics over pooled predictions of n >= 1 samples: {target: {metric: value}}.

    A class target: accuracy; balanced_accuracy (mean recall over the labels that occur); f1 (macro over the labels
    that occur or were predicted, 0 for a label never predicted right); loss. A value target: mae and rmse in the
    value's own unit; r2, left out if fewer than two samples or all values equal, where it is not defined; loss.
    These are scikit-learn's definitions. Raises ValueError if there is no sample.
    """
    result = {}
    for target in targets:
        output, truth = outputs[target.name].detach(), y[target.name]
        if not len(truth):
            raise ValueError(f"no samples to score {target.name} on")
        if target.kind == "class":
            metrics = _class_metrics(output.argmax(1).numpy(force=True), truth.numpy(force=True), target.size)
            metrics["loss"] = float(F.cross_entropy(output, truth))
        else:
            metrics = _value_metrics(output.numpy(force=True), truth.numpy(force=True), target.scale)
        result[target.name] = metrics
    return result


def _class_metrics(predicted: npt.NDArray[np.int64], truth: npt.NDArray[np.int64], classes: int) -> dict[str, float]:
    confusion = np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    right = confusion.diagonal()
    of_truth, of_predicted = confusion.sum(1), confusion.sum(0)
    occurs, either = of_truth > 0, (of_truth + of_predicted) > 0
    return {
        "accuracy": float(right.sum() / len(truth)),
        "balanced_accuracy": float((right[occurs] / of_truth[occurs]).mean()),
        "f1": float((2 * right[either] / (of_truth + of_predicted)[either]).mean()),
    }


def _value_metrics(output: npt.NDArray[np.float32], truth: npt.NDArray[np.float32], scale: float) -> dict[str, float]:
    exact = truth.astype(np.float64)
    error = output.astype(np.float64) * scale - exact
    squares = float(error @ error)
    metrics = {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt(squares / len(error)))}
    centred = exact - exact.mean()
    if len(exact) >= 2 and (total := float(centred @ centred)) > 0 and exact.min() < exact.max():
        metrics["r2"] = 1 - squares / total
    metrics["loss"] = squares / len(error) / scale**2
    return metrics
