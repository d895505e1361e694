"""The server's side of privacy: what each kind of protection does in a round and reports at the end.

Clients apply example-level and local DP themselves: they own their ledgers and decide whether to train. The server only
reminds each client of its last report (`Ledgers`), so that the client notices a ledger that was lost, truncated or
replaced by an old copy. The server applies client-level DP (`meadow.server.client_level`).
"""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meadow.config.schema import Experiment
from meadow.privacy import plan
from meadow.privacy.releases import releases
from meadow.runtime.errors import RunStopped
from meadow.strategies import algorithm
from meadow.strategies.stages import Stage
from meadow.strategies.wire.packing import Answer, Values


class Protection:
    """The server's side of one run's privacy. This base class protects nothing."""

    sync_each_round = False
    """Whether each round must be on disk before anything more is sent."""
    movable = True
    """Whether a client may train on any node that has its data."""
    cohort_secret: int | None = None
    """Replaces the seed in the draw of cohorts, where nobody may predict them."""
    stages: Sequence[Stage] = ()
    """Its stages of updates that only the server has."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def begin(self, simulated: bool, folder: Path | None) -> None:
        """Prepare for the first round. `simulated`: whether all nodes are. `folder`: the run folder; None: keep nothing."""

    def require(self, round_: int) -> None:
        """Raise RunStopped if the budget does not allow the round."""

    @property
    def exhausted(self) -> Collection[int]:
        """The clients whose budget is spent."""
        return ()

    def reminder(self, client: int) -> Values | None:
        """A client's last report of its ledger, for the client to compare."""
        return None

    def read(self, replies: Iterable[Answer], round_: int) -> list[int]:
        """Read the ledger reports in the replies; return the clients that withdraw in this round, ascending.

        Raises RunStopped if the run must stop at a spent budget, or if no client remains.
        """
        return []

    def quorum(self, asked: int, withdrawn: int) -> int:
        """The number of valid replies that a round needs; `withdrawn` of the `asked` clients withdrew in it."""
        return self.experiment.cohort.quorum

    def epsilon(self) -> dict[str, float | None] | None:
        """The largest and the median epsilon over clients (each None if nothing was released); None without a claim."""
        return None

    def epsilons(self) -> dict[int, float]:
        """The epsilon of each client that has released anything."""
        return {}

    def state(self) -> dict[str, Any]:
        """The state to keep in a checkpoint, for JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""

    def summary(self, stages: Iterable[Stage]) -> dict[str, Any]:
        """The summary's "privacy": unit, delta, accountant, epsilon and releases, also those of the run's `stages`."""
        nothing, left = {"max": None, "median": None}, self._releases(stages)
        return {"unit": "none", "delta": None, "accountant": None, "epsilon": nothing, "releases": left}

    def _claim(self, stages: Iterable[Stage], secret: bool, exhausted: int) -> dict[str, Any]:
        """The summary with a privacy claim. `secret`: whether the noise came from secrets."""
        privacy, spent = self.experiment.privacy, self.epsilon() or {}
        claim = plan.claim(self.experiment, spent["max"] or 0.0)
        return {
            "unit": privacy.unit,
            "delta": claim.delta,
            "accountant": claim.accountant,
            "adjacency": claim.adjacency,
            "epsilon": spent,
            "statement": str(claim),
            "budget": privacy.epsilon or None,
            "exhausted": exhausted,
            "noise": "from secrets that are in no experiment file"
            if secret
            else "from the experiment's seed, so that runs repeat: not secret, so no protection from anyone with the file",
            "releases": self._releases(stages),
        }

    def _releases(self, stages: Iterable[Stage]) -> list[dict[str, str]]:
        staged = [quantity for stage in stages for quantity in stage.releases(self.experiment)]
        sends = algorithm(self.experiment.strategy.name).sends.values()
        return [quantity.as_json() for quantity in [*releases(self.experiment, sends), *staged]]


class Ledgers(Protection):
    """Example-level and local DP: each client has its own ledger; the server keeps the client's last report of it."""

    sync_each_round, movable = True, False

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.accounts: dict[int, Account] = {}
        self._pooled = experiment.run.placement == "pooled"

    @property
    def exhausted(self) -> Collection[int]:
        return {client for client, account in self.accounts.items() if account.exhausted}

    def reminder(self, client: int) -> Values | None:
        account = self.accounts.get(client)
        return None if account is None else {"entries": account.entries, "sha256": account.sha256}

    def read(self, replies: Iterable[Answer], round_: int) -> list[int]:
        withdrawn = []
        for reply in replies:
            client = reply.client
            if (account := account_of(reply, self.accounts.get(client))) is not None:
                self.accounts[client] = account
                withdrawn += [client] if account.exhausted else []
        owners = 1 if self._pooled else self.experiment.participants
        require_budget(self.experiment, self.accounts, owners, round_)
        return sorted(withdrawn)

    def quorum(self, asked: int, withdrawn: int) -> int:
        return min(self.experiment.cohort.quorum, asked - withdrawn)

    def epsilon(self) -> dict[str, float | None]:
        spent = [account.epsilon for account in self.accounts.values()]
        return {"max": max(spent, default=None), "median": statistics.median(spent) if spent else None}

    def epsilons(self) -> dict[int, float]:
        if self._pooled:
            everyone = range(self.experiment.partition.clients)
            return {client: account.epsilon for client in everyone for account in self.accounts.values()}
        return {client: account.epsilon for client, account in self.accounts.items()}

    def state(self) -> dict[str, Any]:
        return {"accounts": {str(client): asdict(account) for client, account in sorted(self.accounts.items())}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.accounts = {int(client): Account(**account) for client, account in state["accounts"].items()}

    def summary(self, stages: Iterable[Stage]) -> dict[str, Any]:
        accounts = self.accounts.values()
        secret = bool(accounts) and all(account.secret for account in accounts)
        return self._claim(stages, secret, sum(bool(account.exhausted) for account in accounts))


@dataclass(frozen=True)
class Account:
    """A client's last report of its ledger.

    entries: number of releases. sha256: hash of the newest one. epsilon: their cost. secret: whether the client's noise
    comes from its own secret. exhausted: why the client has withdrawn, or "".
    """

    entries: int
    sha256: str
    epsilon: float
    secret: bool
    exhausted: str = ""


def account_of(reply: Answer, before: Account | None) -> Account | None:
    """The account that a reply reports; None if it reports none or an impossible one.

    A ledger never gets shorter: the server ignores such a report and keeps reminding the client of its earlier one.
    """
    ledger = reply.section("ledger")
    entries, sha256, epsilon = ledger.get("entries"), ledger.get("sha256"), ledger.get("epsilon")
    if not isinstance(entries, int) or not isinstance(sha256, str) or not isinstance(epsilon, float):
        return None
    if entries < (before.entries if before else 0) or not math.isfinite(epsilon) or epsilon < 0:
        return None
    return Account(entries, sha256, epsilon, bool(ledger.get("secret")), str(ledger.get("exhausted", "")))


def require_budget(experiment: Experiment, accounts: Mapping[int, Account], owners: int, round_: int) -> None:
    """Raise RunStopped if the budgets of all `owners` are spent, or one is and privacy.on_exhausted = "stop"."""
    gone = {client: account.exhausted for client, account in sorted(accounts.items()) if account.exhausted}
    if not gone:
        return
    first = next(iter(gone.values()))
    if experiment.privacy.on_exhausted == "stop":
        raise RunStopped(f"round {round_}: the privacy budget of {len(gone)} clients is spent: {first}")
    if len(gone) == owners:
        raise RunStopped(f"round {round_}: the privacy budget of every client is spent: {first}")
