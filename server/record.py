"""Measures a round: the record that becomes its line of rounds.jsonl."""

from collections.abc import Sequence
from typing import Any

from meadow.arrays.named import nbytes
from meadow.server.attempt import Attempt
from meadow.server.evaluation import Scores, over_clients
from meadow.server.scoring import number, score_clients, score_globally, scores_in
from meadow.server.session import Session
from meadow.server.summary import scores_of, test_sizes
from meadow.strategies.wire.packing import Values
from meadow.tasks.task import Task


def measure(session: Session, round_: int, tried: Attempt, void: Sequence[Attempt]) -> dict[str, Any]:
    """The round's record, without its times. `void`: the void attempts before the one that counts."""
    session.clock.now("evaluate")
    traffic = traffic_of(session, round_, tried)
    without = [_discarded(session, round_, attempt) for attempt in void]
    scores, of_round = _clients_scores(session, round_, tried)
    return {
        "round": round_,
        "cohort": tried.cohort,
        "failed": _failed(tried),
        **({"void": without} if void else {}),
        "seconds": 0.0,
        "times": {},
        "idle": session.exchange.idle,
        **{key: value + sum(v[key] for v in without) for key, value in traffic.items()},
        **_training(session.task, [answer.metrics for answer in tried.verdict.admitted]),
        **session.exchange.trainings.take().as_json(),
        "global": score_globally(session) if session.evaluates(round_) else {},
        "clients": over_clients(scores, test_sizes(session.experiment, session.task)),
        "clients_round": of_round,
        "epsilon": session.protection.epsilon(),
    }


def traffic_of(session: Session, round_: int, tried: Attempt) -> dict[str, int]:
    """Bytes of arrays that clients received and sent. Clients that never answered received as much as the others. The first
    round includes the arrays that every client receives once."""
    sent = {client: nbytes(arrays) for client, arrays in tried.sent.items()}
    usual = max(sent.values(), default=nbytes(session.arrays))
    once = nbytes(session.exchange.roll.base) * session.experiment.partition.clients if round_ == 1 else 0
    down = sum(sent.get(client, usual) for client in tried.cohort) + once
    up = sum(tried.received.get(answer.client, sent[answer.client]) for answer in tried.verdict.admitted)
    return session.placement.traffic(down, up)


def _discarded(session: Session, round_: int, tried: Attempt) -> dict[str, Any]:
    return {"cohort": tried.cohort, "failed": _failed(tried), **traffic_of(session, round_, tried)}


def _failed(tried: Attempt) -> list[dict[str, Any]]:
    return [{"client": client, "reason": reason} for client, reason in tried.verdict.refused.items()]


def _clients_scores(session: Session, round_: int, tried: Attempt) -> tuple[dict[int, Scores], int]:
    """The clients' scores, and the round whose model they belong to."""
    if session.placement.evaluates_after(round_):
        return scores_of(score_clients(session, round_, last=False)), round_
    evaluated = [a for a in tried.verdict.admitted if a.values is not None and "evaluation" in a.values]
    return {answer.client: scores_in(answer) for answer in evaluated}, round_ - 1


def _training(task: Task, metrics: Sequence[Values]) -> dict[str, Any]:
    """The total of optimiser steps, and each target's mean training loss, weighted by the clients' samples.

    Reported values that are not finite numbers are ignored. No decision depends on them.
    """
    losses = {}
    for target in task.targets:
        pairs = [(number(m, "num-examples"), number(m, f"loss/{target.name}")) for m in metrics]
        known = [(weight, loss) for weight, loss in pairs if weight is not None and loss is not None]
        if known:
            losses[target.name] = {"loss": sum(w * v for w, v in known) / sum(w for w, _ in known)}
    return {"steps": int(sum(number(m, "steps") or 0 for m in metrics)), "train": losses}
