"""One attempt at a round: a cohort is drawn and sent the model, and each reply is judged."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord
from meadow.server import checkpoints
from meadow.server.admission import Verdict, admit
from meadow.server.cohorts import Call, call
from meadow.server.exchange import Cohort, Sums
from meadow.server.session import Session
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.attacks import attack, attackers
from meadow.strategies.wire.packing import Answer, Request
from meadow.strategies.wire.replies import arrays_fault, weight_fault

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.named import Arrays

log = logging.getLogger("meadow.server")


@dataclass(frozen=True)
class Attempt:
    """Who was asked, who of these trained, what each of those was sent, and which replies count.

    quorum: good replies that the round needs.
    """

    cohort: list[int]
    trained: list[int]
    sent: Mapping[int, Arrays]
    verdict: Verdict
    quorum: int

    @property
    def counts(self) -> bool:
        """Whether enough replies are good."""
        return len(self.verdict.admitted) >= self.quorum


def attempt(session: Session, round_: int, number: int) -> Attempt:
    """Draw a cohort, send it the model, and judge the replies. Raises RunStopped where a budget is spent."""
    protection = session.protection
    session.clock.now("broadcast")
    protection.require(round_)
    called = call(
        session.experiment,
        round_,
        session.sizes,
        session.schedule,
        number,
        protection.cohort_secret,
        without=protection.left,
    )
    requests = _requests(session, round_, number, called)
    sent = {request.client: request.arrays for request in requests}
    replies, sums = _carry(session, requests, called)
    left = protection.read(replies, round_)
    verdict = _judge(session, round_, called, sent, replies, sums)
    return Attempt(called.asked, called.trained, sent, verdict, protection.quorum(len(called.asked), len(left)))


def _requests(session: Session, round_: int, number: int, called: Call) -> list[Request]:
    """What each client that trains is asked."""
    config: dict[str, Any] = {
        "round": round_,
        "attempt": number,
        "run": session.run_id,
        "keep-from": checkpoints.oldest_round(session.folder.checkpoints),
        "void": session.void,
        "evaluate": session.placement.evaluates_received(round_),
    }
    if not called.trained:
        return []
    messages = session.strategy.configure_train(
        round_, to_record(session.arrays), ConfigRecord(config), Cohort(called.trained)
    )
    read: dict[int, Arrays] = {}
    requests = []
    for message in messages:
        client, record = message.metadata.dst_node_id, message.content.array_records["arrays"]
        arrays = read.setdefault(id(record), read.get(id(record)) or from_record(record))
        share = called.work.get(client)
        given = config if share is None else config | {"work": share}
        requests.append(Request(client, arrays, given, session.protection.reminder(client)))
    return requests


def _carry(session: Session, requests: list[Request], called: Call) -> tuple[list[Answer], Sums]:
    """Send the requests; what the last round left is written meanwhile, and is on the disk when this returns."""
    clock, whole = session.clock, bool(getattr(session.strategy, "needs_sums_only", False))
    whole = whole and not attackers(session.experiment) and session.experiment.privacy.unit != "client"
    work = session.placement.work(called, session.sizes)
    replies, sums = session.exchange.send("train", requests, whole, work, meanwhile=session.listeners.clients_train)
    clock.part("broadcast", session.exchange.times)
    clock.now("write")
    session.listeners.settle()
    clock.now("reduce")
    return replies, sums


def _judge(
    session: Session, round_: int, called: Call, sent: Mapping[int, Arrays], replies: list[Answer], sums: Sums
) -> Verdict:
    """Which replies count. Who was asked and, simulated, never answered is refused with that reason."""
    experiment, strategy = session.experiment, session.strategy
    samples = session.placement.samples(called.trained, session.exchange.roll.sizes)
    attacked = attackers(experiment)
    if attacked and experiment.attack.kind != "label-flip":
        _attack(session, replies, attacked, sent, samples, round_)
    verdict = admit(
        replies,
        sums,
        sent,
        samples,
        equal=experiment.equal_weights,
        max_norm=experiment.cohort.max_norm,
        judge=strategy.judge if isinstance(strategy, FedAvg) else None,
    )
    for client, reason in verdict.refused.items():
        which = {"round": round_, "client": client}
        log.warning(
            "round %d: client %d does not count: %s", *which.values(), reason.strip().splitlines()[-1], extra=which
        )
    return Verdict(verdict.admitted, verdict.sums, dict(sorted({**verdict.refused, **called.absent}.items())))


def _attack(
    session: Session,
    replies: list[Answer],
    bad: frozenset[int],
    sent: Mapping[int, Arrays],
    sizes: Mapping[int, int],
    round_: int,
) -> None:
    """Put what the attackers send in the place of what they trained. They look at sound replies alone."""
    came = {reply.client: reply for reply in replies if reply.arrays is not None}
    updates = {
        client: reply.arrays
        for client, reply in came.items()
        if reply.arrays is not None
        and not weight_fault(reply.metrics, sizes[client])
        and not arrays_fault(reply.arrays, reply.metrics, sent[client])
    }
    plan = session.experiment
    for client, arrays in attack(updates, bad, next(iter(sent.values())), plan.attack, plan.run.seed, round_).items():
        came[client].arrays = arrays
