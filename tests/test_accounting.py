"""Accounting: reference values, the exact Gaussian curve, composition, and invariants over many settings."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from privacy.accounting import epsilon

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
