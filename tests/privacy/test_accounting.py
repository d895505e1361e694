"""Accounting: reference values, the exact Gaussian curve, composition, and invariants over many settings."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from helpers.refusals import refused
from meadow.privacy.accounting import (
    client_guarantee,
    epsilon,
    example_guarantee,
    fixed_cohort_guarantee,
    local_guarantee,
    noise_multiplier,
)

MIXED = [(0.1, 1.0, 100), (0.05, 1.5, 200), (0.1, 2.0, 300)]
REFERENCES = [
    ([(1.0, 1.0, 1)], 4.377178, 4.728507, 4.387414),
    ([(256 / 60000, 1.1, 14062)], 2.381686, 2.596556, 2.391744),
    ([(0.1, 1.0, 10)], 2.854519, 3.441324, 2.864790),
    (MIXED, 8.814951, 9.717734, 8.825448),
]


@pytest.mark.parametrize(("history", "pld", "rdp", "prv"), REFERENCES)
def test_reference_values(history: list[tuple[float, float, int]], pld: float, rdp: float, prv: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns of its own division by zero
        for name, expected in (("pld", pld), ("rdp", rdp), ("prv", prv)):
            assert epsilon(history, 1e-5, name) == pytest.approx(expected, rel=1e-3)
    assert epsilon(history, 1e-5) == epsilon(history, 1e-5, "pld")


def exact_gaussian(sigma: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact delta of `steps` Gaussian mechanisms, solved for epsilon."""
    mu = math.sqrt(steps) / sigma

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta)

    return float(brentq(excess, 0, 200)) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("sigma", [0.7, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_without_sampling_it_is_the_exact_gaussian_curve(sigma: float, steps: int, delta: float) -> None:
    exact = exact_gaussian(sigma, steps, delta)
    found = epsilon([(1.0, sigma, steps)], delta)
    assert exact <= found + 1e-9
    assert found == pytest.approx(exact, rel=1e-3, abs=1e-3)


def test_composition_does_not_depend_on_how_steps_are_written_down() -> None:
    one = epsilon([(0.1, 1.0, 50)], 1e-5)
    assert epsilon([(0.1, 1.0, 10)] * 5, 1e-5) == pytest.approx(one, rel=1e-3)
    # By RDP five rounds cost 5.88, and not the 3.44 of one that an engine made anew each round reports.
    assert epsilon([(0.1, 1.0, 10)] * 5, 1e-5, "rdp") == pytest.approx(5.88, abs=0.005)
    assert epsilon(MIXED[::-1], 1e-5) == pytest.approx(epsilon(MIXED, 1e-5), rel=1e-6)


@settings(max_examples=5, deadline=None)
@given(st.floats(0.01, 0.5), st.floats(0.8, 3.0), st.integers(1, 40))
def test_more_of_anything_that_leaks_costs_more(rate: float, sigma: float, steps: int) -> None:
    here = epsilon([(rate, sigma, steps)], 1e-5)
    slack = 1e-3 * here + 1e-3  # the discretisation's own error
    assert epsilon([(rate, sigma, 2 * steps)], 1e-5) >= here - slack
    assert epsilon([(rate, sigma * 1.5, steps)], 1e-5) <= here + slack
    assert epsilon([(rate / 2, sigma, steps)], 1e-5) <= here + slack
    assert epsilon([(rate, sigma, steps)], 1e-6) >= here - slack
    assert epsilon([(rate, sigma, steps)], 1e-5, "rdp") >= here - slack


def test_edges() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([(0.1, 1.0, 0)], 1e-5) == epsilon([(0.0, 1.0, 9)], 1e-5) == 0
    assert epsilon([(0.1, 0.0, 1)], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("history", "delta", "accountant", "words"),
    [
        ([(1.1, 1, 1)], 1e-5, "pld", "sample_rate=1.1"),
        ([(-0.1, 1, 1)], 1e-5, "pld", "sample_rate=-0.1"),
        ([(0.1, -1, 1)], 1e-5, "pld", "noise_multiplier=-1"),
        ([(0.1, math.nan, 1)], 1e-5, "pld", "noise_multiplier=nan"),
        ([(0.1, 1, 1.5)], 1e-5, "pld", "steps=1.5"),
        ([(0.1, 1, 1)], 0, "pld", "delta=0"),
        ([(0.1, 1, 1)], 1e-5, "gdp", "underestimates"),
        ([(0.1, 1, 1)], 1e-5, "moments", "moments"),
    ],
)
def test_what_cannot_be_accounted_is_named(
    history: list[tuple[float, float, int]], delta: float, accountant: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        epsilon(history, delta, accountant)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps", "accountant", "spent"),
    [
        (3.0, 1e-5, 2048 / 60000, 1172, "pld", []),
        (1.0, 1e-5, 0.1, 60, "rdp", []),
        (2.0, 1e-5, 0.05, 40, "prv", [(0.1, 2.0, 10)]),
        (0.1, 1e-6, 0.02, 10, "pld", []),  # RDP's orders stop at 63, so it cannot say so little
        (8.0, 1e-5, 1.0, 20, "pld", [(0.1, 1.0, 10), (0.1, 2.0, 30)]),
        (15.0, 1e-5, 0.5, 5, "pld", []),
        (3.0, 1e-5, 0.1, 10, "pld", [(0.1, 1.0, 10)]),  # 2.85 of 3 are spent
    ],
)
def test_calibrated_noise_spends_the_target_and_no_more(
    target: float, delta: float, rate: float, steps: int, accountant: str, spent: list[tuple[float, float, int]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sigma = noise_multiplier(target, delta, rate, steps, accountant, spent)
        total = epsilon([*spent, (rate, sigma, steps)], delta, accountant)
    assert 0.995 * target <= total <= target


def test_what_is_spent_counts_in_calibration() -> None:
    alone = noise_multiplier(3.0, 1e-5, 0.1, 10)
    after = noise_multiplier(3.0, 1e-5, 0.1, 10, spent=[(0.1, 1.5, 10)])
    assert after > alone
    with refused("privacy.epsilon = 2", "2.85"):
        noise_multiplier(2.0, 1e-5, 0.1, 10, spent=[(0.1, 1.0, 10)])
    for wrong in ((0.0, 0.1, 10), (-1.0, 0.1, 10), (1.0, 0.0, 10), (1.0, 0.1, 0)):
        with pytest.raises(ValueError, match="Expected"):
            noise_multiplier(wrong[0], 1e-5, *wrong[1:])


def test_client_level_reference_values() -> None:
    poisson = client_guarantee([(0.1, 1.0, 100)], 1e-5)
    assert poisson.epsilon == pytest.approx(7.05, abs=0.005)  # FIELD: 1,000 clients, 100 a round, Poisson
    fixed = fixed_cohort_guarantee([(1000, 100, 1.0, 100)], 1e-5)
    assert fixed.epsilon == pytest.approx(83.9, abs=0.05)  # the same with a cohort of exactly 100
    assert "replace one" in fixed.adjacency
    assert fixed.accountant == "rdp"
    assert "add or remove" in poisson.adjacency


def test_a_fixed_cohort_of_everyone_is_a_gaussian_of_half_the_noise() -> None:
    found = fixed_cohort_guarantee([(50, 50, 4.0, 9)], 1e-5).epsilon
    exact = exact_gaussian(2.0, 9, 1e-5)  # replacing one moves the sum by 2 C
    assert exact <= found <= 1.15 * exact  # RDP's looseness
    assert fixed_cohort_guarantee([], 1e-5).epsilon == fixed_cohort_guarantee([(9, 0, 1.0, 5)], 1e-5).epsilon == 0
    assert fixed_cohort_guarantee([(9, 3, 0.0, 5)], 1e-5).epsilon == math.inf
    with pytest.raises(ValueError, match="cohort=10 <= clients=9"):
        fixed_cohort_guarantee([(9, 10, 1.0, 5)], 1e-5)


def test_local_noise_composes_over_rounds() -> None:
    # Flower's LocalDpMod takes sigma = S sqrt(2 ln(1.25 / delta)) / epsilon for a sensitivity S = 2 C, and never
    # composes: its "epsilon 8" is 117 after 50 rounds (FIELD).
    z = 2 * math.sqrt(2 * math.log(1.25e5)) / 8
    assert local_guarantee([(z, 50)], 1e-5).epsilon == pytest.approx(117, abs=0.5)
    assert local_guarantee([(z, 20), (z, 30)], 1e-5) == local_guarantee([(z, 50)], 1e-5)
    assert local_guarantee([(2.0, 1)], 1e-5).epsilon == pytest.approx(4.377178, rel=1e-3)


def test_a_shown_epsilon_says_all_that_it_depends_on() -> None:
    shown = str(example_guarantee([(0.1, 1.0, 10)], 1e-5))
    assert shown == (
        "epsilon = 2.855 at delta = 1e-05 (unit: one example of a client; adjacency: add or remove one; accountant: pld)"
    )
