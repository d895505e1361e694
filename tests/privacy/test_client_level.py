"""Client-level DP: the clip, the sum with a constant denominator, the adaptive clip's sign, median and noise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers.refusals import refused
from helpers.rounding import close
from meadow.arrays.named import Arrays
from meadow.privacy.accounting import epsilon
from meadow.privacy.client_level import (
    AdaptiveClip,
    clip,
    combine,
    next_clip,
    noised,
    norm,
    refuse_small_cohort,
    update_noise,
)
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator

FLOATS = arrays(np.float32, (3, 2), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def sent() -> Arrays:
    return {"a": np.zeros((3, 2), np.float32), "b": np.zeros(4, np.float32)}


def moved(a: float, b: float) -> Arrays:
    return {"a": np.full((3, 2), a, np.float32), "b": np.full(4, b, np.float32)}


def test_the_norm_is_over_all_arrays_together() -> None:
    assert norm(moved(1.0, 2.0)) == pytest.approx(math.sqrt(6 + 16), rel=1e-15)
    assert norm(sent()) == norm({}) == norm({"empty": np.zeros((0, 3))}) == 0
    assert norm({"a": np.array([3e200, 4e200])}) == pytest.approx(5e200, rel=1e-15)  # its square is infinite
    assert norm({"a": np.array([3e-200, 4e-200])}) == pytest.approx(5e-200, rel=1e-15)  # its square is zero
    # Of float32, squares summed in float32 lose one in 10^4 here.
    many = np.full(10**6, 0.1, np.float32)
    assert norm({"a": many}) == pytest.approx(math.sqrt(10**6) * float(np.float32(0.1)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(FLOATS, FLOATS, st.floats(1e-6, 1e6))
def test_no_update_is_longer_than_the_clip(before: np.ndarray, after: np.ndarray, bound: float) -> None:
    clipped = clip({"a": before}, {"a": after}, bound)
    exact = after.astype(np.float64) - before.astype(np.float64)
    assert norm(clipped.update) <= bound
    if norm({"a": exact}) <= bound:
        assert clipped.within == 1
        assert np.array_equal(clipped.update["a"], exact)
    else:
        assert clipped.within == 0
        assert norm(clipped.update) == pytest.approx(bound, rel=1e-9)
        np.testing.assert_allclose(clipped.update["a"], exact * (bound / norm({"a": exact})), rtol=1e-9)


def test_zero_stays_zero_and_what_is_not_finite_becomes_zero() -> None:
    """FIELD: NaN passes Flower's clip, and a zero update divides by zero."""
    assert clip(sent(), sent(), 1.0).within == 1
    assert norm(clip(sent(), sent(), 1.0).update) == 0
    for bad in (math.nan, math.inf, -math.inf):
        wrong = moved(0.1, 0.1)
        wrong["b"][2] = bad
        clipped = clip(sent(), wrong, 1.0)
        assert clipped.within == 0
        assert norm(clipped.update) == 0
    missing = clip(sent(), {"a": np.ones((3, 2), np.float32)}, 100.0)
    assert norm(missing.update) == pytest.approx(math.sqrt(6))
    for bound in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="clip="):
            clip(sent(), sent(), bound)
    with pytest.raises(ValueError, match="not \\(3,\\)"):
        clip(sent(), {"b": np.zeros(3, np.float32)}, 1.0)
    with pytest.raises(ValueError, match="'c'"):
        clip(sent(), {"c": np.zeros(3, np.float32)}, 1.0)


def test_without_noise_it_is_the_sum_over_the_constant() -> None:
    """Two clients reply where five were expected: the sum is divided by five, and each client weighs the same."""
    updates = [clip(sent(), moved(1.0, 1.0), 1.0).update, clip(sent(), moved(0.0, 0.1), 1.0).update]
    found = combine(moved(1.0, 2.0), updates, 1.0, 0.0, 5.0, numpy_generator(0, "n"))
    # Clipped and added up in float64; the clients' moves and the result are float32.
    close(found["a"], np.full(found["a"].shape, 1.0 + 1 / math.sqrt(10) / 5), 4)
    close(found["b"], np.full(found["b"].shape, 2.0 + (1 / math.sqrt(10) + 0.1) / 5), 4)
    assert {name: a.dtype for name, a in found.items()} == {name: a.dtype for name, a in sent().items()}


def test_one_client_more_moves_the_sum_by_the_clip_at_most() -> None:
    rng = numpy_generator(0, "u")
    updates = [clip(sent(), {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}, 0.7).update for _ in range(9)]
    for left_out in range(9):
        everyone, others = (
            combine(sent(), part, 0.7, 0.0, 1.0, rng)
            for part in (updates, updates[:left_out] + updates[left_out + 1 :])
        )
        assert norm({n: everyone[n].astype(float) - others[n] for n in everyone}) <= 0.7 * (1 + 1e-6)


