"""Scoring models: the shared one on the global test set, and each client's own on its test part."""

import logging
import math
from collections.abc import Sequence

from flwr.app import ConfigRecord, MessageType, MetricRecord, RecordDict
from meadow.server.evaluation import read_confusion
from meadow.server.session import Session
from meadow.server.summary import ClientScores
from meadow.strategies.wire.packing import Request
from torch import Tensor

from meadow.arrays.flower import to_record
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.evaluation import load_into, predict
from meadow.tasks.metrics import score
from meadow.tasks.numerics import kernels

log = logging.getLogger("meadow.server")


def score_globally(session: Session) -> dict[str, dict[str, float]]:
    """The shared model on the global test set: {target: {metric: value}}; empty where `predict_globally` is."""
    outputs = predict_globally(session)
    return score(outputs, session.task.dataset.test.y, session.task.targets, thorough=True) if outputs else {}


def predict_globally(session: Session) -> dict[str, Tensor]:
    """The shared model's outputs on the global test set; empty if part of the model is personal, or nobody asks."""
    if session.roles.personal or "global" not in session.experiment.evaluate.on:
        return {}
    load_into(session.model, session.start | session.arrays)
    seen = session.view
    with kernels(session.model):
        return predict(seen.model, seen.data("test", session.task.dataset.test).x, seen.task.prepare)


def score_clients(session: Session, round_: int, last: bool) -> dict[int, ClientScores]:
    """Ask every client to score the model that it would use after `round_`; who does not answer is left out.

    `last`: thoroughly, and, if that is set, after local fine-tuning too.
    """
    everyone: Sequence[int] = range(session.experiment.partition.clients)
    if last and 0 < (sample := session.experiment.evaluate.sample) < len(everyone):
        draw = numpy_generator(session.experiment.run.seed, "evaluate")
        everyone = sorted(int(c) for c in draw.choice(len(everyone), sample, replace=False))
    fine_tuned = last and session.experiment.evaluate.fine_tune_epochs > 0
    config = ConfigRecord(
        {"round": round_, "run": session.run_id, "finetune": fine_tuned, "void": session.void, "thorough": last}
    )
    asked = RecordDict({"arrays": to_record(session.arrays), "config": config})
    replies, _ = session.exchange.send([Request(client, asked) for client in everyone], MessageType.EVALUATE)
    scores = {}
    for reply in replies:
        client, content = reply.client, reply.content
        identity = content.config_records.get("identity") if content is not None else None
        if content is None or identity is None:
            reason = reply.error or "its reply says nothing of itself"
            log.warning("client %d was not evaluated: %s", client, reason)
            continue
        counts = content.metric_records.get("confusion") or MetricRecord()
        scores[client] = ClientScores(
            scores_in(content),
            str(identity.get("personal")),
            bool(identity.get("trained")),
            read_confusion(counts, session.task, client),
        )
    return scores


def scores_in(content: RecordDict) -> dict[str, float]:
    """The scores in a reply that are finite numbers."""
    record = content.get("evaluation")
    if not isinstance(record, MetricRecord):
        return {}
    return {key: value for key in record if (value := scalar(record, key)) is not None}


def scalar(record: MetricRecord, key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
