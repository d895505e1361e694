"""`[privacy]`: what would protect nothing is refused with the reason and the nearest that works."""

import pytest
from meadow.strategies.check import load

from meadow.config.schema import Privacy
from meadow.runtime.errors import UserError

EXAMPLE = ("privacy.unit=example", "privacy.epsilon=3", "privacy.sample_rate=0.1")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("privacy.epsilon=3",), ["epsilon = 3.0", 'unit = "none"', "protects nothing"]),
        (("privacy.noise_multiplier=1",), ["noise_multiplier = 1.0", "protects nothing"]),
        (("privacy.budgets=uniform 1 8",), ["budgets = uniform 1 8", "protects nothing"]),
        (("privacy.unit=example",), ["neither epsilon nor noise_multiplier", "epsilon = 3.0"]),
        (("privacy.accountant=gdp",), ["privacy.accountant", "underestimates", "pld"]),
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
        ((*EXAMPLE, "task.kinds=class balanced,value"), ['"class balanced"', "weights W1 W2"]),
        ((*EXAMPLE, "task.public=train"), ['task.public = "train"', "public file"]),
        ((*EXAMPLE, "local.patience=2"), ["local.patience = 2", 'unit = "client"']),
        ((*EXAMPLE, "local.schedule=plateau"), ['local.schedule = "plateau"', 'unit = "client"']),
        ((*EXAMPLE, "local.balance=gradnorm", "task.learn=all"), ['local.balance = "gradnorm"']),
        ((*EXAMPLE, "local.trainable=fisher", "local.fisher_on=local"), ['local.fisher_on = "local"']),
        ((*EXAMPLE, "adapt.method=mmd"), ['adapt.method = "mmd"', 'unit = "client"']),
        ((*EXAMPLE, "strategy.name=moon"), ['strategy.name = "moon"', "each sample's own loss"]),
        ((*EXAMPLE, "strategy.name=fedrep", "strategy.share=body"), ['strategy.name = "fedrep"', "more than once"]),
        ((*EXAMPLE, "cohort.stragglers=0.1"), ["cohort.stragglers = 0.1", "cohort.stragglers = 0"]),
        ((*EXAMPLE, "cohort.sampling=size", "cohort.size=2"), ['cohort.sampling = "size"', "poisson"]),
        ((*EXAMPLE, "strategy.weights=samples"), ['strategy.weights = "samples"']),
        ((*CLIENT, "strategy.name=scaffold"), ['strategy.name = "scaffold"']),
        ((*CLIENT, "cohort.attempts=2"), ["cohort.attempts = 2"]),
        ((*CLIENT, "task.public=train"), ['task.public = "train"']),
        ((*CLIENT, "run.placement=local"), ['run.placement = "local"', 'unit = "none"']),
        ((*CLIENT, "strategy.share=none"), ['strategy.share = "none"', 'unit = "none"']),
        ((*CLIENT, "run.placement=pooled"), ['placement = "pooled"', 'privacy.unit = "example"']),
        (("privacy.unit=local", "privacy.epsilon=8", "strategy.share=none"), ['strategy.share = "none"']),
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