def test_an_unclipped_update_is_not_added() -> None:
    with pytest.raises(ValueError, match=r"norm <= clip=1\.0"):
        combine(sent(), [{"a": np.ones((3, 2))}], 1.0, 1.0, 5.0, numpy_generator(0, "n"))
    with pytest.raises(ValueError, match=r"norm <= clip=1\.0, not nan"):
        combine(sent(), [{"a": np.full((3, 2), math.nan)}], 1.0, 1.0, 5.0, numpy_generator(0, "n"))
    rounded = {"a": np.full((3, 2), 1 / math.sqrt(6) * (1 + 1e-7))}  # longer by what float32 rounds
    found = combine({"a": np.zeros((3, 2))}, [rounded], 1.0, 0.0, 1.0, numpy_generator(0, "n"))
    assert norm(found) == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ValueError, match="denominator=0"):
        combine(sent(), [], 1.0, 1.0, 0, numpy_generator(0, "n"))


def test_the_noise_is_drawn_once_over_the_sum_and_for_an_empty_cohort_too() -> None:
    """Deviation z C / denominator, and not that for each client. 10^5 draws: within 4 of their own deviations."""
    start: Arrays = {"a": np.zeros(100_000)}
    for cohort in (0, 3):
        updates = [{"a": np.zeros(100_000)}] * cohort
        found = combine(start, updates, 0.5, 1.6, 4.0, numpy_generator(1, "n"))["a"].astype(np.float64)
        assert float(np.square(found).mean()) == pytest.approx((1.6 * 0.5 / 4) ** 2, rel=4 * math.sqrt(2 / 1e5))
    local = noised({"a": np.zeros(100_000)}, 0.5, 1.6, numpy_generator(1, "n"))["a"]
    assert float(np.square(local).mean()) == pytest.approx(0.8**2, rel=4 * math.sqrt(2 / 1e5))


def test_the_clip_moves_towards_the_quantile() -> None:
    """FIELD: Flower's has the sign inverted. All within: the clip is too large and falls by exp(-eta (1 - gamma))."""
    quiet, rng = AdaptiveClip(1.0, quantile=0.5, rate=0.2, count_noise=0.0), numpy_generator(0, "c")
    assert next_clip(1.0, [1] * 50, quiet, 50, rng) == pytest.approx(math.exp(-0.1))
    assert next_clip(1.0, [0] * 50, quiet, 50, rng) == pytest.approx(math.exp(0.1))
    assert next_clip(3.0, [0, 1] * 25, quiet, 50, rng) == pytest.approx(3.0)
    upper = AdaptiveClip(1.0, quantile=0.9, rate=0.2, count_noise=0.0)
    assert next_clip(1.0, [1] * 45 + [0] * 5, upper, 50, rng) == pytest.approx(1.0)


@pytest.mark.parametrize("first", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_the_quantile_of_a_known_distribution_is_found(first: float, quantile: float) -> None:
    """Norms are exp(Gaussian) with median 1 and deviation 0.5: the clip comes to rest at exp(0.5 Phi^-1(quantile)).

    At rest the logarithm is an autoregression with slope 1 - rate * density; what is drawn for (sampling of 100 norms and
    count noise 5) gives it a deviation below 0.04, so that the mean of 100 rounds is within 0.1.
    """
    plan = AdaptiveClip(first, quantile, 0.2, 5.0)
    rng, noise = numpy_generator(0, "norms"), numpy_generator(0, "noise")
    bound, seen = first, []
    for _ in range(250):
        norms = np.exp(0.5 * rng.normal(size=100))
        bound = next_clip(bound, [int(n <= bound) for n in norms], plan, 100, noise)
        seen.append(math.log(bound))
    expected = {0.5: 0.0, 0.8: 0.5 * 0.8416212}[quantile]
    assert float(np.mean(seen[-100:])) == pytest.approx(expected, abs=0.1)


def test_the_count_is_paid_for_by_more_noise_on_the_updates() -> None:
    """Theorem 1: a Gaussian of z_delta beside one of 2 sigma_b (a bit moves the count by 1/2) is one of z."""
    z, count_noise = 1.0, 2.0
    z_delta = update_noise(z, count_noise)
    assert z_delta == pytest.approx((1 - 1 / 16) ** -0.5)
    both = epsilon([(1.0, z_delta, 9), (1.0, 2 * count_noise, 9)], 1e-5)
    assert both == pytest.approx(epsilon([(1.0, z, 9)], 1e-5), rel=1e-3)
    assert epsilon([(1.0, z, 9), (1.0, 2 * count_noise, 9)], 1e-5) > 1.02 * both  # what not inflating would cost
    assert update_noise(0.0, 5.0) == 0
    assert update_noise(1.0, 1e9) == pytest.approx(1.0)
    for count_noise in (0.0, 0.3, 0.5):
        with pytest.raises(UserError, match=r"write more than 0.5"):
            update_noise(1.0, count_noise)


def test_a_cohort_too_small_for_the_counts_noise_is_refused() -> None:
    plan = AdaptiveClip(1.0, count_noise=10.0)
    refuse_small_cohort(50, plan)
    with refused(49, 50):
        refuse_small_cohort(49, plan)
    with refused("clip_count_noise"):
        refuse_small_cohort(0, plan)
    for wrong in ({"first": 0.0}, {"quantile": 1.2}, {"rate": 0.0}, {"count_noise": -1.0}):
        with pytest.raises(ValueError, match="Expected"):
            AdaptiveClip(**{"first": 1.0, **wrong})
