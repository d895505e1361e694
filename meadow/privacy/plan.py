"""Turn the settings into mechanisms: each client's budget, the noise that it requires, and the cost of the whole run.

The noise is calibrated to the rounds in which a client takes part, which are known before the run, because cohorts depend
only on the seed. What a client spent in earlier runs counts.
"""

import csv
import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from meadow.config.cohort import participations
from meadow.config.schema import Experiment
from meadow.privacy.accounting import (
    Guarantee,
    History,
    client_guarantee,
    example_guarantee,
    fixed_cohort_guarantee,
    local_guarantee,
    noise_multiplier,
)
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.runtime.errors import UserError
from meadow.runtime.limits import read_file, user_path
from meadow.runtime.seeds import numpy_generator

LARGEST_BUDGETS = 64 * 2**20
"""Bytes of the file in `privacy.budgets`."""


def budgets(experiment: Experiment, clients: int) -> list[float]:
    """Each client's epsilon for the whole run, by `privacy.budgets`; infinity where there is no budget.

    Draws depend only on (run.seed, client). Raises UserError if the file is missing, lacks a client, or has a value that
    is not a positive number.
    """
    privacy = experiment.privacy
    kind, *words = privacy.budgets.split() or [""]
    if not kind:
        return [privacy.epsilon or math.inf] * clients
    if kind == "file":
        return _from_file(privacy.budgets, user_path(privacy.budgets.strip().removeprefix("file").strip()), clients)
    numbers = [float(word) for word in words]
    drawn = []
    for client in range(clients):
        generator = numpy_generator(experiment.run.seed, "budget", client)
        if kind == "uniform":
            drawn.append(float(generator.uniform(numbers[0], numbers[1])))
        else:
            drawn.append(numbers[int(generator.integers(len(numbers)))])
    return drawn


def steps_a_round(experiment: Experiment) -> int:
    """DP-SGD steps in a round, a public constant: `local.steps`, or those of `local.epochs` expected passes."""
    return experiment.local.steps or max(1, round(experiment.local.epochs / experiment.privacy.sample_rate))


def dpsgd(experiment: Experiment, rounds: int, budget: float, spent: History = ()) -> Mechanism:
    """A client's DP-SGD for this run (privacy.unit = "example").

    `rounds`: in how many it takes part. `budget`: its epsilon, infinity for none. `spent`: the history in its ledger. The
    noise is `privacy.noise_multiplier` if set, else calibrated to the budget. Raises UserError if the budget is spent, or
    neither is set.
    """
    privacy, steps = experiment.privacy, steps_a_round(experiment)
    every = steps * max(1, rounds)
    noise = privacy.noise_multiplier or _calibrated(experiment, privacy.sample_rate, every, budget, spent)
    denominator = privacy.denominator or float(experiment.local.batch_size)
    return Mechanism(privacy.sample_rate, noise, privacy.clip, denominator, steps)


def dpsgd_cost(experiment: Experiment, mechanism: Mechanism, rounds: int, spent: History = ()) -> Guarantee:
    """The guarantee of `rounds` rounds of the mechanism after `spent` to each example of the client."""
    history = [*spent, (mechanism.sample_rate, mechanism.noise_multiplier, mechanism.steps * rounds)]
    return example_guarantee(history, experiment.privacy.delta, experiment.privacy.accountant)


def local_noise(experiment: Experiment, rounds: int, budget: float, spent: History = ()) -> float:
    """A client's noise multiplier z for its own updates (privacy.unit = "local"); arguments and errors as `dpsgd`.

    Replacing all data of a client moves a clipped update by up to twice the clip, so z is twice the Gaussian's multiplier.
    """
    return experiment.privacy.noise_multiplier or 2 * _calibrated(experiment, 1.0, max(1, rounds), budget, spent)


def _calibrated(experiment: Experiment, rate: float, steps: int, budget: float, spent: History) -> float:
    """The Gaussian's noise multiplier for which the steps fit into the budget after `spent`."""
    privacy = experiment.privacy
    if math.isinf(budget):
        raise UserError(
            "privacy.noise_multiplier = 0 without a budget: write privacy.epsilon, or the noise multiplier itself"
        )
    return noise_multiplier(budget, privacy.delta, rate, steps, privacy.accountant, spent)


def local_cost(experiment: Experiment, z: float, rounds: int) -> Guarantee:
    """The guarantee of `rounds` noised updates to a client against the server."""
    return local_guarantee([(z, rounds)], experiment.privacy.delta, experiment.privacy.accountant)


