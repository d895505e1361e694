"""Metrics of each target.

They are scikit-learn's, called without its input checks because clients are evaluated thousands of times per run. Class
metrics are computed here by the same formulas, because importing scikit-learn takes as long as a round of 1,000 clients.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from meadow.tasks.data import Target
from meadow.tasks.losses import entry_losses

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

PRIMARY: dict[str, str] = {"class": "accuracy", "labels": "f1", "value": "rmse", "quantiles": "pinball"}
"""Kind of target -> the metric by which methods are ranked."""

METRICS: dict[str, tuple[str, ...]] = {
    "class": ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "loss"),
    "labels": ("accuracy", "exact_match", "precision", "recall", "f1", "loss"),
    "value": ("mae", "rmse", "r2", "loss"),
    "quantiles": ("pinball", "loss"),
}
"""Kind of target -> the metrics of each evaluation that say which of two models is better."""

LOWER_IS_BETTER = frozenset({"loss", "mae", "rmse", "pinball"})
"""Metrics for which lower is better. For coverage the best value is its level; for all others higher is better."""

SHARES = frozenset({"accuracy", "balanced_accuracy", "precision", "recall", "f1", "auroc", "exact_match"})
"""Metrics that are fractions in 0..1, like coverage; mae, rmse and pinball have the value's unit, the others none."""

THOROUGH = frozenset({"auroc"})
"""Metrics of thorough evaluations only: on the global test set, and the clients' last."""

MOST_CLASSES = 50
"""Most classes or labels for which AUROC, ROC curves and confusion matrices are computed."""

MOST_POINTS = 200
"""Most points that are kept of a ROC curve."""


def kind_of(metrics: Collection[str]) -> str:
    """The kind of target that has these metrics, for run folders, which do not record the kind."""
    typical = {"exact_match": "labels", "rmse": "value", "pinball": "quantiles"}
    return next((kind for metric, kind in typical.items() if metric in metrics), "class")


def score(
    outputs: Mapping[str, Tensor], y: Mapping[str, Tensor], targets: Sequence[Target], thorough: bool = False
) -> dict[str, dict[str, float]]:
    """Each target's metrics over all n >= 1 samples: {target: {metric: value}}, as scikit-learn defines them.

    Missing entries of `y` are ignored. Targets without known entries and metrics that are undefined or not finite are
    omitted. All targets have `loss`, as in `losses` without weights, but averaged over all known entries.

    class (per token: over all known positions): accuracy; balanced_accuracy, the mean recall of the classes that occur;
    precision, recall and f1, macro-averaged over the classes that occur or were predicted, 0 for a zero denominator. If
    `thorough` and at most MOST_CLASSES: auroc, for two classes of the second one's probability, for more the mean of
    one-vs-rest over the classes that occur; undefined if only one occurs.

    labels, predicted where the probability is above 1/2: accuracy over all entries; exact_match, the share of samples
    with every known label right; precision, recall and f1, macro-averaged over the labels that occur or were predicted,
    undefined if there is none. If `thorough`, as above: auroc, macro-averaged over labels with positives and negatives.

    value: mae and rmse in the value's unit; r2, undefined if all values are equal.

    quantiles: pinball, the mean pinball loss over samples and quantiles, in the value's unit; coverage_<level>, the share
    of values at or below the predicted quantile.

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
                areas = [
                    float(sk.auc(*sk.roc_curve(*asked)[:2])) for _, *asked in _binary_problems(target, output, truth)
                ]
            metrics |= {"auroc": float(np.mean(areas))} if areas else {}
        metrics["loss"] = float(entry_losses(target, output, truth, known, None).sum() / known.sum())
        result[target.name] = {name: value for name, value in metrics.items() if np.isfinite(value)}
    return result


@contextmanager
def _scikit_learn() -> Iterator[Any]:
    """scikit-learn's metrics (0.6 s to import), without their input checks."""
    import sklearn.metrics

    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        yield sklearn.metrics


def confusion(target: Target, output: Tensor, truth: Tensor) -> Ints:
    """The confusion matrix over all known entries, int64 (classes, classes): rows true, columns predicted."""
    known = target.known(truth)
    if not known.any():
        return np.zeros((target.size, target.size), dtype=np.int64)
    true, predicted = truth[known], output.movedim(1, -1)[known].argmax(1)
    counts = np.bincount((true * target.size + predicted).numpy(force=True), minlength=target.size**2)
    return counts.astype(np.int64, copy=False).reshape(target.size, target.size)


def roc(target: Target, output: Tensor, truth: Tensor) -> dict[int, tuple[Floats, Floats, float]]:
    """ROC curves: class or label -> (false positive rates, true positive rates, area under the whole curve).

    For two classes that of the second, else one-vs-rest for each with positives and negatives. Points on a straight line
    between others are dropped, then at most MOST_POINTS are kept, evenly by rank. Empty for other kinds of target, and for
    more than MOST_CLASSES.
    """
    curves = {}
    for which, positive, rank in _binary_problems(target, output, truth):
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
        # Unknown entries are neither true nor predicted here, so none of the three counts them. The empty column is added
        # because scikit-learn takes a single column for two classes.
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


def _binary_problems(
    target: Target, output: Tensor, truth: Tensor
) -> Iterator[tuple[int, npt.NDArray[np.bool_], Floats]]:
    """Yield (class or label, whether positive, score) with arrays (n,) over the known entries, for each class or label that
    has positives and negatives; nothing if the model's outputs are not finite."""
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
