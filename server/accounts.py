"""What the server remembers of its clients' ledgers: enough to notice that one was lost, cut or put back to an old copy.

The ledgers are the clients' own, and so is the decision whether to train. The server only gives back what it was told.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict
from meadow.strategies.wire.packing import Answer, Request

from meadow.config.schema import Experiment
from meadow.runtime.errors import RunStopped


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
    said = None if reply.content is None else reply.content.get("ledger")
    if not isinstance(said, ConfigRecord):
        return None
    entries, sha256, epsilon = said.get("entries"), said.get("sha256"), said.get("epsilon")
    if not isinstance(entries, int) or not isinstance(sha256, str) or not isinstance(epsilon, float):
        return None
    if entries < (before.entries if before else 0) or not math.isfinite(epsilon) or epsilon < 0:
        return None
    return Account(entries, sha256, epsilon, bool(said.get("secret")), str(said.get("exhausted", "")))


def remind(requests: Sequence[Request], accounts: Mapping[int, Account]) -> list[Request]:
    """The requests, each with what its client last said of its ledger, for it to compare."""
    reminded = []
    for request in requests:
        if (account := accounts.get(request.client)) is not None:
            record = ConfigRecord({"entries": account.entries, "sha256": account.sha256})
            request = Request(request.client, RecordDict({**request.content, "ledger": record}))
        reminded.append(request)
    return reminded


def require_budget(experiment: Experiment, accounts: Mapping[int, Account], round_: int) -> None:
    """Raise RunStopped if a budget is spent and the run is to stop then, or if nobody has any left."""
    gone = {client: account.exhausted for client, account in sorted(accounts.items()) if account.exhausted}
    if not gone:
        return
    first = next(iter(gone.values()))
    if experiment.privacy.on_exhausted == "stop":
        raise RunStopped(f"round {round_}: the privacy budget of {len(gone)} clients is spent: {first}")
    if len(gone) == (1 if experiment.run.placement == "pooled" else experiment.participants):
        raise RunStopped(f"round {round_}: the privacy budget of every client is spent: {first}")


def over_accounts(accounts: Mapping[int, Account]) -> dict[str, float | None]:
    """The largest and the median epsilon of the clients that have released anything; None if nobody has."""
    spent = [account.epsilon for account in accounts.values()]
    return {"max": max(spent, default=None), "median": statistics.median(spent) if spent else None}
