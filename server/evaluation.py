"""What the server says about quality: the shared model on the global test set, and the spread over clients."""

import math
from collections.abc import Mapping

import numpy as np

Scores = Mapping[str, float]
"""One client's or one model's scores, "target/metric" -> value."""

LOWER_IS_BETTER = ("loss", "mae", "rmse")


def nested(scores: Scores) -> dict[str, dict[str, float]]:
    """ "target/metric" keys as {target: {metric: value}}."""
    result: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        target, _, metric = key.partition("/")
        result.setdefault(target, {})[metric] = value
    return result


def over_clients(scores: Mapping[int, Scores], samples: Mapping[int, int]) -> dict[str, dict[str, dict[str, float]]]:
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


def mean_tree(trees: list[dict[str, object]]) -> dict[str, object]:
    """The mean of equal-shaped trees of numbers, leaf by leaf; a leaf that some tree lacks is averaged over the rest."""
    result: dict[str, object] = {}
    for key in dict.fromkeys(k for tree in trees for k in tree):
        leaves = [tree[key] for tree in trees if key in tree]
        branches = [leaf for leaf in leaves if isinstance(leaf, dict)]
        result[key] = mean_tree(branches) if branches else float(np.mean([float(str(leaf)) for leaf in leaves]))
    return result
