"""What leaves is declared; under DP nothing leaves unprotected by default; budgets and noise follow the settings."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helpers.refusals import refused
from meadow.config.schema import (
    RELEASES,
    Cohort,
    Evaluate,
    Experiment,
    Local,
    Partition,
    Privacy,
    Run,
    Strategy,
)
from meadow.privacy.accounting import epsilon
from meadow.privacy.plan import (
    budgets,
    client_cost,
    client_denominator,
    client_noise,
    dpsgd,
    dpsgd_cost,
    local_cost,
    local_noise,
    steps_a_round,
)
from meadow.privacy.releases import OUTSIDE, SWITCHES, allowed, releases
from meadow.runtime.errors import UserError


def experiment(**privacy: Any) -> Experiment:
    """An experiment with these privacy settings, past the check of what is built into training yet."""
    return Experiment().model_copy(update={"privacy": Privacy(**privacy)})


def sections() -> st.SearchStrategy[Experiment]:
    """Experiments over every axis that decides what leaves; those that would be refused are left out."""

    def build(
        unit: str, placement: Any, share: Any, release: list[str], on: list[str], adaptive: bool, pooled_epsilon: float
    ) -> Experiment | None:
        try:
            more = {} if unit == "none" else {"epsilon": pooled_epsilon, "sample_rate": 0.1}
            return Experiment(
                run=Run(placement=placement),
                strategy=Strategy(share=share),
                evaluate=Evaluate(on=tuple(on)),
                privacy=Privacy(unit=unit, release=tuple(release), adaptive_clip=adaptive, **more),  # type: ignore[arg-type]
            )
        except ValidationError:
            return None

    return st.builds(
        build,
        st.sampled_from(["none", "example", "client", "local"]),
        st.sampled_from(["federated", "local", "pooled"]),
        st.sampled_from(["all", "none", "body", "head", "trainable"]),
        st.lists(st.sampled_from(RELEASES), unique=True),
        st.lists(st.sampled_from(["global", "clients"]), unique=True),
        st.booleans(),
        st.floats(0.5, 8.0),
    ).filter(lambda found: found is not None)  # type: ignore[return-value]


@settings(max_examples=300, deadline=None)
@given(sections())
def test_what_is_declared_is_what_the_switches_let_out(found: Experiment) -> None:
    declared = releases(found)
    unprotected = [q for q in declared if not q.protected]
    if found.privacy.unit == "none":
        assert all(allowed(found, switch) for switch in SWITCHES)
        assert not any(q.protected for q in declared)
        return
    assert {q.switch for q in unprotected} - {""} <= set(found.privacy.release)
    for switch, whats in SWITCHES.items():
        assert all((what in [q.what for q in declared]) == allowed(found, switch) for what in whats)
    silent = [q.what for q in unprotected if not q.switch]
    expected = [] if found.run.placement != "pooled" else ["all training data"]
    if found.privacy.unit == "client":
        expected = ["model arrays"]  # the server sees the updates, and the declaration says so
    assert len(silent) == len(expected)
    assert all(what.startswith(start) for what, start in zip(silent, expected, strict=True))
    if found.share != "none" or found.run.placement == "pooled":
        assert any(q.protected for q in declared)


def test_every_switch_of_the_schema_is_a_release() -> None:
    assert tuple(SWITCHES) == RELEASES
    with pytest.raises(KeyError, match="gradients"):
        allowed(Experiment(), "gradients")


def test_by_default_an_example_level_run_lets_out_arrays_alone() -> None:
    left = releases(experiment(unit="example", epsilon=3.0, sample_rate=0.05))
    assert all(q.protected for q in left)
    assert [q.what for q in left if OUTSIDE not in q.mechanism] == ['model arrays (share = "all")']
    assert left[0].mechanism == "DP-SGD (Poisson rate 0.05, gradients clipped to 1, Gaussian noise)"
    assert len(left) == 4


def test_budgets_by_law(tmp_path: Path) -> None:
    assert budgets(experiment(unit="example", epsilon=3.0), 3) == [3.0] * 3
    assert budgets(experiment(unit="example", noise_multiplier=1.0), 2) == [math.inf] * 2
    uniform = budgets(experiment(unit="example", budgets="uniform 1 8"), 2000)
    assert 1 <= min(uniform) < max(uniform) <= 8
    assert sum(uniform) / 2000 == pytest.approx(4.5, abs=4 * 7 / math.sqrt(12 * 2000))
    choice = budgets(experiment(unit="example", budgets="choice 1 2 4"), 3000)
    assert {value: choice.count(value) for value in set(choice)} == {
        value: pytest.approx(1000, abs=4 * math.sqrt(3000 * 2 / 9)) for value in (1.0, 2.0, 4.0)
    }
    assert choice[:9] == budgets(experiment(unit="example", budgets="choice 1 2 4"), 9)  # of each client by itself
    path = tmp_path / "budgets.csv"
    path.write_text("client,epsilon\n1,2.5\n0,1\n")
    assert budgets(experiment(unit="example", budgets=f"file {path}"), 2) == [1.0, 2.5]
    for text, words in (
        ("client,epsilon\n0,1\n", "no row for client 1"),
        ("client,epsilon\n0,1\n1,-2\n", "client 1 has epsilon = -2"),
        ("client,epsilon\n0,1\n1,much\n", "ValueError"),
        ("client,budget\n0,1\n", "KeyError"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            budgets(experiment(unit="example", budgets=f"file {path}"), 2)
    with pytest.raises(UserError, match="FileNotFoundError"):
        budgets(experiment(unit="example", budgets=f"file {tmp_path / 'none.csv'}"), 2)


def test_a_budget_becomes_the_noise_that_spends_it() -> None:
    found = experiment(unit="example", epsilon=3.0, sample_rate=0.1).model_copy(
        update={"local": Local(epochs=2, batch_size=8)}
    )
    assert steps_a_round(found) == 20  # two expected passes, whatever the client's size
    mechanism = dpsgd(found, 5, 3.0)
    assert mechanism.denominator == 8
    assert 0.995 * 3 <= dpsgd_cost(found, mechanism, 5).epsilon <= 3
    past = [(0.1, 2.0, 50)]
    assert dpsgd(found, 5, 3.0, past).noise_multiplier > mechanism.noise_multiplier
    assert 0.995 * 3 <= dpsgd_cost(found, dpsgd(found, 5, 3.0, past), 5, past).epsilon <= 3
    fixed = experiment(unit="example", noise_multiplier=1.2, sample_rate=0.1, denominator=5.0)
    assert dpsgd(fixed, 5, math.inf).noise_multiplier == 1.2
    assert dpsgd(fixed, 5, math.inf).denominator == 5
    with refused("privacy.noise_multiplier = 0", "privacy.epsilon"):
        dpsgd(experiment(unit="example", epsilon=3.0, sample_rate=0.1), 5, math.inf)


def test_local_noise_is_calibrated_over_all_rounds() -> None:
    found = experiment(unit="local", epsilon=8.0)
    z = local_noise(found, 10, 8.0)
    assert 0.995 * 8 <= local_cost(found, z, 10).epsilon <= 8
    assert local_cost(found, z, 10).epsilon == epsilon([(1.0, z / 2, 10)], 1e-5)
    assert local_noise(experiment(unit="local", noise_multiplier=2.0), 10, math.inf) == 2
    with refused("privacy.noise_multiplier = 0", "privacy.epsilon"):
        local_noise(found, 10, math.inf)


def test_client_level_noise_by_how_cohorts_are_drawn() -> None:
    def run(fraction: float, sampling: Any = "fixed") -> Experiment:
        return experiment(unit="client", epsilon=8.0).model_copy(
            update={
                "run": Run(rounds=20),
                "partition": Partition(clients=100),
                "cohort": Cohort(fraction=fraction, sampling=sampling),
            }
        )

    poisson, fixed, everyone = (
        client_noise(run(0.1, "poisson")),
        client_noise(run(0.1)),
        client_noise(run(1.0)),
    )
    assert 0.995 * 8 <= client_cost(run(0.1, "poisson"), poisson, 20).epsilon <= 8
    assert 0.99 * 8 <= client_cost(run(0.1), fixed, 20).epsilon <= 8
    assert client_cost(run(0.1), fixed, 20).accountant == "rdp"
    assert fixed > poisson  # a fixed cohort costs more, and is not sold as a Poisson one
    assert client_cost(run(1.0), everyone, 20).epsilon == epsilon([(1.0, everyone, 20)], 1e-5)
    assert client_denominator(run(0.1)) == 10
    assert client_denominator(experiment(unit="client", epsilon=8.0, denominator=7.0)) == 7
    assert client_noise(experiment(unit="client", noise_multiplier=0.8)) == 0.8
    with refused('privacy.unit = "client"', 'privacy.budgets = "uniform 1 8"', "privacy.epsilon"):
        client_noise(experiment(unit="client", budgets="uniform 1 8"))
