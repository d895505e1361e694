"""What is measured of a round and stands in its line of rounds.jsonl."""

from collections.abc import Sequence
from typing import Any

from meadow.server.attempt import Attempt
from meadow.server.evaluation import Scores, over_clients
from meadow.server.scoring import number, score_clients, score_globally, scores_in
from meadow.server.session import Session
from meadow.server.summary import test_sizes, used
from meadow.strategies.wire.packing import Answer, Values

from meadow.arrays.named import nbytes
from meadow.tasks.task import Task


def measure(session: Session, round_: int, tried: Attempt, void: Sequence[Attempt]) -> dict[str, Any]:
    """The round's record, but for the seconds that it took. `void`: the attempts before the one that counts."""
    session.clock.now("evaluate")
    traffic = traffic_of(session, round_, tried)
    without = [_of_void(session, round_, attempt) for attempt in void]
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
    """Bytes of arrays that clients received and sent. Who was asked and never answered was sent as much as the others; the
    first round includes what every client is sent once."""
    sent = {client: nbytes(arrays) for client, arrays in tried.sent.items()}
    usual = max(sent.values(), default=nbytes(session.arrays))
    once = nbytes(session.exchange.roll.base) * session.experiment.partition.clients if round_ == 1 else 0
    down = sum(sent.get(client, usual) for client in tried.cohort) + once
    up = sum(tried.received.get(answer.client, sent[answer.client]) for answer in tried.verdict.admitted)
    return session.placement.traffic(down, up)


def _of_void(session: Session, round_: int, tried: Attempt) -> dict[str, Any]:
    return {"cohort": tried.cohort, "failed": _failed(tried), **traffic_of(session, round_, tried)}


def _failed(tried: Attempt) -> list[dict[str, Any]]:
    return [{"client": client, "reason": reason} for client, reason in tried.verdict.refused.items()]


def _clients_scores(session: Session, round_: int, tried: Attempt) -> tuple[dict[int, Scores], int]:
    """Clients' scores, and the round whose model they are of."""
    if session.placement.evaluates_after(round_):
        return used(score_clients(session, round_, last=False)), round_
    return {answer.client: scores_in(answer) for answer in tried.verdict.admitted if _evaluated(answer)}, round_ - 1


def _evaluated(answer: Answer) -> bool:
    return answer.values is not None and "evaluation" in answer.values


def _training(task: Task, metrics: Sequence[Values]) -> dict[str, Any]:
    """Optimiser steps in all, and each target's training loss, the mean weighted by the clients' samples.

    What a client reports is taken only if it is a finite number; it decides nothing.
    """
    losses = {}
    for target in task.targets:
        pairs = [(number(m, "num-examples"), number(m, f"loss/{target.name}")) for m in metrics]
        known = [(weight, loss) for weight, loss in pairs if weight is not None and loss is not None]
        if known:
            losses[target.name] = {"loss": sum(w * v for w, v in known) / sum(w for w, _ in known)}
    return {"steps": int(sum(number(m, "steps") or 0 for m in metrics)), "train": losses}
