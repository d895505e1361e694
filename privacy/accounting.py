"""Epsilon of everything a client has released: the composition of Poisson-sampled Gaussian mechanisms.

PLD (privacy loss distributions, Koskela et al. 2020; dp-accounting) is the default, because it is the tightest. RDP
(Mironov 2017, Mironov et al. 2019) and PRV (Gopi et al. 2021) are Opacus's, for comparison with published figures. The
GDP approximation (Bu et al. 2020) is refused: it is an asymptotic statement, and gives 1.62 where the truth is 2.85.
"""

import math
from collections.abc import Sequence

History = Sequence[tuple[float, float, int]]
"""(sample rate q, noise multiplier sigma, steps) of each part, in any order; parts may differ."""

ACCOUNTANTS = ("pld", "rdp", "prv")

_DISCRETISATION = 1e-4


def epsilon(history: History, delta: float, accountant: str = "pld") -> float:
    """The smallest epsilon for which the history is (epsilon, delta)-differentially private, by the given accountant.

    Adjacency: add or remove one record. Each step takes every record with probability q on its own (Poisson sampling),
    adds up contributions of norm at most C, and adds Gaussian noise of standard deviation sigma C; q = 1 takes all.
    Shuffled batches are something else, and are not accounted by this. An empty history, or one without steps, costs 0;
    sigma = 0 costs infinity. Do not call it once a round and add up: give it the whole history, which composes tighter.

    Raises ValueError that names the value if q is not in [0, 1], sigma is negative, steps is not a whole number of at
    least 0, delta is not in (0, 1), or the accountant is unknown.
    """
    parts = _checked(history, delta, accountant)
    if not parts:
        return 0.0
    if any(sigma == 0 for _, sigma, _ in parts):
        return math.inf
    return _pld(parts, delta) if accountant == "pld" else _opacus(parts, delta, accountant)


def _checked(history: History, delta: float, accountant: str) -> list[tuple[float, float, int]]:
    if accountant == "gdp":
        raise ValueError(
            'Expected accountant="pld", "rdp" or "prv", not "gdp": the GDP approximation underestimates epsilon'
        )
    if accountant not in ACCOUNTANTS:
        raise ValueError(f'Expected accountant="pld", "rdp" or "prv", not {accountant!r}.')
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta={delta} < 1.")
    for rate, sigma, steps in history:
        if not 0 <= rate <= 1:
            raise ValueError(f"Expected 0 <= sample_rate={rate} <= 1.")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"Expected 0 <= noise_multiplier={sigma} < infinity.")
        if steps < 0 or int(steps) != steps:
            raise ValueError(f"Expected a whole number steps={steps} >= 0.")
    return [(float(q), float(s), int(n)) for q, s, n in history if q > 0 and n > 0]


def _pld(parts: Sequence[tuple[float, float, int]], delta: float) -> float:
    import dp_accounting  # both libraries take seconds to import, so only who accounts pays
    from dp_accounting.pld import PLDAccountant

    account = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=_DISCRETISATION
    )
    for rate, sigma, steps in parts:
        noise = dp_accounting.GaussianDpEvent(sigma)
        account.compose(dp_accounting.PoissonSampledDpEvent(rate, noise) if rate < 1 else noise, steps)
    return float(account.get_epsilon(delta))


def _opacus(parts: Sequence[tuple[float, float, int]], delta: float, accountant: str) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    account = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    account.history = [(sigma, rate, steps) for rate, sigma, steps in parts]
    return float(account.get_epsilon(delta))
