"""Listeners: what is told of a run while it goes on. The records and the checkpoints are written by one; users bring others.

A listener is any object with some of the methods of `Listener`. `run.listeners = ["module:object"]` names a user's own
(docs/listeners.md); a class is made anew for each run.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meadow.arrays.named import Arrays
from meadow.runtime.errors import UserError
from meadow.runtime.objects import user_instance

log = logging.getLogger("meadow.server")


@dataclass(frozen=True)
class RunBegins:
    """A run is about to play its first round, or, resumed, the next one.

    experiment: every setting, as `experiment.toml` has them, by section. folder: the run's. round: the first to be played.
    """

    experiment: Mapping[str, Any]
    folder: Path
    round: int


@dataclass(frozen=True)
class RoundDone:
    """A round has been played. Nothing of it may be written to.

    record: its line of rounds.jsonl. model: the shared arrays after it, by state name. state: what the algorithm keeps;
    privacy: what the next round's protection needs, for JSON.
    """

    round: int
    record: Mapping[str, Any]
    model: Arrays
    state: Arrays = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)


class Listener:
    """What a listener may be told, in this order; each method does nothing here."""

    def run_begins(self, run: RunBegins) -> None:
        """All clients are there."""

    def round_done(self, done: RoundDone) -> str | None:
        """A round has been played. Return a reason to ask the run to stop behind it."""

    def clients_train(self) -> None:
        """The next round's clients are at work: the time for what takes long."""

    def settle(self) -> None:
        """Return when all that was begun is done: what follows presumes it."""

    def rounds_end(self) -> None:
        """No further round is played, for whatever reason: `settle`, for the last time."""

    def run_ends(self, summary: Mapping[str, Any]) -> None:
        """The run has ended, well or not; what stands in summary.json."""


TOLD = ("run_begins", "round_done", "clients_train", "settle", "rounds_end", "run_ends")


class Listeners:
    """All listeners of a run. What one of `ours` raises ends the run; what a user's raises is noted, and ends nothing."""

    def __init__(self, ours: Sequence[Listener], users: Mapping[str, Any]) -> None:
        self._ours, self._users = ours, users
        self.faults: dict[str, dict[str, Any]] = {}
        """Of each user's listener that has raised: its name, how often, and the first fault."""

    def run_begins(self, run: RunBegins) -> None:
        """Tell all that the run begins."""
        self._tell("run_begins", run)

    def round_done(self, done: RoundDone) -> str:
        """Tell all that a round has been played; returns why the run is to stop, "" if it is not."""
        said = self._tell("round_done", done)
        return next((f"{name} asked the run to stop: {reason}" for name, reason in said.items() if reason), "")

    def clients_train(self) -> None:
        """Tell all that clients are at work."""
        self._tell("clients_train")

    def settle(self) -> None:
        """Return when all have done what they began."""
        self._tell("settle")

    def rounds_end(self) -> None:
        """Tell all that no further round is played."""
        self._tell("rounds_end")

    def run_ends(self, summary: Mapping[str, Any]) -> None:
        """Tell all how the run has ended."""
        self._tell("run_ends", summary)

    def _tell(self, what: str, *about: Any) -> dict[str, Any]:
        """Tell all, ours first; what users' listeners returned, by name."""
        for listener in self._ours:
            getattr(listener, what)(*about)
        said = {}
        for name, listener in self._users.items():
            try:
                said[name] = getattr(listener, what)(*about) if hasattr(listener, what) else None
            except (Exception, SystemExit) as fault:  # whatever a user's listener does, the run goes on
                self._note(name, what, fault)
        return said

    def _note(self, name: str, what: str, fault: BaseException) -> None:
        known = self.faults.setdefault(name, {"listener": name, "faults": 0, "first": f"{what}: {fault!r}"})
        if not known["faults"]:
            log.warning("run.listeners: %s raised in %s; the run goes on", name, what, exc_info=fault)
        known["faults"] += 1


def open_listeners(names: Sequence[str]) -> dict[str, Any]:
    """The listeners that `run.listeners` names, by these names. Raises UserError for a name that stands for none."""
    return {name: _open(name) for name in names}


def _open(name: str) -> object:
    listener = user_instance("run.listeners", name)
    if not any(callable(getattr(listener, what, None)) for what in TOLD):
        raise UserError(
            f'run.listeners = "{name}" has none of the methods {", ".join(TOLD)}: a listener has one of them or more '
            "(docs/listeners.md shows one)"
        )
    return listener
