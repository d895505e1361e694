"""The privacy of a run, as the server has it: what every kind of protection says and does in a round.

Example-level and local DP are the clients' own affair, and the server keeps what they say of their ledgers
(`meadow.server.ledgers`). Client-level DP is the server's (`meadow.server.client_level`).
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from meadow.strategies import algorithm
from meadow.strategies.protocol import ServerAlgorithm
from meadow.strategies.stages import Stage
from meadow.strategies.wire.packing import Answer, Values

from meadow.config.schema import Experiment
from meadow.privacy import plan
from meadow.privacy.releases import releases


class Protection:
    """The privacy of one run, as the server has it; this one protects nothing, and is what the others begin from."""

    lasting = False
    """Whether what leaves next presumes that the round before it is on the disk."""
    needs_no_reply = False
    """Whether a round without any good reply makes a model too."""
    movable = True
    """Whether a client may train on any node that has its data."""
    cohort_secret: int | None = None
    """What cohorts are drawn from in the place of the seed, where nobody may foretell them."""

    stages: Iterable[Stage] = ()
    """The stages of the updates, of which the summary says what leaves by them."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def begin(self, simulated: bool, folder: Path | None) -> None:
        """Before the first round, once it is known whether all nodes are simulated. `folder`: the run's; None: nothing is
        kept."""

    def algorithm(self, server: ServerAlgorithm[Any]) -> ServerAlgorithm[Any]:
        """What makes the next model where the experiment's algorithm would."""
        return server

    def require(self, round_: int) -> None:
        """Raise RunStopped if there is no budget left for the round."""

    @property
    def left(self) -> Collection[int]:
        """The clients whose budget is spent."""
        return ()

    def reminder(self, client: int) -> Values | None:
        """What a client last said of its ledger, for it to compare."""
        return None

    def read(self, replies: Iterable[Answer], round_: int) -> list[int]:
        """Take in what the replies say of the ledgers; return who has left with this round, ascending.

        Raises RunStopped if the run is to stop then, or nobody is left.
        """
        return []

    def quorum(self, asked: int, left: int) -> int:
        """Good replies that a round needs, if so many were asked and so many of these have left with it."""
        return self.experiment.cohort.quorum

    def epsilon(self) -> dict[str, float | None] | None:
        """The largest and the median epsilon over the clients, None if nothing was released; or None: nothing is claimed."""
        return None

    def epsilons(self) -> dict[int, float]:
        """Each client's epsilon, of those that have released anything."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""

    def summary(self) -> dict[str, Any]:
        """What was protected, how well by which account, and what left: the summary's "privacy"."""
        nothing = {"max": None, "median": None}
        return {"unit": "none", "delta": None, "accountant": None, "epsilon": nothing, "releases": self._releases()}

    def _claim(self, secret: bool, exhausted: int) -> dict[str, Any]:
        """The summary where something is claimed. `secret`: whether the noise came from secrets."""
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
            else "from the experiment's seed, so that runs repeat: not secret, no protection from who has the file",
            "releases": self._releases(),
        }

    def _releases(self) -> list[dict[str, str]]:
        staged = [quantity for stage in self.stages for quantity in stage.releases(self.experiment)]
        sends = algorithm(self.experiment.strategy.name).sends.values()
        return [quantity.as_json() for quantity in [*releases(self.experiment, sends), *staged]]
