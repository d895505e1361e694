"""Example-level and local DP at the server: it remembers enough of each client's ledger for the client to notice that the
ledger was lost, truncated or replaced by an old copy.

Clients own their ledgers and decide whether to train. The server only reminds each client of its last report.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meadow.config.schema import Experiment
from meadow.runtime.errors import RunStopped
from meadow.server.protection import Protection
from meadow.strategies.wire.packing import Answer, Values


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

    def summary(self) -> dict[str, Any]:
        accounts = self.accounts.values()
        secret = bool(accounts) and all(account.secret for account in accounts)
        return self._claim(secret, sum(bool(account.exhausted) for account in accounts))


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
