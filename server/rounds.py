"""One round: attempts until one counts, the next model, its measurements, and the listeners' notification."""

import logging

from meadow.arrays.named import flat
from meadow.runtime.errors import RunStopped
from meadow.server.attempt import Attempt, attempt
from meadow.server.listeners import RoundDone
from meadow.server.record import measure
from meadow.server.reduce import next_model
from meadow.server.session import Session

log = logging.getLogger("meadow.server")


def play_round(session: Session, round_: int) -> str:
    """Play a round; return a reason to stop the run after it, or "". Raises RunStopped if the round is impossible."""
    tried, void = first_good(session, round_)
    session.arrays, session.state = next_model(session, round_, tried)
    record = measure(session, round_, tried, void)
    record["times"] = session.clock.read()
    record["seconds"] = sum(record["times"].values())
    session.clock.start("write")
    session.round = round_
    kept, guard = flat(session.state), session.protection.state()
    stop = session.listeners.round_done(RoundDone(round_, record, session.arrays, kept, guard))
    if session.protection.sync_each_round:
        session.listeners.settle()
    return stop


def first_good(session: Session, round_: int) -> tuple[Attempt, list[Attempt]]:
    """The first attempt that counts, and the void attempts before it.

    An attempt with too few valid replies is void: it has no effect, and the round is tried again with a new cohort. Raises
    RunStopped if all `cohort.attempts` are void.
    """
    cohort, void = session.experiment.cohort, list[Attempt]()
    for number in range(1, cohort.attempts + 1):
        tried = attempt(session, round_, number)
        if tried.counts:
            return tried, void
        log.warning("round %d, attempt %d is void: %d valid replies", round_, number, len(tried.verdict.admitted))
        void.append(tried)
        session.void.append(f"{round_}.{number}")
    del session.void[len(session.void) - len(void) :]  # a resumed run starts with the round's first attempt
    first = next(iter(tried.verdict.refused.values()), "").strip().splitlines()
    raise RunStopped(
        f"round {round_}: {len(tried.verdict.admitted)} of {len(tried.cohort)} clients gave a valid reply "
        f"(cohort.quorum = {cohort.quorum}, cohort.attempts = {cohort.attempts})"
        + (f"; the first failure: {first[-1]}" if first else "")
    )
