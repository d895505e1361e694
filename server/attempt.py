"""One attempt at a round: draw a cohort, send it the model, judge each reply."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from meadow.arrays.named import Arrays, flat, nbytes, split_auxiliary
from meadow.server import checkpoints
from meadow.server.admission import Verdict, admit
from meadow.server.cohorts import Cohort, draw
from meadow.server.exchange import Sums
from meadow.server.session import Session
from meadow.strategies import equal_weights
from meadow.strategies.stages import Arrived, Stages
from meadow.strategies.wire.packing import Answer, Request
from meadow.strategies.wire.replies import arrays_fault, weight_fault

log = logging.getLogger("meadow.server")


@dataclass(frozen=True)
class Attempt:
    """The outcome of one attempt.

    cohort: the clients asked. trained: those of them that trained. sent: the arrays each of those received. received: bytes
    of arrays that the server got from each client, where this differs from the bytes it sent. quorum: the number of valid
    replies that the round needs.
    """

    cohort: list[int]
    trained: list[int]
    sent: Mapping[int, Arrays]
    received: Mapping[int, int]
    verdict: Verdict
    quorum: int

    @property
    def counts(self) -> bool:
        """Whether enough replies are valid."""
        return len(self.verdict.admitted) >= self.quorum


def attempt(session: Session, round_: int, number: int) -> Attempt:
    """Draw a cohort, send it the model, and judge the replies. Raises RunStopped if a budget is spent."""
    protection = session.protection
    session.clock.now("broadcast")
    protection.require(round_)
    called = draw(
        session.experiment,
        round_,
        session.sizes,
        session.schedule,
        number,
        protection.cohort_secret,
        without=protection.exhausted,
    )
    requests = _requests(session, round_, number, called)
    sent = {request.client: request.arrays for request in requests}
    replies, sums = _carry(session, requests, called)
    withdrawn = protection.read(replies, round_)
    received = {r.client: nbytes(r.arrays) for r in replies if r.arrays is not None} if session.stages.encodes else {}
    verdict = _judge(session, round_, called, sent, replies, sums)
    quorum = protection.quorum(len(called.asked), len(withdrawn))
    return Attempt(called.asked, called.trained, sent, received, verdict, quorum)


def _requests(session: Session, round_: int, number: int, called: Cohort) -> list[Request]:
    """The request to each client that trains."""
    config: dict[str, Any] = {
        "round": round_,
        "attempt": number,
        "run": session.run_id,
        "keep-from": session.selection.keep_from(checkpoints.oldest_round(session.folder.checkpoints)),
        "void": session.void,
        **session.states.about(called.trained),
        "evaluate": session.placement.evaluates_received(round_),
    }
    auxiliary = session.algorithm.auxiliary(session.state, session.arrays)
    sent, reminder = session.arrays | flat(auxiliary), session.protection.reminder
    requests = []
    for client in sorted(called.trained):
        share = called.work.get(client)
        given = config if share is None else config | {"work": share}
        requests.append(Request(client, sent, given, reminder(client)))
    return requests


def _carry(session: Session, requests: list[Request], called: Cohort) -> tuple[list[Answer], Sums]:
    """Send the requests. Meanwhile the last round's records are written; they are on disk when this returns."""
    clock, whole = session.clock, session.stages.sums and session.algorithm.sums_only
    work = session.placement.work(called, session.sizes)
    replies, sums = session.exchange.send("train", requests, whole, work, meanwhile=session.listeners.clients_train)
    clock.part("broadcast", session.exchange.times)
    clock.now("write")
    session.listeners.settle()
    clock.now("reduce")
    return replies, sums


def _judge(
    session: Session, round_: int, called: Cohort, sent: Mapping[int, Arrays], replies: list[Answer], sums: Sums
) -> Verdict:
    """Judge the replies. Clients whose absence is simulated are refused, with that reason."""
    samples = session.placement.samples(called.trained, session.exchange.roll.sizes)
    if session.stages.arriving:
        replies = restored(session.stages, round_, replies, sent, samples)
    verdict = admit(
        replies,
        sums,
        sent,
        samples,
        equal=equal_weights(session.experiment),
        judge=session.algorithm.judge,
        judge_update=session.stages.judge,
    )
    for client, reason in verdict.refused.items():
        which = {"round": round_, "client": client}
        last_line = reason.strip().splitlines()[-1]
        log.warning("round %d: the reply of client %d was refused: %s", *which.values(), last_line, extra=which)
    return Verdict(verdict.admitted, verdict.sums, dict(sorted({**verdict.refused, **called.absent}.items())))


def restored(
    stages: Stages, round_: int, replies: list[Answer], sent: Mapping[int, Arrays], samples: Mapping[int, int]
) -> list[Answer]:
    """The replies after the server's half of each stage: their updates have the form of the model again."""
    came = {reply.client: split_auxiliary(reply.arrays) for reply in replies if reply.arrays is not None}
    answers = {reply.client: reply for reply in replies}

    def sound(client: int, update: Arrays) -> bool:
        metrics, whole = answers[client].metrics, update | came[client][1]
        return not (weight_fault(metrics, samples.get(client, 0)) or arrays_fault(whole, metrics, sent[client]))

    own = {client: split_auxiliary(sent[client])[0] for client in came}
    arrived = Arrived(round_, {client: update for client, (update, _) in came.items()}, own, sound)
    stages.arrive(arrived)
    found = []
    for reply in replies:
        if fault := arrived.faults.get(reply.client):
            found.append(Answer(reply.client, error=fault))
        elif reply.client in came:
            found.append(replace(reply, arrays=arrived.updates[reply.client] | came[reply.client][1]))
        else:
            found.append(reply)
    return found
