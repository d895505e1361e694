"""Scores the shared model and each client's own, and summarises scores: spreads, means, confusion counts, ROC curves."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.runtime.errors import RunStopped
from meadow.runtime.seeds import numpy_generator
from meadow.server.session import Session
from meadow.strategies.wire.packing import Answer, Request, Values
from meadow.tasks.data import Target
from meadow.tasks.evaluation import load_into, predict
from meadow.tasks.metrics import LOWER_IS_BETTER, MOST_CLASSES, Ints, confusion, roc, score
from meadow.tasks.numerics import kernels
from meadow.tasks.task import Task

log = logging.getLogger("meadow.server")

Scores = Mapping[str, float]
"""One client's or one model's scores, "target/metric" -> value."""


@dataclass(frozen=True)
class ClientScores:
    """One client's reply to an evaluation.

    scores: by model/target/metric. personal_sha256: the hash of its personal arrays. trained: whether it ever trained.
    confusion: counts of the model that it would use, by target, int64 (classes * classes,).
    """

    scores: Scores
    personal_sha256: str
    trained: bool
    confusion: Mapping[str, Ints]


def score_globally(session: Session) -> dict[str, dict[str, float]]:
    """The shared model's scores on the global test set: {target: {metric: value}}; empty if `predict_globally` is."""
    outputs = predict_globally(session)
    return score(outputs, session.task.dataset.test.y, session.task.targets, thorough=True) if outputs else {}


def predict_globally(session: Session) -> dict[str, Tensor]:
    """The shared model's outputs on the global test set; empty if evaluate.on lacks "global" or layers are personal."""
    if session.roles.personal or "global" not in session.experiment.evaluate.on:
        return {}
    load_into(session.model, session.start | session.arrays)
    seen = session.view
    with kernels(session.model):
        return predict(seen.model, seen.data("test", session.task.dataset.test).x, seen.task.prepare)


def score_clients(session: Session, round_: int, last: bool) -> dict[int, ClientScores]:
    """Ask every client to score the model that it would use after `round_`; clients that do not answer are omitted. Raises
    RunStopped if none answers the last time.

    `last`: with all metrics and, if evaluate.fine_tune_epochs is set, after local fine-tuning, too.
    """
    everyone: Sequence[int] = range(session.experiment.partition.clients)
    if last and 0 < (sample := session.experiment.evaluate.sample) < len(everyone):
        draw = numpy_generator(session.experiment.run.seed, "evaluate")
        everyone = sorted(int(c) for c in draw.choice(len(everyone), sample, replace=False))
    fine_tuned = last and session.experiment.evaluate.fine_tune_epochs > 0
    config = {"round": round_, "run": session.run_id, "finetune": fine_tuned, "void": session.void, "thorough": last}
    sent, config = session.arrays, config | session.states.about(everyone)
    replies, _ = session.exchange.send("evaluate", [Request(client, sent, config) for client in everyone])
    scores = {}
    for reply in replies:
        identity = reply.section("identity")
        if not identity:
            reason = reply.error or "its reply does not identify the client"
            log.warning("client %d was not evaluated: %s", reply.client, reason)
            continue
        scores[reply.client] = ClientScores(
            scores_in(reply),
            str(identity.get("personal")),
            bool(identity.get("trained")),
            read_confusion(reply.section("confusion"), session.task, reply.client),
        )
    if last and replies and not scores:
        raise RunStopped(f"no client could be evaluated: {reason.strip().splitlines()[-1]}")
    return scores


def validation_spread(session: Session, scores: Mapping[int, Scores]) -> dict[str, Any]:
    """The "validation" of a record or summary, from clients' scores by model/target/metric: {"clients", "global"}.

    clients: as in `over_clients`, of the models that clients would use. global: {target: {metric: value}} of the shared
    model, the mean over the clients weighted by validation samples; empty if there is none. Both {} if nothing was scored.
    """
    sizes = session.task.split.sizes[:, 1]
    weights = sizes if allowed(session.experiment, "labels") else np.ones_like(sizes)
    used = over_clients(of_model(scores, "validation"), weights)
    shared = over_clients(of_model(scores, "validation_shared"), weights)
    if not shared and not session.roles.personal:
        shared = used
    means = {t: {metric: spread["weighted"] for metric, spread in metrics.items()} for t, metrics in shared.items()}
    return {"clients": used, "global": means} if used else {}


def scores_in(answer: Answer, kind: str = "evaluation") -> dict[str, float]:
    """The scores in an answer, in its section `kind`, that are finite numbers."""
    scores = answer.section(kind)
    return {key: value for key in scores if (value := number(scores, key)) is not None}


