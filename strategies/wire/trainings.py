"""Who trained: how many trainings each trainer did, and why faster ones were passed over."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

UNDISCLOSED = "undisclosed"
"""The name under which a training is counted whose trainer would tell of private labels."""

Reasons = tuple[tuple[str, str], ...]
"""Of each faster trainer, in the order in which they are asked, why it did not train: (trainer, reason)."""


@dataclass
class Trainings:
    """Counts of trainings. One training is one call of a client's `fit`; some algorithms train twice a round.

    counts: trainings by trainer. passed_over: by faster trainer that did not train and by reason, how many.
    """

    counts: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, trainer: str, reasons: Reasons, times: int = 1) -> None:
        """Count trainings by one trainer."""
        self.merge(type(self)({trainer: times}, {name: {reason: times} for name, reason in reasons}))

    def merge(self, other: Self) -> None:
        """Add another's counts to these."""
        _add(self.counts, other.counts)
        for name, reasons in other.passed_over.items():
            _add(self.passed_over.setdefault(name, {}), reasons)

    def take(self) -> Self:
        """What was counted so far; counting begins anew."""
        taken = type(self)(self.counts, self.passed_over)
        self.counts, self.passed_over = {}, {}
        return taken

    def as_json(self) -> dict[str, Any]:
        """As `rounds.jsonl` and `summary.json` have it: {"training": counts, "passed_over": reasons}."""
        return {"training": dict(sorted(self.counts.items())), "passed_over": dict(sorted(self.passed_over.items()))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`; empty where a record has none. Raises ValueError for anything but counts."""
        counts, reasons = value.get("training", {}), value.get("passed_over", {})
        if not isinstance(reasons, dict) or not all(map(_counts, (counts, *reasons.values()))):
            raise ValueError("it does not say who trained by counts")
        return cls(dict(counts), {name: dict(some) for name, some in reasons.items()})

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> Self:
        """The sum over the records of a run's rounds."""
        whole = cls()
        for part in parts:
            whole.merge(cls.from_json(part))
        return whole


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def _counts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and type(n) is int and n >= 0 for k, n in value.items())
