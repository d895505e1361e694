"""Each rule of combinations, tested by what it carries: overrides that break it alone, and others close to them that break
nothing. All faults of a file are told at once."""

import pytest

from meadow.config.algorithms import ALGORITHMS
from meadow.config.rules import RULES, Rule
from meadow.runtime.errors import UserError
from meadow.strategies import algorithm, check
from meadow.strategies.check import RULES as OF_ALGORITHMS
from meadow.strategies.check import load
from meadow.strategies.roles import roles_of
from meadow.tasks.task import open_task

OWN = list(dict.fromkeys(rule for name in ALGORITHMS for rule in algorithm(name).rules))
EVERY = [*RULES, *OF_ALGORITHMS, *OWN]
OF_MODELS = list(dict.fromkeys(rule for name in ALGORITHMS for rule in algorithm(name).model_rules))


def names(rule: Rule) -> str:
    return ",".join((*rule.settings, *rule.wrong[-1:]))


@pytest.mark.parametrize("rule", EVERY, ids=names)
def test_a_rule_refuses_what_breaks_it_and_nothing_close_to_it(rule: Rule) -> None:
    with pytest.raises(UserError) as caught:
        load("fedavg", rule.wrong)
    told(rule, caught.value)
    check(load("fedavg", rule.right))


def told(rule: Rule, error: UserError) -> None:
    """The error is one line, with the rule's settings and the way out."""
    (fault,) = str(error).splitlines()
    assert [key for key in rule.settings if f"{key} = " not in fault] == []
    write = rule.write if isinstance(rule.write, str) else ""
    assert fault.endswith(write)


@pytest.mark.parametrize("rule", OF_MODELS, ids=names)
def test_a_rule_on_a_model_s_arrays_refuses_what_breaks_it_and_nothing_close_to_it(rule: Rule) -> None:
    """The file may be loaded: what breaks the rule is seen by the model."""
    wrong, right = (load("fedavg", overrides) for overrides in (rule.wrong, rule.right))
    with pytest.raises(UserError) as caught:
        roles_of(wrong, open_task(wrong).new_model())
    told(rule, caught.value)
    assert roles_of(right, open_task(right).new_model()).shared


def test_all_faults_of_a_file_are_told_at_once() -> None:
    """Of the training, of the cohort, of the privacy and of the algorithm, one line each."""
    rules = [next(r for r in EVERY if r.settings == keys) for keys in (
        ("local.balance", "local.trainable"),
        ("cohort.over_selection", "cohort.sampling"),
        ("privacy.unit", "task.public"),
        ("strategy.weights", "strategy.name"),
    )]  # fmt: skip
    with pytest.raises(UserError) as caught:
        load("fedavg", dict.fromkeys(override for rule in rules for override in rule.wrong))
    faults = str(caught.value).splitlines()
    for rule in rules:
        assert any(all(f"{key} = " in fault for key in rule.settings) for fault in faults)


def test_every_rule_says_what_breaks_it_and_what_does_not() -> None:
    assert all(rule.wrong and rule.wrong != rule.right for rule in [*EVERY, *OF_MODELS])
    assert len(EVERY) > 60
