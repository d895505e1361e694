"""`[privacy]`: what would protect nothing is refused with the reason and the nearest that works."""

import pytest

from meadow.config.schema import Privacy
from meadow.runtime.errors import UserError
from meadow.strategies.check import load

EXAMPLE = ("privacy.unit=example", "privacy.epsilon=3", "privacy.sample_rate=0.1")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("privacy.epsilon=3",), ["epsilon = 3.0", 'unit = "none"']),
        (("privacy.noise_multiplier=1",), ["noise_multiplier = 1.0"]),
        (("privacy.budgets=uniform 1 8",), ["budgets = uniform 1 8"]),
        (("privacy.unit=example",), ["epsilon", "noise_multiplier"]),
        (("privacy.accountant=gdp",), ["privacy.accountant", "pld"]),
        (("privacy.accountant=moments",), ["privacy.accountant", "'pld'"]),
        (("privacy.unit=exmple",), ["privacy.unit", "did you mean example"]),
        (("privacy.delta=0",), ["privacy.delta = 0"]),
        (("privacy.delta=1",), ["privacy.delta = 1"]),
        (("privacy.clip=0",), ["privacy.clip = 0"]),
        (("privacy.epsilon=-1",), ["privacy.epsilon = -1"]),
        (("privacy.sample_rate=1.5",), ["privacy.sample_rate = 1.5"]),
        (("privacy.release=loss,gradients",), ["release = ['gradients']", "metrics"]),
        (("privacy.on_exhausted=go-on",), ["privacy.on_exhausted"]),
        ((*EXAMPLE, "privacy.adaptive_clip=true"), ["adaptive_clip", 'unit = "client"']),
        ((*EXAMPLE, "privacy.budgets=normal 1 2"), ['"normal 1 2"', "uniform 1 8"]),
        ((*EXAMPLE, "privacy.budgets=uniform 8 1"), ['"uniform 8 1"']),
        ((*EXAMPLE, "privacy.budgets=uniform 1"), ['"uniform 1"']),
        ((*EXAMPLE, "privacy.budgets=choice"), ['"choice"']),
        ((*EXAMPLE, "privacy.budgets=choice 1 -2"), ['"choice 1 -2"']),
        ((*EXAMPLE, "privacy.budgets=choice 1 inf"), ['"choice 1 inf"']),
        ((*EXAMPLE, "privacy.sample_rate=0"), ["privacy.sample_rate = 0", "0.05"]),
        ((*EXAMPLE, "local.batch_size=0"), ["local.batch_size = 0", "privacy.denominator"]),
        ((*EXAMPLE, "task.kinds=class balanced,value"), ["task.kinds", "class balanced", "weights W1 W2"]),
        ((*EXAMPLE, "task.public=train"), ['task.public = "train"']),
        ((*EXAMPLE, "local.patience=2"), ["local.patience = 2"]),
        ((*EXAMPLE, "local.schedule=plateau"), ['local.schedule = "plateau"']),
        ((*EXAMPLE, "local.balance=gradnorm", "task.learn=all"), ['local.balance = "gradnorm"']),
        ((*EXAMPLE, "local.trainable=fisher", "local.fisher_on=local"), ['local.fisher_on = "local"']),
        ((*EXAMPLE, "adapt.method=mmd"), ['adapt.method = "mmd"']),
        ((*EXAMPLE, "strategy.name=moon"), ['strategy.name = "moon"']),
        ((*EXAMPLE, "strategy.name=fedrep", "strategy.share=body"), ['strategy.name = "fedrep"']),
        ((*EXAMPLE, "cohort.stragglers=0.1"), ["cohort.stragglers = 0.1"]),
        ((*EXAMPLE, "cohort.sampling=size", "cohort.size=2"), ['cohort.sampling = "size"']),
        ((*EXAMPLE, "strategy.weights=samples"), ['strategy.weights = "samples"']),
        ((*CLIENT, "strategy.name=scaffold"), ['strategy.name = "scaffold"', "fedprox"]),
        ((*CLIENT, "cohort.attempts=2"), ["cohort.attempts"]),
        ((*CLIENT, "task.public=train"), ['task.public = "train"']),
        ((*CLIENT, "run.placement=local"), ["run.placement", 'unit = "none"']),
        ((*CLIENT, "strategy.share=none"), ["strategy.share"]),
        ((*CLIENT, "run.placement=pooled"), ['placement = "pooled"', 'privacy.unit = "example"']),
        (("privacy.unit=local", "privacy.epsilon=8", "strategy.share=none"), ["strategy.share"]),
    ],
)
def test_what_would_not_hold_is_refused_with_a_way_out(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("fedavg", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("budgets", ["", "uniform 1 8", "uniform 2 2", "choice 1 2 4.5", "file budgets.csv"])
def test_laws_of_budgets_are_read(budgets: str) -> None:
    assert Privacy(unit="example", epsilon=3.0, budgets=budgets).budgets == budgets


def test_all_reasons_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load("fedavg", [*EXAMPLE, "privacy.sample_rate=0", "task.public=train", "local.batch_size=0"])
    for words in ("privacy.sample_rate = 0", 'task.public = "train"', "local.batch_size = 0"):
        assert words in str(caught.value)
