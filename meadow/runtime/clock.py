"""Where a round's time goes: a moment belongs to the phase that was named last, so that the phases add up to the whole."""

import time
from collections.abc import Callable, Mapping

PHASES = ("broadcast", "open", "train", "reduce", "evaluate", "write")
"""Of a round: sending the model, and waiting for replies beyond the clients' own time; opening clients (data, state, the
model loaded); training; judging, adding up and combining; evaluating; writing states, and waiting for the server's disk."""


class Clock:
    """Wall time by phase, from when it is made or started again. `moment`: tells the time, in seconds."""

    def __init__(self, moment: Callable[[], float] = time.perf_counter) -> None:
        self._moment = moment
        self.start("open")

    def start(self, phase: str, since: float | None = None) -> None:
        """Forget what was, and begin with a phase; `since`: when it began (`time.perf_counter`), if that was not now."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = phase, self._moment() if since is None else since

    def now(self, phase: str) -> None:
        """From now on it is this phase."""
        moment = self._moment()
        self._seconds[self._phase] += moment - self._since
        self._phase, self._since = phase, moment

    def part(self, phase: str, times: Mapping[str, float]) -> None:
        """Of what counts as `phase` so far, these seconds belong to others."""
        for name, seconds in times.items():
            self._seconds[phase] -= seconds
            self._seconds[name] += seconds

    def read(self) -> dict[str, float]:
        """The seconds of each phase so far."""
        self.now(self._phase)
        return dict(self._seconds)
