"""Summarises a run at its end: `summary.json` and `clients.csv`, from the round records and the last scores."""

import hashlib
import math
import resource
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meadow.arrays.named import arrays_sha256
from meadow.config.cohort import unseen
from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.server.evaluation import (
    ClientScores,
    mean_tree,
    over_clients,
    score_globally,
    scores_of,
    test_sizes,
    validation_spread,
)
from meadow.server.session import Session
from meadow.strategies.trainable import HEADS, is_added, trained
from meadow.strategies.wire.trainings import Trainings
from meadow.tasks.evaluation import evaluate
from meadow.tasks.metrics import THOROUGH, Ints
from meadow.tasks.source import source_data, source_model
from meadow.tasks.task import Task

LAST = 10


def summarise(session: Session, status: str, reason: str, scores: Mapping[int, ClientScores]) -> dict[str, Any]:
    """The summary of a run that has ended. `scores` is empty if the run did not reach the last evaluation."""
    experiment, task, records = session.experiment, session.task, session.folder.rounds()
    global_curve = [r["global"] for r in records if r["global"]]
    shared = next((r["global"] for r in records if r["round"] == session.kept_round and r["global"]), None)
    at_end = over_clients(scores_of(scores), test_sizes(experiment, task))
    return {
        "name": experiment.run.name,
        "status": status,
        "reason": reason,
        "rounds": records[-1]["round"] if records else 0,
        "model_sha256": arrays_sha256(session.arrays),
        "personal_sha256": _personal_sha256(scores),
        "split_sha256": task.split.sha256,
        "metrics": {
            "global": shared or (score_globally(session) if scores else global_curve[-1] if global_curve else {}),
            "clients": at_end,
            "validation": validation_spread(session, {c: its.scores for c, its in scores.items()}),
            **_optional_spreads(experiment, scores, test_sizes(experiment, task)),
            "last10": {
                "global": mean_tree(global_curve[-LAST:]),
                "clients": mean_tree(
                    _clients_curve(records, at_end if session.kept_round == session.round else {})[-LAST:]
                ),
            },
        },
        **({"selected": session.selection.summary(session.kept_round)} if experiment.run.selects else {}),
        **forgetting(experiment, task, scores),
        "clients": {
            "total": experiment.partition.clients,
            "never_sampled": session.placement.never_sampled({client for r in records for client in r["cohort"]}),
            "untrained_head": sum(not s.trained for s in scores.values())
            if experiment.share in ("none", "body")
            else 0,
        },
        "cost": {
            "seconds": sum(r["seconds"] for r in records),
            "bytes_up": sum(r["bytes_up"] for r in records),
            "bytes_down": sum(r["bytes_down"] for r in records),
            "steps": sum(r["steps"] for r in records),
            **_model_costs(experiment, task, records),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        **({"without_state": session.states.forgotten} if session.states.forgotten else {}),
        "privacy": session.protection.summary(session.stages),
        "engine": {
            "exact": experiment.engine.exact,
            "trainer": experiment.engine.trainer,
            **Trainings.total(records).as_json(),
        },
    }


def _clients_curve(records: Sequence[Mapping[str, Any]], at_end: Mapping[str, Any]) -> list[Any]:
    """The spread over clients at each evaluation, including the last one."""
    curve = [r["clients"] for r in records if r["clients"]]
    if not at_end:
        return curve
    # Metrics that only the last evaluation measures cannot be averaged over ten rounds.
    as_before = {t: {m: v for m, v in metrics.items() if m not in THOROUGH} for t, metrics in at_end.items()}
    same = bool(records) and records[-1]["clients_round"] == records[-1]["round"]
    return curve if same else [*curve, as_before]


def _optional_spreads(
    experiment: Experiment, scores: Mapping[int, ClientScores], samples: Ints
) -> dict[str, dict[str, Any]]:
    """Spreads that the experiment may ask for: "finetuned", each client's model after local fine-tuning; "unseen" and
    "unseen_finetuned", the same over only the clients held out of training."""
    hidden = {c: s for c, s in scores.items() if c in unseen(experiment)}
    found = {
        "finetuned": scores_of(scores, "finetuned"),
        "unseen": scores_of(hidden),
        "unseen_finetuned": scores_of(hidden, "finetuned"),
    }
    return {name: spread for name, of_clients in found.items() if (spread := over_clients(of_clients, samples))}


def forgetting(experiment: Experiment, task: Task, scores: Mapping[int, ClientScores]) -> dict[str, Any]:
    """{"forgetting": {target: {metric: {before, after}}}}, or {} if evaluate.on lacks the source task or nobody replied.

    Scores are on the source task's test set. before: the source model; after: the mean over the models that clients would
    use at the end.
    """
    after = mean_tree([{k: v for k, v in s.scores.items() if k.startswith("source/")} for s in scores.values()])
    if not after:
        return {}
    before = evaluate(source_model(experiment), source_data(experiment).test, task)
    found: dict[str, Any] = {}
    for key, value in before.items():
        target, _, metric = key.partition("/")
        found.setdefault(target, {})[metric] = {"before": value, "after": after.get(f"source/{key}")}
    return {"forgetting": found}


def client_rows(session: Session, scores: Mapping[int, ClientScores]) -> list[dict[str, Any]]:
    """The rows of `clients.csv`: client, samples, rounds that counted, epsilon, and the metrics of each of its models.

    Samples stay empty if they may not be released. With evaluate.sample, only clients that trained or were scored have rows.
    """
    experiment, epsilons = session.experiment, session.protection.epsilons()
    counted = allowed(experiment, "labels")
    rounds = Counter[int]()
    for record in session.folder.rounds():
        rounds.update(set(record["cohort"]) - {failure["client"] for failure in record["failed"]})
    clients: Iterable[int] = range(experiment.partition.clients)
    if experiment.evaluate.sample:
        clients = sorted(rounds.keys() | scores.keys())
    rows = []
    for client in clients:
        parts = session.task.split.clients[client]
        row: dict[str, Any] = {
            "client": client,
            "train_samples": len(parts.train) if counted else "",
            "validation_samples": len(parts.validation) if counted else "",
            "test_samples": len(parts.test) if counted else "",
            "rounds": rounds[client],
            "epsilon": epsilons.get(client, ""),
        }
        if client in scores:
            row |= {key.replace("/", "."): value for key, value in scores[client].scores.items()}
        rows.append(row)
    return rows


def _model_costs(experiment: Experiment, task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """trained_parameters: number of parameters that local training changes. bytes_saved, if federated: against sending the
    whole model (without the modules of `meadow/tasks/models/peft.py`) to the same clients in the same rounds."""
    model = task.new_model()
    learning = trained(experiment, model.state_dict())
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in learning}
    if experiment.local.trainable == "fisher":
        heads = sum(size for name, size in sizes.items() if name.startswith(HEADS))
        count = heads + math.ceil(experiment.local.fisher_fraction * (sum(sizes.values()) - heads))
    else:
        count = sum(sizes.values())
    whole = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if not is_added(name))
    trips = sum(2 * len(r["cohort"]) - len(r["failed"]) for r in records)
    travelled = sum(r["bytes_up"] + r["bytes_down"] for r in records)
    federated = experiment.run.placement == "federated"
    return {"trained_parameters": count, "bytes_saved": whole * trips - travelled if federated else 0}


def _personal_sha256(scores: Mapping[int, ClientScores]) -> str:
    """SHA-256 over the hashes of all clients' personal arrays, in client order."""
    digest = hashlib.sha256()
    for client in sorted(scores):
        digest.update(f"{client}:{scores[client].personal_sha256}\n".encode())
    return digest.hexdigest()
