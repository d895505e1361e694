"""Rules of `[privacy]`: why a protection would not hold, or cannot be had.

What only the model can tell (batch normalisation, shared parameters) is refused by `meadow.privacy.dpsgd` when the model is
opened; what depends on the algorithm, by `meadow.strategies.check`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from meadow.config.rules.rule import Rule, Text

if TYPE_CHECKING:
    from meadow.config.schema import Experiment

EXAMPLE = ("privacy.unit=example", "privacy.noise_multiplier=1", "privacy.sample_rate=0.1", "local.steps=2")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1")
LOCAL = ("privacy.unit=local", "privacy.noise_multiplier=1")
GIVEN = {"example": EXAMPLE, "client": CLIENT, "local": LOCAL}
"""Overrides of a minimal experiment with each unit."""


def _private(
    units: tuple[str, ...],
    keys: tuple[str, ...],
    when: Callable[[Experiment], bool],
    why: Text,
    write: Text,
    wrong: tuple[str, ...],
    right: tuple[str, ...] = (),
) -> Rule:
    """A rule that holds under some units."""
    given = GIVEN[units[0]]
    return Rule(
        ("privacy.unit", *keys),
        lambda e: e.privacy.unit in units and when(e),
        why,
        write,
        (*given, *wrong),
        (*given, *right),
    )


ALL = ("example", "client", "local")
_ONE_COHORT = "the account is of one cohort a round, clipped, noised and added as it is"
_NO_NOISE = "it is decided by private samples without any noise"
_AS_CLIENT = 'leave it out or write privacy.unit = "client"'

PRIVACY = (
    _private(
        ALL,
        ("cohort.sampling",),
        lambda e: e.cohort.sampling in ("size", "schedule"),
        "who takes part must be a function of the seed alone, which the account knows beforehand",
        'write "poisson" or "fixed"',
        ("cohort.sampling=size", "strategy.weights=equal"),
    ),
    _private(
        ("example", "local"),
        ("cohort.stragglers",),
        lambda e: bool(e.cohort.stragglers),
        "the steps of a round are a public constant",
        "write 0",
        ("cohort.stragglers=0.5",),
    ),
    _private(
        ALL,
        ("strategy.weights",),
        lambda e: (
            e.strategy.weights == "samples" and (e.privacy.unit == "client" or "samples" not in e.privacy.release)
        ),
        "how many samples a client has is private, so each counts 1",
        "leave it out",
        ("strategy.weights=samples",),
        ("strategy.weights=samples", "privacy.release=samples"),
    ),
    Rule(
        ("privacy.unit", "privacy.budgets"),
        lambda e: e.privacy.unit == "client" and bool(e.privacy.budgets),
        "one noise is added for all clients, so they have one budget",
        "write privacy.epsilon",
        ("privacy.unit=client", "privacy.budgets=uniform 1 8"),
        CLIENT,
    ),
    _private(
        ("client",),
        ("cohort.quorum", "cohort.sampling"),
        lambda e: e.cohort.quorum > 1 and e.cohort.sampling == "poisson",
        "whether a round goes on would tell how many took part",
        "write cohort.quorum = 1",
        ("cohort.quorum=2", "cohort.sampling=poisson"),
        ("cohort.quorum=1", "cohort.sampling=poisson"),
    ),
    *(
        _private(("client",), (key,), when, _ONE_COHORT, "leave it out", wrong)
        for key, when, wrong in (
            ("strategy.server_lr", lambda e: e.strategy.server_lr != 1, ("strategy.server_lr=0.5",)),
            ("cohort.attempts", lambda e: e.cohort.attempts > 1, ("cohort.attempts=2",)),
            ("cohort.over_selection", lambda e: e.cohort.over_selection > 0, ("cohort.over_selection=0.5",)),
            (
                "attack.kind",
                lambda e: e.attack.kind not in ("none", "label-flip"),
                ("attack.kind=noise", "attack.fraction=0.5"),
            ),
        )
    ),
    Rule(
        ("privacy.unit", "privacy.sample_rate"),
        lambda e: e.privacy.unit == "example" and e.privacy.sample_rate == 0,
        "it must be a public constant, not a function of each client's size",
        "write the batch over a size that all may know, for example privacy.sample_rate = 0.05",
        ("privacy.unit=example", "privacy.noise_multiplier=1", "local.steps=2"),
        EXAMPLE,
    ),
    _private(
        ("example",),
        ("local.batch_size", "privacy.denominator"),
        lambda e: e.privacy.denominator == 0 and e.local.batch_size == 0,
        "the noisy sum would be divided by each client's private size",
        "write privacy.denominator, the expected batch",
        ("local.batch_size=0",),
        ("local.batch_size=0", "privacy.denominator=16"),
    ),
    *(
        _private(("example",), (f"local.{name}",), when, _NO_NOISE, _AS_CLIENT, wrong)
        for name, when, wrong in (
            ("patience", lambda e: e.local.patience > 0, ("local.patience=1",)),
            ("schedule", lambda e: e.local.schedule == "plateau", ("local.schedule=plateau",)),
            ("balance", lambda e: e.local.balance != "fixed", ("local.balance=dwa",)),
            (
                "fisher_on",
                lambda e: e.local.trainable == "fisher" and e.local.fisher_on == "local",
                ("local.trainable=fisher", "local.fisher_on=local"),
            ),
        )
    ),
    _private(
        ("example",),
        ("adapt.method",),
        lambda e: e.adapt.method != "none",
        "it compares whole batches of private samples, so no sample's share can be clipped",
        'write privacy.unit = "client"',
        ("adapt.method=coral",),
    ),
    _private(
        ("example",),
        ("local.gradual_unit",),
        lambda e: e.local.trainable == "gradual" and e.local.gradual_unit == "epochs",
        "a round of DP-SGD has steps and no epochs",
        'write local.gradual_unit = "rounds"',
        ("local.trainable=gradual", "local.gradual_unit=epochs"),
        ("local.trainable=gradual", "local.gradual_unit=rounds"),
    ),
    _private(
        ("client", "local"),
        ("run.placement", "strategy.share"),
        lambda e: e.share == "none",
        "with nothing shared no update leaves, so there is nothing to protect",
        'write privacy.unit = "none", or "example" if the models themselves are given away',
        ("strategy.share=none",),
    ),
    _private(
        ("client", "local"),
        ("run.placement",),
        lambda e: e.run.placement == "pooled",
        "there are no updates of clients",
        'write privacy.unit = "example"',
        ("run.placement=pooled",),
    ),
    _private(
        ALL,
        ("task.kinds",),
        lambda e: any("balanced" in kind.split() for kind in e.task.kinds[: len(e.task.targets)]),
        "class weights from private labels are neither clipped nor noised",
        "write public ones, weights W1 W2 ...",
        ("task.kinds=class balanced,value",),
        ("task.kinds=class,value",),
    ),
    _private(
        ALL,
        ("task.public",),
        lambda e: e.task.public == "train",
        "vocabulary and scaling would be learned from private data",
        "name a public file, or constants",
        ("task.public=train",),
    ),
)