def number(values: Values, key: str) -> float | None:
    """The value under a key if it is a finite number, else None."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def test_sizes(experiment: Experiment, task: Task) -> Ints:
    """Test samples of each client, int64 (clients,); all 1 if they may not be released."""
    sizes = task.split.sizes[:, 2]
    return sizes if allowed(experiment, "labels") else np.ones_like(sizes)


def scores_of(scores: Mapping[int, ClientScores], model: str = "used") -> dict[int, Scores]:
    """Each client's scores of one of its models, by default the one that it would use, by target/metric."""
    return of_model({client: its.scores for client, its in scores.items()}, model)


def of_model(scores: Mapping[int, Scores], model: str) -> dict[int, Scores]:
    """Each client's scores of one model, by target/metric, from those by model/target/metric."""
    start = f"{model}/"
    return {c: {k.removeprefix(start): v for k, v in its.items() if k.startswith(start)} for c, its in scores.items()}


def over_clients(
    scores: Mapping[int, Scores], samples: Mapping[int, int] | Ints
) -> dict[str, dict[str, dict[str, float]]]:
    """Summarise clients' scores: {target: {metric: {mean, weighted, std, p10, worst_decile, min}}}.

    mean and std (population) weigh all clients equally; weighted weighs them by test samples; p10 is the tenth percentile
    (linear between ranks); worst_decile is the mean over the worst tenth of the clients, rounded up, where the worst losses
    and errors are the highest. A metric ignores clients that lack it (R2 of one sample).
    """
    keys = sorted({key for one in scores.values() for key in one})
    result: dict[str, dict[str, dict[str, float]]] = {}
    for key in keys:
        clients = [c for c in sorted(scores) if key in scores[c] and math.isfinite(scores[c][key])]
        if not clients:
            continue
        values = np.array([scores[c][key] for c in clients], dtype=np.float64)
        weights = np.array([samples[c] for c in clients], dtype=np.float64)
        worst_first = np.sort(values)
        target, _, metric = key.partition("/")
        if metric.rpartition("/")[2] in LOWER_IS_BETTER:
            worst_first = worst_first[::-1]
        result.setdefault(target, {})[metric] = {
            "mean": float(values.mean()),
            "weighted": float(values @ weights / weights.sum()),
            "std": float(values.std()),
            "p10": float(np.percentile(values, 10)),
            "worst_decile": float(worst_first[: math.ceil(len(values) / 10)].mean()),
            "min": float(values.min()),
        }
    return result


def mean_tree(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of equal-shaped trees of numbers, leaf by leaf, over the trees that have the leaf."""
    return reduce_trees(trees, lambda values: float(np.mean(values)))


def reduce_trees(trees: Sequence[Mapping[str, Any]], how: Callable[[list[float]], float | None]) -> dict[str, Any]:
    """Reduce equal-shaped trees of numbers to one: each leaf is `how` of the leaves in its place."""
    result: dict[str, Any] = {}
    for key in dict.fromkeys(k for tree in trees for k in tree):
        leaves = [tree[key] for tree in trees if key in tree]
        branches = [leaf for leaf in leaves if isinstance(leaf, Mapping)]
        result[key] = reduce_trees(branches, how) if branches else how([float(leaf) for leaf in leaves])
    return result


def describe(outputs: Mapping[str, Tensor], y: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, Any]:
    """Describe a model's outputs for `evaluation.json`: {target: {classes, confusion, roc}}.

    classes: names of the classes or labels. confusion: counts for class targets, one row per true class. roc: {class:
    {false_positive, true_positive, auroc}}, see `meadow.tasks.metrics.roc`. Targets of other kinds or with more than
    MOST_CLASSES classes are omitted.
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
    """Add up the clients' confusion counts for `evaluation.json`: {target: {classes, confusion, clients}}."""
    result = {}
    for target in targets:
        if counts := [one[target.name] for one in clients if target.name in one]:
            total = np.sum(counts, axis=0).reshape(target.size, target.size).tolist()
            result[target.name] = {"classes": class_names(target), "confusion": total, "clients": len(counts)}
    return result


def read_confusion(reported: Mapping[str, Any], task: Task, client: int) -> dict[str, Ints]:
    """The confusion counts in a client's reply, int64 (classes * classes,) for each target.

    Counts that cannot be right are ignored. They must belong to a class target with at most MOST_CLASSES classes, be
    non-negative integers, and add up to at most the number of entries in the client's test part.
    """
    result = {}
    for target in task.targets:
        flat = reported.get(target.name)
        if target.kind != "class" or target.size > MOST_CLASSES or not isinstance(flat, list):
            continue
        entries = len(task.split.clients[client].test) * math.prod(task.dataset.train.y[target.name].shape[1:])
        if len(flat) == target.size**2 and all(isinstance(n, int) and 0 <= n <= entries for n in flat):
            counts = np.array(flat, dtype=np.int64)
            if counts.sum() <= entries:
                result[target.name] = counts
    return result


def class_names(target: Target) -> list[str]:
    """The names of a target's classes or labels, or else their numbers."""
    return list(target.names) or [str(i) for i in range(target.size)]
