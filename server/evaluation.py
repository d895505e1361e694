"""What the server says about quality: the shared model on the global test set, and the spread over clients."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from meadow.tasks.data import Target
from meadow.tasks.metrics import LOWER_IS_BETTER, MOST_CLASSES, Ints, confusion, roc
from meadow.tasks.task import Task

Scores = Mapping[str, float]
"""One client's or one model's scores, "target/metric" -> value."""


def over_clients(
    scores: Mapping[int, Scores], samples: Mapping[int, int] | Ints
) -> dict[str, dict[str, dict[str, float]]]:
    """Summarise clients' scores: {target: {metric: {mean, weighted, std, p10, worst_decile, min}}}.

    mean and std (population) count every client once; weighted counts it by its test samples; p10 is the tenth
    percentile (linear between ranks); worst_decile is the mean over the worst tenth of the clients, rounded up, where
    worst means highest for losses and errors. A client that lacks a metric (R2 of one sample) is left out of it.
    """
    keys = sorted({key for one in scores.values() for key in one})
    flat: dict[str, dict[str, float]] = {}
    for key in keys:
        clients = [c for c in sorted(scores) if key in scores[c] and math.isfinite(scores[c][key])]
        if not clients:
            continue
        values = np.array([scores[c][key] for c in clients], dtype=np.float64)
        weights = np.array([samples[c] for c in clients], dtype=np.float64)
        worst_first = np.sort(values)
        if key.rpartition("/")[2] in LOWER_IS_BETTER:
            worst_first = worst_first[::-1]
        flat[key] = {
            "mean": float(values.mean()),
            "weighted": float(values @ weights / weights.sum()),
            "std": float(values.std()),
            "p10": float(np.percentile(values, 10)),
            "worst_decile": float(worst_first[: math.ceil(len(values) / 10)].mean()),
            "min": float(values.min()),
        }
    result: dict[str, dict[str, dict[str, float]]] = {}
    for key, summary in flat.items():
        target, _, metric = key.partition("/")
        result.setdefault(target, {})[metric] = summary
    return result


def mean_tree(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of equal-shaped trees of numbers, leaf by leaf; a leaf that some tree lacks is averaged over the rest."""
    return reduce_trees(trees, lambda values: float(np.mean(values)))


def reduce_trees(trees: Sequence[Mapping[str, Any]], how: Callable[[list[float]], float | None]) -> dict[str, Any]:
    """One tree out of equal-shaped trees of numbers: each leaf is `how` of the leaves there are in its place."""
    result: dict[str, Any] = {}
    for key in dict.fromkeys(k for tree in trees for k in tree):
        leaves = [tree[key] for tree in trees if key in tree]
        branches = [leaf for leaf in leaves if isinstance(leaf, Mapping)]
        result[key] = reduce_trees(branches, how) if branches else how([float(leaf) for leaf in leaves])
    return result


def describe(outputs: Mapping[str, Tensor], y: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, Any]:
    """What a model's outputs look like, for `evaluation.json`: {target: {classes, confusion, roc}}, for JSON.

    classes: the names of the classes or labels; confusion: rows of counts, the truth by row, of class targets; roc:
    {class: {false_positive, true_positive, auroc}} as `meadow.tasks.metrics.roc` says. Targets of other kinds, or with more
    than MOST_CLASSES, are left out.
    """
    found: dict[str, Any] = {}
    for target in targets:
        if target.kind not in ("class", "labels") or target.size > MOST_CLASSES:
            continue
        output, truth, names = outputs[target.name], y[target.name], class_names(target)
        about: dict[str, Any] = {"classes": names}
        if target.kind == "class":
            about["confusion"] = confusion(target, output, truth).tolist()
        about["roc"] = {
            names[which]: {"false_positive": false.tolist(), "true_positive": true.tolist(), "auroc": area}
            for which, (false, true, area) in roc(target, output, truth).items()
        }
        found[target.name] = about
    return found


def add_confusion(clients: Sequence[Mapping[str, Ints]], targets: Sequence[Target]) -> dict[str, Any]:
    """The clients' confusion counts added up, for `evaluation.json`: {target: {classes, confusion, clients}}."""
    result = {}
    for target in targets:
        if counts := [one[target.name] for one in clients if target.name in one]:
            total = np.sum(counts, axis=0).reshape(target.size, target.size).tolist()
            result[target.name] = {"classes": class_names(target), "confusion": total, "clients": len(counts)}
    return result


def read_confusion(said: Mapping[str, Any], task: Task, client: int) -> dict[str, Ints]:
    """The confusion counts in a client's reply, int64 (classes * classes,) a target.

    Taken only where they may be true: of a class target with at most MOST_CLASSES, whole numbers from 0, no more in all
    than the client's test part has entries.
    """
    result = {}
    for target in task.targets:
        flat = said.get(target.name)
        if target.kind != "class" or target.size > MOST_CLASSES or not isinstance(flat, list):
            continue
        entries = len(task.split.clients[client].test) * math.prod(task.dataset.train.y[target.name].shape[1:])
        if len(flat) == target.size**2 and all(isinstance(n, int) and 0 <= n <= entries for n in flat):
            counts = np.array(flat, dtype=np.int64)
            if counts.sum() <= entries:
                result[target.name] = counts
    return result


def class_names(target: Target) -> list[str]:
    """The names of a target's classes or labels; their numbers where it has no names."""
    return list(target.names) or [str(i) for i in range(target.size)]
