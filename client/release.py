"""A client's private release: check its budget, charge its ledger, and noise its update.

The client does not trust the server: its own ledger decides whether it trains, and with which noise.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meadow.arrays.named import Arrays, arrays_sha256
from meadow.config.cohort import participations
from meadow.config.load import to_flat
from meadow.config.schema import Experiment
from meadow.privacy import plan
from meadow.privacy.accounting import epsilon
from meadow.privacy.client_level import clip, noised
from meadow.privacy.dpsgd.step import Permit
from meadow.privacy.ledger import (
    Budget,
    BudgetSpent,
    Charged,
    Ledger,
    Mark,
    Release,
    noise_seed,
    secret,
    simulated_secret,
)
from meadow.privacy.noise import Stream
from meadow.runtime.errors import UserError
from meadow.runtime.identity import code_sha256, versions
from meadow.strategies.wire.packing import Values

MEASUREMENT = {"run.name", "run.listeners", "evaluate.validation"} | {
    f"run.{name}" for name in ("stop_metric", "patience", "min_delta", "target", "min_rounds", "keep")
}
"""Settings that change no release: they say what is measured and shown, and when a run ends."""


class Exhausted(Exception):
    """The next release would exceed the budget. `state`: what the client reports to the server about its ledger."""

    def __init__(self, reason: str, state: Values) -> None:
        super().__init__(reason)
        self.state = state


@dataclass(frozen=True)
class Ledgers:
    """Opens the ledgers and secrets of a node's clients. `simulated`: secrets derive from the seed and protect nothing."""

    experiment: Experiment
    root: Path
    data_sha256: str
    split_sha256: str
    simulated: bool

    def ledger(self, client: int) -> Ledger:
        """The ledger of this client number and this data set, over all runs below `root`."""
        owner = "pool" if self.experiment.run.placement == "pooled" else "clients"
        return Ledger(self.root / "ledgers" / owner, client, self.data_sha256)

    def secret(self, client: int) -> bytes:
        """The 32 secret bytes that the client's noise derives from; in a simulation from the seed, so that runs repeat."""
        if self.simulated:
            return simulated_secret(self.experiment.run.seed, client)
        return secret(self.root / "ledgers")


@dataclass(frozen=True)
class PrivateRelease:
    """A charged release, which may leave. noise_multiplier: what it was charged with (unit = "local": z, in units of the
    clip). permit: trains it if unit = "example"."""

    charged: Charged
    state: Values
    noise_seed: int
    noise_multiplier: float
    permit: Permit | None = None


def charge(
    ledgers: Ledgers, known: Values | None, round_: int, client: int, start: Mapping[str, Any], work: float = 1.0
) -> PrivateRelease:
    """Charge the client's next release. On return its entry is on disk.

    `known`: the ledger's state as the server last heard it. `start`: all arrays that training starts from, by name.
    `work`: the share of its steps that the client takes. Another share is another release: the same noise on two updates
    would reveal their difference. Raises LedgerFault if the ledger was changed or lost, and Exhausted if the budget does
    not allow the release; nothing is charged then.
    """
    experiment, privacy = ledgers.experiment, ledgers.experiment.privacy
    ledger, mark, run = ledgers.ledger(client), _mark(known), _run(ledgers)
    unit = "example" if privacy.unit == "example" else "local"
    clients = 1 if experiment.run.placement == "pooled" else experiment.partition.clients
    budget = plan.budgets(experiment, clients)[client]
    rounds, mechanism = participations(experiment)[client], None
    try:
        spent = ledger.history(unit, mark, before=run)
        if unit == "example":
            mechanism = plan.dpsgd(experiment, rounds, budget, spent)
            noise = mechanism.noise_multiplier
            parts = ((mechanism.sample_rate, noise, mechanism.steps),)
        else:
            noise = plan.local_noise(experiment, rounds, budget, spent)
            parts = ((1.0, noise / 2, 1),)
        facts = f"{ledgers.split_sha256} {client} {work!r} {arrays_sha256(start)}"
        release = Release(run, round_, unit, parts, hashlib.sha256(facts.encode()).hexdigest())
        charged = ledger.charge(release, Budget(budget, privacy.delta, privacy.accountant), mark)
    except (UserError, BudgetSpent) as reason:
        total = epsilon(ledger.history(unit), privacy.delta, privacy.accountant)
        state = _state(ledgers, ledger.mark(), total)
        raise Exhausted(f"client {client}: {reason}", state) from None
    own = ledgers.secret(client)
    seed = noise_seed(own, charged.sha256)
    permit = None
    if mechanism is not None:
        sampling = Stream(noise_seed(own, charged.sha256, "sampling"))
        permit = Permit(mechanism, sampling, Stream(seed), privacy.grad_sample)
    return PrivateRelease(charged, _state(ledgers, charged.mark, charged.epsilon), seed, noise, permit)


def noised_update(experiment: Experiment, allowed: PrivateRelease, received: Arrays, trained: Arrays) -> Arrays:
    """The arrays that leave under local DP: those received plus the clipped and noised update, dtypes as received.

    `received` and `trained`: the arrays that are shared and learn, by name.
    """
    bound = experiment.privacy.clip
    generator = np.random.Generator(np.random.Philox(allowed.noise_seed))
    update = noised(clip(received, trained, bound).update, bound, allowed.noise_multiplier, generator)
    return {name: (before.astype(np.float64) + update[name]).astype(before.dtype) for name, before in received.items()}


def _mark(known: Values | None) -> Mark | None:
    """The ledger's mark as the server last heard it."""
    return Mark(int(known["entries"]), str(known["sha256"])) if known else None


def _state(ledgers: Ledgers, mark: Mark, spent: float) -> Values:
    """What the client reports about its ledger, all public: number of releases, newest entry's hash, epsilon spent."""
    return {"entries": mark.entries, "sha256": mark.sha256, "epsilon": spent, "secret": not ledgers.simulated}


def _run(ledgers: Ledgers) -> str:
    """A hash of every setting that affects the release. With a real secret also of code and versions: the same noise on the
    results of two computations would reveal their difference."""
    settings: dict[str, Any] = {
        key: value
        for key, value in to_flat(ledgers.experiment).items()
        if key not in MEASUREMENT
        and not (key == "strategy.stages" and not value)  # keeps the hashes of ledgers older than this setting
        and not (ledgers.simulated and key.startswith("engine."))
    }
    if not ledgers.simulated:
        settings |= {"code": code_sha256()} | versions()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
