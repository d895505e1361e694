"""The statistics of an audit: test the claims about a mechanism with canaries, whose gradients are known.

A canary is a record whose clipped gradient has the length of the clip along a coordinate of its own. Its score is what a
release shows along that coordinate, in units of the clip: its contribution (0 or 1 in each step) plus noise of the claimed
deviation. A fair coin decides whether a canary is included. A p-value below `REJECT` rejects the claim.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

REJECT = 1e-4
"""Claims with a smaller p-value are rejected; so of 500 audits of about twenty tests, one rejects a true claim."""
CONFIDENCE = 0.95
"""Confidence level of the lower bounds on epsilon."""


@dataclass(frozen=True)
class Check:
    """A measurement: the claim, the measured value, the p-value (None if it is not a test), and the verdict."""

    name: str
    claimed: str
    measured: str
    p: float | None
    holds: bool


def noise_check(name: str, values: Floats, claimed: float) -> Check:
    """Test whether noise, in units of the clip, has at least the claimed deviation (one-sided chi-squared test)."""
    found = math.sqrt(float(np.mean(np.square(values)))) if values.size else 0.0
    p = float(stats.chi2.cdf(values.size * (found / claimed) ** 2, values.size)) if values.size else 0.0
    return Check(name, f"{claimed:.4g}", f"{found:.4g} ({values.size:,} numbers)", p, p >= REJECT)


def normality_check(name: str, values: Floats) -> Check:
    """Test whether standardised noise is normal (Kolmogorov-Smirnov, of at most 10^5 numbers)."""
    found = stats.kstest(values[:100_000], "norm")
    return Check(name, "normal", f"distance {found.statistic:.2g}", float(found.pvalue), bool(found.pvalue >= REJECT))


def independence_check(name: str, first: Floats, second: Floats) -> Check:
    """Test whether two draws of noise are uncorrelated (two-sided, Fisher's transform of Pearson's r)."""
    r = float(np.corrcoef(first, second)[0, 1])
    z = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r))) * math.sqrt(max(1, len(first) - 3))
    p = 2 * float(stats.norm.sf(abs(z)))
    return Check(name, "0", f"correlation {r:.3g}", p, p >= REJECT)


def sampling_checks(hits: npt.NDArray[np.bool_], rate: float) -> list[Check]:
    """Test whether each record is in each step independently with the claimed probability; hits: (steps, records).

    Three tests: the number of hits is not above the rate; batch sizes, and the counts of how often a record is drawn, vary
    as in Poisson samples. (Shuffled epochs draw each record once, and neither varies.)
    """
    steps, records = hits.shape
    total, trials = int(hits.sum()), hits.size
    p = float(stats.binom.sf(total - 1, trials, rate))
    checks = [Check("sampling rate", f"{rate:.4g}", f"{total / trials:.4g} ({trials:,} draws)", p, p >= REJECT)]
    if rate == 1:
        return checks
    for name, counts, n in (
        ("variance of batch sizes", hits.sum(1), records),
        ("variance of a record's times", hits.sum(0), steps),
    ):
        variance = n * rate * (1 - rate)
        ratio = float(np.mean(np.square(counts - n * rate))) / variance
        # Var of a squared deviation: the fourth central moment of the binomial less the variance squared.
        fourth = variance * (1 + 3 * (n - 2) * rate * (1 - rate))
        z = (ratio - 1) / math.sqrt((fourth - variance**2) / variance**2 / len(counts))
        p = 2 * float(stats.norm.sf(abs(z)))
        checks.append(Check(name, "1 (Poisson)", f"{ratio:.4g} of it", p, p >= REJECT))
    return checks


def canary_checks(scores: Floats, included: npt.NDArray[np.bool_], rate: float, noise: float) -> list[Check]:
    """Test scores (steps, canaries): the noise by excluded canaries, rate and variance by included ones."""
    inside, outside = scores[:, included], scores[:, ~included]
    checks = [noise_check("noise multiplier, by canaries out", outside.ravel(), noise)]
    mean = float(inside.mean())
    p = float(stats.norm.sf((mean - rate) / math.sqrt((noise**2 + rate * (1 - rate)) / inside.size)))
    checks.append(Check("mean of canaries in", f"{rate:.4g}", f"{mean:.4g}", p, p >= REJECT))
    expected = noise**2 + rate * (1 - rate)
    centred = inside - rate
    ratio = float(np.mean(np.square(centred))) / expected
    p = float(stats.norm.cdf((ratio - 1) / math.sqrt(float(np.var(np.square(centred))) / expected**2 / inside.size)))
    checks.append(Check("variance of canaries in", f"{expected:.4g}", f"{ratio * expected:.4g}", p, p >= REJECT))
    return checks


def bound_checks(scores: Floats, included: npt.NDArray[np.bool_], claimed: float, delta: float) -> list[Check]:
    """Lower bounds on epsilon at 95% from guesses of who was included, by one score per canary, against the claim.

    Steinke, Nasr and Jagielski 2023, theorem 5.2: guesses for the thirds with the highest and the lowest scores. Clopper
    and Pearson: true and false positive rates at a threshold chosen by the other half of the canaries.
    """
    order = np.argsort(scores)
    third = len(scores) // 3
    correct = int(included[order[-third:]].sum() + (~included[order[:third]]).sum())
    steinke = one_run_bound(len(scores), 2 * third, correct, delta)
    half = len(scores) // 2
    threshold = max(
        np.quantile(scores[:half], np.linspace(0.05, 0.95, 19)),
        key=lambda t: _pearson(scores[:half], included[:half], t, delta),
    )
    pearson = _pearson(scores[half:], included[half:], float(threshold), delta)
    return [
        Check(f"epsilon is at least ({how})", f"{claimed:.4g}", f"{found:.4g}", None, found <= claimed)
        for how, found in (("Steinke 2023", steinke), ("Clopper-Pearson", pearson))
    ]


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float) -> float:
    """The largest epsilon refuted at 95% by this many correct guesses (Steinke et al. 2023, theorem 5.2, appendix D)."""
    low, high = 0.0, 30.0
    if _one_run_p(canaries, guesses, correct, 0.0, delta) > 1 - CONFIDENCE:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = _one_run_p(canaries, guesses, correct, middle, delta) <= 1 - CONFIDENCE
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _one_run_p(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    right = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(correct - 1, guesses, right))
    tails = np.cumsum(stats.binom.pmf(correct - np.arange(1, correct + 1), guesses, right))
    alpha = float(np.max(tails / np.arange(1, correct + 1))) if correct else 0.0
    return min(1.0, beta + alpha * delta * 2 * canaries)


def _pearson(scores: Floats, included: npt.NDArray[np.bool_], threshold: float, delta: float) -> float:
    """The larger of log((TPR - delta) / FPR) and its mirror image, by bounds that hold jointly at the confidence level."""

    def bounds(hits: int, n: int) -> tuple[float, float]:
        if not n:
            return 0.0, 1.0
        found = stats.binomtest(hits, n).proportion_ci(1 - (1 - CONFIDENCE) / 2, method="exact")
        return float(found.low), float(found.high)

    guessed = scores > threshold
    n_in, n_out = int(included.sum()), int((~included).sum())
    positive, false = bounds(int((guessed & included).sum()), n_in), bounds(int((guessed & ~included).sum()), n_out)
    pairs = ((positive[0], false[1]), (1 - false[1], 1 - positive[0]))
    return max(0.0, *(math.log(max(a - delta, 1e-300) / b) for a, b in pairs if b > 0))
