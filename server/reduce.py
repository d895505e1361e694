"""From a round's replies to the next model: collects the replies as a sum or as single updates, and calls the algorithm.

A sum is taken in a fixed order, which defines its bits.
"""

from collections.abc import Sequence

from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, add, cut, total, weighted_sum
from meadow.server.admission import Verdict
from meadow.server.attempt import Attempt
from meadow.server.session import Session
from meadow.strategies import equal_weights
from meadow.strategies.protocol import ClientUpdate, State
from meadow.strategies.roles import name_weights


def next_model(session: Session, round_: int, tried: Attempt) -> tuple[Arrays, State]:
    """The shared arrays and the algorithm's state after the round."""
    admitted = _admitted(session, round_, tried)
    if not admitted and not session.protection.needs_no_reply:
        return session.arrays, session.state
    return session.algorithm.update(session.state, admitted, session.arrays)


def _admitted(session: Session, round_: int, tried: Attempt) -> WeightedSum | Sequence[ClientUpdate] | None:
    """The replies that count, in the form that the algorithm takes: a sum (None without replies), or single updates."""
    equal = equal_weights(session.experiment)
    if session.algorithm.sums_only:
        return round_sum(tried.trained, tried.verdict, equal)
    return [
        ClientUpdate(a.client, round_, a.arrays, name_weights(a.metrics, a.arrays, equal), a.metrics)
        for a in tried.verdict.admitted
        if a.arrays is not None
    ]


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
