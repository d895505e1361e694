"""Training losses of each target."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from meadow.tasks.data import MISSING, Target


def losses(
    outputs: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    targets: Sequence[Target],
    weights: Mapping[str, Tensor] | None = None,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Each target's loss, a scalar tensor: the mean over the samples that have the target, 0 if none has.

    A class: cross-entropy of logits (n, classes, ...) in nats, times the class weight. Labels: binary cross-entropy of
    logits (n, labels), positives weighted. A value: squared error of the output (n,) against (value - offset) / scale.
    Quantiles: pinball loss of outputs (n, quantiles) on the same scale, max(q e, (q - 1) e) with e = truth - output,
    summed over the quantiles (Koenker and Bassett 1978). A sample with several entries (labels, a class per token)
    has the mean over its known entries. `weights`: see `class_weights`. `smoothing`: the share of a class label that is
    spread evenly over all classes (Szegedy et al. 2016, section 7). The mean is over the number of samples, not over
    weights or entries, so that a sample's loss does not depend on the others in its batch.
    """
    samples = sample_losses(outputs, y, targets, weights, smoothing)
    result = {}
    for target in targets:
        known = target.known(y[target.name])
        present = known.flatten(1).any(1) if known.ndim > 1 else known
        result[target.name] = samples[target.name].sum() / present.sum().clamp(min=1)
    return result


def mean_loss(target: Target, outputs: Mapping[str, Tensor], y: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """The value of `losses`, up to rounding, for a class target with all labels known and no weights."""
    return F.cross_entropy(outputs[target.name], y[target.name], label_smoothing=smoothing)


def sample_losses(
    outputs: Mapping[str, Tensor],
    y: Mapping[str, Tensor],
    targets: Sequence[Target],
    weights: Mapping[str, Tensor] | None = None,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Each target's loss of each sample, (n,): the mean over the sample's known entries (tokens, labels), 0 if none.

    A sample's loss depends on that sample alone, as DP-SGD requires. `losses` is the mean of these.
    """
    result = {}
    for target in targets:
        output, truth = outputs[target.name], y[target.name]
        known = target.known(truth)
        each = entry_losses(target, output, truth, known, (weights or {}).get(target.name), smoothing)
        result[target.name] = each.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1) if each.ndim > 1 else each
    return result


def entry_losses(
    target: Target, output: Tensor, truth: Tensor, known: Tensor, weight: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    """The loss of each entry of `truth`, in its shape, 0 where it is missing; `weight` as in `losses`."""
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
    """The loss weights of each target that has any, float32 (size,), on the device of `y`, a client's training part.

    Balanced classes: n / (k n_c), with n known labels, n_c of them of class c, and k classes that occur, so that the mean
    over the samples is 1; 1 for a class that does not occur. Balanced labels: negatives / positives of each, 1 if it has
    only one of the two.
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
    """The weighted sum of the targets' losses, a scalar tensor. Raises ValueError unless each target has a weight."""
    each = losses(outputs, y, targets)
    terms = [weight * each[target.name] for weight, target in zip(weights, targets, strict=True)]
    return sum(terms[1:], start=terms[0])
