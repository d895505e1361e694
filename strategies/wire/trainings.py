"""Counts the trainings of each trainer, and the reasons why faster trainers were skipped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

UNDISCLOSED = "undisclosed"
"""Replaces a trainer's name that would disclose private labels."""

Reasons = tuple[tuple[str, str], ...]
"""(trainer, reason) of each faster trainer that was skipped, in order of preference."""


@dataclass
class Trainings:
    """Counts of trainings, which are calls of `fit`; some algorithms train twice a round.

    counts: trainings by trainer. passed_over: counts by skipped trainer and reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, trainer: str, reasons: Reasons, times: int = 1) -> None:
        """Count trainings of one trainer."""
        self.merge(type(self)({trainer: times}, {name: {reason: times} for name, reason in reasons}))

    def merge(self, other: Self) -> None:
        """Add other counts to these."""
        _add(self.counts, other.counts)
        for name, reasons in other.passed_over.items():
            _add(self.passed_over.setdefault(name, {}), reasons)

    def take(self) -> Self:
        """Return the counts so far and reset them."""
        taken = type(self)(self.counts, self.passed_over)
        self.counts, self.passed_over = {}, {}
        return taken

    def as_json(self) -> dict[str, Any]:
        """The form in `rounds.jsonl` and `summary.json`: {"training": counts, "passed_over": reasons}."""
        return {"training": dict(sorted(self.counts.items())), "passed_over": dict(sorted(self.passed_over.items()))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Invert `as_json`; missing keys give empty counts. Raises ValueError for anything but counts."""
        counts, reasons = value.get("training", {}), value.get("passed_over", {})
        if not isinstance(reasons, dict) or not all(map(_counts, (counts, *reasons.values()))):
            raise ValueError("training and passed_over must contain counts")
        return cls(dict(counts), {name: dict(some) for name, some in reasons.items()})

    @classmethod
    def total(cls, parts: Iterable[Mapping[str, Any]]) -> Self:
        """Add up the records of rounds."""
        whole = cls()
        for part in parts:
            whole.merge(cls.from_json(part))
        return whole


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def _counts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and type(n) is int and n >= 0 for k, n in value.items())
