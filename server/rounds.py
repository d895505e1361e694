"""One round: attempts until one counts, the next model, the round's record, and the listeners' notification."""

import logging
from collections.abc import Sequence
from typing import Any

from meadow.arrays.named import Arrays, flat, nbytes
from meadow.arrays.sums import Span, WeightedSum, add, cut, fault, total, weighted_sum
from meadow.runtime.errors import RunStopped
from meadow.server.admission import Verdict
from meadow.server.attempt import Attempt, attempt
from meadow.server.evaluation import (
    Scores,
    number,
    over_clients,
    score_clients,
    score_globally,
    scores_in,
    scores_of,
    test_sizes,
    validation_spread,
)
from meadow.server.listeners import RoundDone
from meadow.server.session import Session
from meadow.strategies import equal_weights
from meadow.strategies.protocol import ClientUpdate, State
from meadow.strategies.roles import name_weights
from meadow.strategies.wire.packing import Values
from meadow.tasks.task import Task

log = logging.getLogger("meadow.server")


def play_round(session: Session, round_: int) -> str:
    """Play a round; return a listener's reason to stop the run after it, or "". Raises RunStopped if the round is
    impossible."""
    received = session.arrays
    tried, void, (session.arrays, session.state) = first_good(session, round_)
    record = measure(session, round_, tried, void)
    if session.selection.add(record) and session.selection.keeps:
        session.selection.save(received if record["clients_round"] < round_ else session.arrays, session.run_id)
    record["times"] = session.clock.read()
    record["seconds"] = sum(record["times"].values())
    session.clock.start("write")
    session.round = round_
    session.states.note(record)
    kept, guard = flat(session.state), session.protection.state()
    stop = session.listeners.round_done(RoundDone(round_, record, session.arrays, kept, guard))
    if session.protection.sync_each_round:
        session.listeners.settle()
    return stop


def first_good(session: Session, round_: int) -> tuple[Attempt, list[Attempt], tuple[Arrays, State]]:
    """The first attempt that counts, the void attempts before it, and the next model and state.

    An attempt with too few valid replies is void, and so is one that gives no usable model: it has no effect, and the
    round is tried again with a new cohort. Raises RunStopped if all `cohort.attempts` are void.
    """
    cohort, void = session.experiment.cohort, list[Attempt]()
    for count in range(1, cohort.attempts + 1):
        tried = attempt(session, round_, count)
        reason = ""
        if tried.counts:
            found = next_model(session, round_, tried)
            if not (reason := fault(found[0], session.arrays)):
                return tried, void, found
            reason = f"the next model: {reason}"
        valid = len(tried.verdict.admitted)
        log.warning("round %d, attempt %d is void: %s", round_, count, reason or f"{valid} valid replies")
        void.append(tried)
        session.void.append(f"{round_}.{count}")
    del session.void[len(session.void) - len(void) :]  # a resumed run starts with the round's first attempt
    first = (reason or next(iter(tried.verdict.refused.values()), "")).strip().splitlines()
    raise RunStopped(
        f"round {round_}: {valid} of {len(tried.cohort)} clients gave a valid reply "
        f"(cohort.quorum = {cohort.quorum}, cohort.attempts = {cohort.attempts})"
        + (f"; the first failure: {first[-1]}" if first else "")
    )


def next_model(session: Session, round_: int, tried: Attempt) -> tuple[Arrays, State]:
    """The shared arrays and the algorithm's state after the round.

    The algorithm gets the replies that count as a sum in a fixed order, which defines its bits, or one by one.
    """
    algorithm, equal = session.algorithm, equal_weights(session.experiment)
    single = [(answer, answer.arrays) for answer in tried.verdict.admitted if answer.arrays is not None]
    if session.stages.combine is not None:
        return session.stages.combine(session.arrays, [arrays for _, arrays in single], round_), session.state
    admitted: WeightedSum | Sequence[ClientUpdate] | None
    if algorithm.sums_only:
        admitted = round_sum(tried.trained, tried.verdict, equal)
    else:
        admitted = [
            ClientUpdate(a.client, round_, arrays, name_weights(a.metrics, arrays, equal), a.metrics)
            for a, arrays in single
        ]
    return algorithm.update(session.state, admitted, session.arrays) if admitted else (session.arrays, session.state)


def round_sum(cohort: Sequence[int], verdict: Verdict, equal: bool = False) -> WeightedSum | None:
    """The sum over a cohort, of the nodes' sums and of single replies; None if there are neither."""
    admitted, sums, blocks = {answer.client: answer for answer in verdict.admitted}, verdict.sums, cut(cohort)

    def known(span: Span) -> WeightedSum | None:
        found = sums.get(tuple(c for block in blocks[slice(*span)] for c in block))
        if found is not None or span[1] - span[0] > 1:
            return found
        single = [admitted[c] for c in blocks[span[0]] if c in admitted]
        updates = [(answer.metrics, answer.arrays) for answer in single if answer.arrays is not None]
        return weighted_sum((name_weights(m, arrays, equal), arrays) for m, arrays in updates) if single else None

    return total((0, len(blocks)), known, add) if blocks else None


def measure(session: Session, round_: int, tried: Attempt, void: Sequence[Attempt]) -> dict[str, Any]:
    """The round's record, without its times. `void`: the void attempts before the one that counts."""
    session.clock.now("evaluate")
    traffic = traffic_of(session, round_, tried)
    without = [_discarded(session, round_, attempt) for attempt in void]
    scores, validation, of_round = _clients_scores(session, round_, tried)
    kept = [answer.client for answer in tried.verdict.admitted if answer.kept]
    return {
        "round": round_,
        "cohort": tried.cohort,
        "failed": _failed(tried),
        **({"void": without} if void else {}),
        **({"kept": kept} if kept else {}),
        "seconds": 0.0,
        "times": {},
        "idle": session.exchange.idle,
        **{key: value + sum(v[key] for v in without) for key, value in traffic.items()},
        **_training(session.task, [answer.metrics for answer in tried.verdict.admitted]),
        **session.exchange.trainings.take().as_json(),
        "global": score_globally(session) if session.evaluates(round_) else {},
        "clients": over_clients(scores, test_sizes(session.experiment, session.task)),
        "validation": validation_spread(session, validation),
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


def _clients_scores(session: Session, round_: int, tried: Attempt) -> tuple[dict[int, Scores], dict[int, Scores], int]:
    """The clients' scores on their test parts, by target/metric, and on their validation parts, by model/target/metric; and
    the round whose model they belong to."""
    if session.placement.evaluates_after(round_):
        found = score_clients(session, round_, last=False)
        return scores_of(found), {client: its.scores for client, its in found.items()}, round_
    evaluated = [a for a in tried.verdict.admitted if a.values is not None and "evaluation" in a.values]
    validation: dict[int, Scores] = {answer.client: scores_in(answer, "validation") for answer in evaluated}
    return {answer.client: scores_in(answer) for answer in evaluated}, validation, round_ - 1


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