def client_noise(experiment: Experiment) -> float:
    """The noise multiplier z of client-level DP: as set, or calibrated to privacy.epsilon over all rounds.

    Raises UserError if neither is set.
    """
    privacy, rounds = experiment.privacy, experiment.run.rounds
    if privacy.noise_multiplier:
        return privacy.noise_multiplier
    if not privacy.epsilon:
        raise UserError(
            f'privacy.budgets = "{privacy.budgets}" with privacy.unit = "client": one noise is added for all clients; '
            "write privacy.epsilon or privacy.noise_multiplier instead"
        )
    rate = _rate(experiment)
    if _poisson(experiment):
        return noise_multiplier(privacy.epsilon, privacy.delta, rate, rounds, privacy.accountant)
    low, high = 0.0, 1.0
    while client_cost(experiment, high, rounds).epsilon > privacy.epsilon:
        low, high = high, high * 2
        if high > 1e6:
            raise UserError(
                f"privacy.epsilon = {privacy.epsilon:g}: no noise is enough for cohorts of a fixed size: write a larger "
                'budget, or cohort.sampling = "poisson"'
            )
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        enough = client_cost(experiment, middle, rounds).epsilon <= privacy.epsilon
        low, high = (low, middle) if enough else (middle, high)
    return high


def client_cost(experiment: Experiment, z: float, rounds: int) -> Guarantee:
    """The guarantee of `rounds` rounds to each client, against those who see the models, but not against the server.

    Cohorts of a fixed size cost more than Poisson cohorts (`meadow.privacy.accounting.fixed_cohort_guarantee`), but a fixed
    cohort of everyone is a Poisson cohort with rate 1: with a constant denominator an absent client is one whose update is
    zero.
    """
    privacy, rate = experiment.privacy, _rate(experiment)
    if _poisson(experiment):
        return client_guarantee([(rate, z, rounds)], privacy.delta, privacy.accountant)
    population = experiment.participants
    return fixed_cohort_guarantee([(population, experiment.cohort_size, z, rounds)], privacy.delta)


def client_denominator(experiment: Experiment) -> float:
    """The divisor of the noisy sum of updates: `privacy.denominator`, or the expected cohort size."""
    return experiment.privacy.denominator or _rate(experiment) * experiment.participants


def forecasts(experiment: Experiment) -> list[tuple[float, float, bool]]:
    """Each client's (noise multiplier, epsilon after its last round, whether its budget ends before the run), with a new
    ledger; a pooled run has one entry. Raises UserError as a run would."""
    times, privacy = participations(experiment), experiment.privacy
    if privacy.unit == "client":
        noise = client_noise(experiment)
        fits = _rounds_that_fit(experiment.run.rounds, privacy.epsilon, lambda n: client_cost(experiment, noise, n))
        row = noise, client_cost(experiment, noise, fits).epsilon, fits < experiment.run.rounds
        return [row] * experiment.partition.clients
    found = []
    for rounds, budget in zip(times, budgets(experiment, len(times)), strict=True):
        if privacy.unit == "example":
            mechanism = dpsgd(experiment, rounds, budget)
            noise, cost = mechanism.noise_multiplier, functools.partial(dpsgd_cost, experiment, mechanism)
        else:
            noise = local_noise(experiment, rounds, budget)
            cost = functools.partial(local_cost, experiment, noise)
        fits = _rounds_that_fit(rounds, budget, cost)
        found.append((noise, cost(fits).epsilon, fits < rounds))
    return found


def _rounds_that_fit(rounds: int, budget: float, cost: Callable[[int], Guarantee]) -> int:
    """The most rounds, up to all, whose cost is within the budget (0 or infinity: no budget)."""
    if not budget or cost(rounds).epsilon <= budget:
        return rounds
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle).epsilon <= budget else (low, middle)
    return low


def claim(experiment: Experiment, spent: float) -> Guarantee:
    """The epsilon `spent` of this run with its unit, delta, adjacency and accountant."""
    privacy = experiment.privacy
    if privacy.unit == "example":
        empty = example_guarantee((), privacy.delta, privacy.accountant)
    elif privacy.unit == "local":
        empty = local_guarantee((), privacy.delta, privacy.accountant)
    else:
        empty = client_cost(experiment, 1.0, 0)
    return replace(empty, epsilon=spent)


def _poisson(experiment: Experiment) -> bool:
    return experiment.cohort.sampling == "poisson" or _rate(experiment) == 1


def _rate(experiment: Experiment) -> float:
    return experiment.cohort_size / experiment.participants


def _from_file(setting: str, path: Path, clients: int) -> list[float]:
    try:
        rows: Sequence[dict[str, str]] = list(
            csv.DictReader(io.StringIO(read_file(path, LARGEST_BUDGETS).decode("utf-8-sig"), ""))
        )
        found = {int(row["client"]): float(row["epsilon"]) for row in rows}
    except (OSError, csv.Error, KeyError, OverflowError, ValueError, TypeError) as error:
        raise UserError(
            f'privacy.budgets = "{setting}": {type(error).__name__}: {error}; give a CSV file with the columns client and '
            "epsilon, both numbers"
        ) from None
    for client in range(clients):
        if client not in found:
            raise UserError(
                f'privacy.budgets = "{setting}": there is no row for client {client}; add one for every client'
            )
        if not 0 < found[client] < math.inf:
            raise UserError(
                f'privacy.budgets = "{setting}": client {client} has epsilon = {found[client]}: give a positive number'
            )
    return [found[client] for client in range(clients)]
