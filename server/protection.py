"""The server's side of privacy: what each kind of protection does in a round and reports at the end.

Clients apply example-level and local DP themselves; the server keeps their reports of their ledgers
(`meadow.server.ledgers`). The server applies client-level DP (`meadow.server.client_level`).
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from meadow.config.schema import Experiment
from meadow.privacy import plan
from meadow.privacy.releases import releases
from meadow.strategies import algorithm
from meadow.strategies.protocol import ServerAlgorithm
from meadow.strategies.stages import Stage
from meadow.strategies.wire.packing import Answer, Values


class Protection:
    """The server's side of one run's privacy. This base class protects nothing."""

    sync_each_round = False
    """Whether each round must be on disk before anything more is sent."""
    needs_no_reply = False
    """Whether a round without a valid reply makes a new model, too."""
    movable = True
    """Whether a client may train on any node that has its data."""
    cohort_secret: int | None = None
    """Replaces the seed in the draw of cohorts, where nobody may predict them."""

    stages: Iterable[Stage] = ()
    """The stages of updates; the summary lists their releases."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def begin(self, simulated: bool, folder: Path | None) -> None:
        """Prepare for the first round. `simulated`: whether all nodes are. `folder`: the run folder; None: keep nothing."""

    def algorithm(self, server: ServerAlgorithm[Any]) -> ServerAlgorithm[Any]:
        """The server algorithm to use in place of the experiment's own."""
        return server

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

    def summary(self) -> dict[str, Any]:
        """The summary's "privacy": unit, delta, accountant, epsilon and releases."""
        nothing = {"max": None, "median": None}
        return {"unit": "none", "delta": None, "accountant": None, "epsilon": nothing, "releases": self._releases()}

    def _claim(self, secret: bool, exhausted: int) -> dict[str, Any]:
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
            "releases": self._releases(),
        }

    def _releases(self) -> list[dict[str, str]]:
        staged = [quantity for stage in self.stages for quantity in stage.releases(self.experiment)]
        sends = algorithm(self.experiment.strategy.name).sends.values()
        return [quantity.as_json() for quantity in [*releases(self.experiment, sends), *staged]]
