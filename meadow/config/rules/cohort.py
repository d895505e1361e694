"""Rules on participation: `[cohort]`, `[partition]`, attackers. They are checked once `partition.clients` is known
(`meadow.tasks.task.settle`)."""

from collections.abc import Callable
from dataclasses import replace

from meadow.config.rules.rule import Rule
from meadow.config.schema import Experiment


def _bad_unseen(e: Experiment) -> bool:
    return e.participants < 1 or (bool(e.evaluate.unseen) and e.participants == e.partition.clients)


def _counted(rule: Rule) -> Rule:
    """The rule, checked only if the number of clients is known."""
    when: Callable[[Experiment], bool] = rule.when
    return replace(rule, when=lambda e: e.partition.clients > 0 and when(e))


_RULES = (
    Rule(
        ("evaluate.unseen", "partition.clients"),
        _bad_unseen,
        lambda e: f"{e.participants} clients are left for training",
        "choose a share that holds out at least one client but not all",
        ("evaluate.unseen=0.01", "partition.clients=10"),
        ("evaluate.unseen=0.1", "partition.clients=10"),
    ),
    Rule(
        ("cohort.size", "partition.clients", "evaluate.unseen"),
        lambda e: not _bad_unseen(e) and e.cohort.size > e.participants,
        lambda e: f"{e.participants} clients can take part",
        "write a smaller cohort.size or more clients",
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
        "write a smaller quorum or a larger cohort",
        ("cohort.quorum=3", "cohort.size=2"),
        ("cohort.quorum=2", "cohort.size=2"),
    ),
    Rule(
        ("cohort.sampling", "cohort.schedule"),
        lambda e: (e.cohort.sampling == "schedule") != bool(e.cohort.schedule),
        "sampling by schedule needs a file, and only this sampling uses one",
        'write both, cohort.sampling = "schedule" and cohort.schedule, or neither',
        ("cohort.schedule=who.txt",),
        ("cohort.schedule=who.txt", "cohort.sampling=schedule"),
    ),
    Rule(
        ("cohort.over_selection", "cohort.sampling"),
        lambda e: bool(e.cohort.over_selection) and e.cohort.sampling not in ("fixed", "size"),
        "over-selection needs a cohort of a fixed size",
        'write cohort.sampling = "fixed" or "size", or over_selection = 0',
        ("cohort.over_selection=0.5", "cohort.sampling=poisson"),
        ("cohort.over_selection=0.5", "cohort.sampling=fixed"),
    ),
    Rule(
        ("attack.fraction", "partition.clients"),
        lambda e: e.attack.kind != "none" and round(e.attack.fraction * e.partition.clients) < 1,
        "that share rounds to 0 clients",
        'raise it, or write attack.kind = "none"',
        ("attack.kind=noise", "attack.fraction=0.01", "partition.clients=10"),
        ("attack.kind=noise", "attack.fraction=0.1", "partition.clients=10"),
    ),
)

COHORT = tuple(_counted(rule) for rule in _RULES)
