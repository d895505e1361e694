"""Scores models: the shared one on the global test set, and each client's own on its test part."""

import logging
import math
from collections.abc import Sequence

from torch import Tensor

from meadow.runtime.seeds import numpy_generator
from meadow.server.evaluation import read_confusion
from meadow.server.session import Session
from meadow.server.summary import ClientScores
from meadow.strategies.wire.packing import Answer, Request, Values
from meadow.tasks.evaluation import load_into, predict
from meadow.tasks.metrics import score
from meadow.tasks.numerics import kernels

log = logging.getLogger("meadow.server")


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
    """Ask every client to score the model that it would use after `round_`; clients that do not answer are omitted.

    `last`: with all metrics and, if evaluate.fine_tune_epochs is set, after local fine-tuning, too.
    """
    everyone: Sequence[int] = range(session.experiment.partition.clients)
    if last and 0 < (sample := session.experiment.evaluate.sample) < len(everyone):
        draw = numpy_generator(session.experiment.run.seed, "evaluate")
        everyone = sorted(int(c) for c in draw.choice(len(everyone), sample, replace=False))
    fine_tuned = last and session.experiment.evaluate.fine_tune_epochs > 0
    config = {"round": round_, "run": session.run_id, "finetune": fine_tuned, "void": session.void, "thorough": last}
    sent = session.arrays
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
    return scores


def scores_in(answer: Answer) -> dict[str, float]:
    """The scores in an answer that are finite numbers."""
    scores = answer.section("evaluation")
    return {key: value for key in scores if (value := number(scores, key)) is not None}


def number(values: Values, key: str) -> float | None:
    """The value under a key if it is a finite number, else None."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
