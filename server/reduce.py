"""From a round's replies to the next model: what nodes have added up, and what is left to add up here, in the order that
defines its bits; then the algorithm's step, or that of client-level DP."""

from collections.abc import Mapping, Sequence

from flwr.app import Message, MetricRecord, RecordDict
from meadow.server.admission import Verdict
from meadow.server.attempt import Attempt
from meadow.server.client_level import ClientLevel
from meadow.server.session import Session
from meadow.strategies.roles import name_weights
from meadow.strategies.wire.packing import Answer

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, add, cut, total, weighted_sum


def next_model(session: Session, round_: int, tried: Attempt) -> Arrays:
    """The shared arrays after the round. Without a good reply they stay, but under client-level DP noise moves them."""
    admitted = tried.verdict.admitted
    if isinstance(session.protection, ClientLevel):
        updates = [answer.arrays for answer in admitted if answer.arrays is not None]
        return session.protection.combine(session.arrays, updates, round_)
    if not admitted:
        return session.arrays
    combined, _ = session.strategy.aggregate_train(round_, _for_strategy(session, tried))
    return from_record(combined) if combined is not None else session.arrays


def _for_strategy(session: Session, tried: Attempt) -> list[Message]:
    """TEMPORARY"""
    if not getattr(session.strategy, "needs_sums_only", False):
        found = []
        for answer in tried.verdict.admitted:
            content = RecordDict(
                {"metrics": MetricRecord(dict(answer.metrics)), "arrays": to_record(answer.arrays or {})}
            )
            asked = Message(RecordDict(), answer.client, "train")
            found.append(Message(content, reply_to=asked))
        return found
    whole = round_sum(tried.trained, tried.verdict, session.experiment.equal_weights)
    if whole is None:
        return []
    content = RecordDict({"arrays": to_record(whole.sums), "weights": MetricRecord(dict(whole.weights))})
    return [Message(content, reply_to=Message(RecordDict(), 0, "train"))]


def round_sum(cohort: Sequence[int], verdict: Verdict, equal: bool = False) -> WeightedSum | None:
    """The sum over a cohort of what nodes have added up, and of single replies, added up here; None if there are none."""
    admitted, sums, blocks = {answer.client: answer for answer in verdict.admitted}, verdict.sums, cut(cohort)

    def known(span: Span) -> WeightedSum | None:
        found = sums.get(tuple(c for block in blocks[slice(*span)] for c in block))
        if found is None and span[1] - span[0] == 1 and any(c in admitted for c in blocks[span[0]]):
            return _block_sum(blocks[span[0]], admitted, equal)
        return found

    return total((0, len(blocks)), known, add) if blocks else None


def _block_sum(block: Sequence[int], admitted: Mapping[int, Answer], equal: bool) -> WeightedSum:
    return weighted_sum(
        (name_weights(answer.metrics, answer.arrays, equal), answer.arrays)
        for answer in (admitted[c] for c in block if c in admitted)
        if answer.arrays is not None
    )
