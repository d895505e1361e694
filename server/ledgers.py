"""Example-level and local DP at the server: what it remembers of its clients' ledgers, enough to notice that one was lost,
cut or put back to an old copy.

The ledgers are the clients' own, and so is the decision whether to train. The server only gives back what it was told.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meadow.server.protection import Protection
from meadow.strategies.wire.packing import Answer, Values

from meadow.config.schema import Experiment
from meadow.runtime.errors import RunStopped


class Ledgers(Protection):
    """Example-level and local DP: each client has a ledger of its own, and the server what it last said of it."""

    lasting, movable = True, False

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.accounts: dict[int, Account] = {}
        self._pooled = experiment.run.placement == "pooled"

    @property
    def left(self) -> Collection[int]:
        return {client for client, account in self.accounts.items() if account.exhausted}

    def reminder(self, client: int) -> Values | None:
        account = self.accounts.get(client)
        return None if account is None else {"entries": account.entries, "sha256": account.sha256}

    def read(self, replies: Iterable[Answer], round_: int) -> list[int]:
        left = []
        for reply in replies:
            client = reply.client
            if (account := account_of(reply, self.accounts.get(client))) is not None:
                self.accounts[client] = account
                left += [client] if account.exhausted else []
        owners = 1 if self._pooled else self.experiment.participants
        require_budget(self.experiment, self.accounts, owners, round_)
        return sorted(left)

    def quorum(self, asked: int, left: int) -> int:
        return min(self.experiment.cohort.quorum, asked - left)

    def epsilon(self) -> dict[str, float | None]:
        return over_accounts(self.accounts)

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
    """What a client last said: releases in its ledger, the newest one's hash, their epsilon, whether its noise comes from
    a secret of its own, and why it has left."""

    entries: int
    sha256: str
    epsilon: float
    secret: bool
    exhausted: str = ""


def account_of(reply: Answer, before: Account | None) -> Account | None:
    """What a reply says of the ledger; None if it says nothing, or something that cannot be.

    A ledger never gets shorter: a client that says so is not believed, and is reminded of what it said before.
    """
    said = reply.said("ledger")
    entries, sha256, epsilon = said.get("entries"), said.get("sha256"), said.get("epsilon")
    if not isinstance(entries, int) or not isinstance(sha256, str) or not isinstance(epsilon, float):
        return None
    if entries < (before.entries if before else 0) or not math.isfinite(epsilon) or epsilon < 0:
        return None
    return Account(entries, sha256, epsilon, bool(said.get("secret")), str(said.get("exhausted", "")))


def require_budget(experiment: Experiment, accounts: Mapping[int, Account], owners: int, round_: int) -> None:
    """Raise RunStopped if a budget is spent and the run is to stop then, or if none of so many `owners` has any left."""
    gone = {client: account.exhausted for client, account in sorted(accounts.items()) if account.exhausted}
    if not gone:
        return
    first = next(iter(gone.values()))
    if experiment.privacy.on_exhausted == "stop":
        raise RunStopped(f"round {round_}: the privacy budget of {len(gone)} clients is spent: {first}")
    if len(gone) == owners:
        raise RunStopped(f"round {round_}: the privacy budget of every client is spent: {first}")


def over_accounts(accounts: Mapping[int, Account]) -> dict[str, float | None]:
    """The largest and the median epsilon of the clients that have released anything; None if nobody has."""
    spent = [account.epsilon for account in accounts.values()]
    return {"max": max(spent, default=None), "median": statistics.median(spent) if spent else None}
