"""Rules of who takes part: `[cohort]`, `[partition]` and the attackers. None of them is asked before `partition.clients` is
known (`meadow.tasks.task.settle`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from meadow.config.rules.rule import Rule

if TYPE_CHECKING:
    from meadow.config.schema import Experiment


def _nobody_left(e: Experiment) -> bool:
    return e.participants < 1 or (bool(e.evaluate.unseen) and e.participants == e.partition.clients)


def _counted(rule: Rule) -> Rule:
    """The rule, asked only where the number of clients is known."""
    when: Callable[[Experiment], bool] = rule.when
    return replace(rule, when=lambda e: e.partition.clients > 0 and when(e))


_RULES = (
    Rule(
        ("evaluate.unseen", "partition.clients"),
        _nobody_left,
        lambda e: f"{e.participants} clients are left in training",
        "choose a share that holds out one client or more, and not all",
        ("evaluate.unseen=0.01", "partition.clients=10"),
        ("evaluate.unseen=0.1", "partition.clients=10"),
    ),
    Rule(
        ("cohort.size", "partition.clients", "evaluate.unseen"),
        lambda e: not _nobody_left(e) and e.cohort.size > e.participants,
        lambda e: f"{e.participants} clients can take part",
        "make the cohort smaller or the population larger",
        ("cohort.size=11", "partition.clients=10"),
        ("cohort.size=10", "partition.clients=10"),
    ),
    Rule(
        ("cohort.quorum", "cohort.size", "cohort.fraction"),
        lambda e: (
            e.cohort.size <= e.participants
            and e.cohort.quorum > e.cohort_size
            and e.cohort.sampling in ("fixed", "size")
        ),
        lambda e: f"a cohort has {e.cohort_size} clients, so every round would fail",
        "make the quorum smaller or the cohort larger",
        ("cohort.quorum=3", "cohort.size=2"),
        ("cohort.quorum=2", "cohort.size=2"),
    ),
    Rule(
        ("cohort.sampling", "cohort.schedule"),
        lambda e: (e.cohort.sampling == "schedule") != bool(e.cohort.schedule),
        "a schedule needs a file, and a file is read only by a schedule",
        'write both, cohort.sampling = "schedule" and cohort.schedule, or neither',
        ("cohort.schedule=who.txt",),
        ("cohort.schedule=who.txt", "cohort.sampling=schedule"),
    ),
    Rule(
        ("cohort.over_selection", "cohort.sampling"),
        lambda e: bool(e.cohort.over_selection) and e.cohort.sampling not in ("fixed", "size"),
        "such a cohort has no size to be filled",
        'write cohort.sampling = "fixed" or "size", or over_selection = 0',
        ("cohort.over_selection=0.5", "cohort.sampling=poisson"),
        ("cohort.over_selection=0.5", "cohort.sampling=fixed"),
    ),
    Rule(
        ("attack.fraction", "partition.clients"),
        lambda e: e.attack.kind != "none" and round(e.attack.fraction * e.partition.clients) < 1,
        "that is no client",
        'raise it, or write attack.kind = "none"',
        ("attack.kind=noise", "attack.fraction=0.01", "partition.clients=10"),
        ("attack.kind=noise", "attack.fraction=0.1", "partition.clients=10"),
    ),
)

COHORT = tuple(_counted(rule) for rule in _RULES)
