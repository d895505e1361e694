"""Listeners are notified of a run's progress. One of them writes the records and checkpoints; users can add their own.

A listener is any object with some of the methods of `Listener`. `run.listeners = ["module:object"]` names a user's own
(docs/listeners.md); if it names a class, each run gets a new instance.
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
    """A run is about to start its first round or, if resumed, the next one.

    experiment: all settings by section, as in `experiment.toml`. folder: the run folder. round: number of that round.
    """

    experiment: Mapping[str, Any]
    folder: Path
    round: int


@dataclass(frozen=True)
class RoundDone:
    """A round is finished. A listener must not modify anything in here.

    record: the round's line of rounds.jsonl. model: the shared arrays after it, by state name. state: the algorithm's
    state. privacy: the protection's state, for JSON.
    """

    round: int
    record: Mapping[str, Any]
    model: Arrays
    state: Arrays = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)


class Listener:
    """The notifications of a run, in this order; each method does nothing here."""

    def run_begins(self, run: RunBegins) -> None:
        """All clients are known; the first round is about to begin."""

    def round_done(self, done: RoundDone) -> str | None:
        """A round is finished. Return a reason to ask the run to stop after it."""

    def clients_train(self) -> None:
        """The next round's clients are training: a good time for slow work."""

    def settle(self) -> None:
        """Finish all work that was begun: the run depends on it from here."""

    def rounds_end(self) -> None:
        """No further round follows, for whatever reason: `settle` for the last time."""

    def run_ends(self, summary: Mapping[str, Any]) -> None:
        """The run has ended, successfully or not; `summary` is the content of summary.json."""


METHODS = ("run_begins", "round_done", "clients_train", "settle", "rounds_end", "run_ends")


class Listeners(Listener):
    """All listeners of a run. An exception from one of `ours` ends the run; one from a user's listener is only logged."""

    def __init__(self, ours: Sequence[Listener], users: Mapping[str, Any]) -> None:
        self._ours, self._users = ours, users
        self.faults: dict[str, dict[str, Any]] = {}
        """For each user's listener that has raised: its name, how often, and the first exception."""

    def run_begins(self, run: RunBegins) -> None:
        self._notify("run_begins", run)

    def round_done(self, done: RoundDone) -> str:
        returned = self._notify("round_done", done)
        return next((f"{name} asked the run to stop: {reason}" for name, reason in returned.items() if reason), "")

    def clients_train(self) -> None:
        self._notify("clients_train")

    def settle(self) -> None:
        self._notify("settle")

    def rounds_end(self) -> None:
        self._notify("rounds_end")

    def run_ends(self, summary: Mapping[str, Any]) -> None:
        self._notify("run_ends", summary)

    def _notify(self, what: str, *about: Any) -> dict[str, Any]:
        """Notify all, ours first; return what users' listeners returned, by name."""
        for listener in self._ours:
            getattr(listener, what)(*about)
        returned = {}
        for name, listener in self._users.items():
            try:
                returned[name] = getattr(listener, what)(*about) if hasattr(listener, what) else None
            except (Exception, SystemExit) as fault:  # whatever a user's listener does, the run goes on
                self._note(name, what, fault)
        return returned

    def _note(self, name: str, what: str, fault: BaseException) -> None:
        known = self.faults.setdefault(name, {"listener": name, "faults": 0, "first": f"{what}: {fault!r}"})
        if not known["faults"]:
            log.warning("run.listeners: %s raised in %s; the run goes on", name, what, exc_info=fault)
        known["faults"] += 1


def open_listeners(names: Sequence[str]) -> dict[str, Any]:
    """The listeners that `run.listeners` names, by name. Raises UserError for a name that is not a listener."""
    return {name: _open(name) for name in names}


def _open(name: str) -> object:
    listener = user_instance("run.listeners", name)
    if not any(callable(getattr(listener, what, None)) for what in METHODS):
        raise UserError(
            f'run.listeners = "{name}" has none of the methods {", ".join(METHODS)}: give it at least one of them '
            "(docs/listeners.md has an example)"
        )
    return listener
