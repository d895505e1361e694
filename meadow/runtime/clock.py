"""Wall time of a round by phase. Time counts for the last phase that was named, so the phases add up to the whole."""

import time
from collections.abc import Callable, Mapping

PHASES = ("broadcast", "open", "train", "reduce", "evaluate", "write")
"""broadcast: sending the model, and waiting for replies beyond the clients' own time. open: loading a client's data,
state and model. reduce: checking, adding up and combining replies. write: saving state, and waiting for the server's
disk."""


class Clock:
    """Wall time by phase since creation or the last `start`. moment: returns the time in seconds."""

    def __init__(self, moment: Callable[[], float] = time.perf_counter) -> None:
        self._moment = moment
        self.start("open")

    def start(self, phase: str, since: float | None = None) -> None:
        """Reset all times and begin a phase; `since`: when it began (`time.perf_counter`), default now."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = phase, self._moment() if since is None else since

    def now(self, phase: str) -> None:
        """Switch to a phase."""
        moment = self._moment()
        self._seconds[self._phase] += moment - self._since
        self._phase, self._since = phase, moment

    def part(self, phase: str, times: Mapping[str, float]) -> None:
        """Move seconds that `phase` has counted to other phases."""
        for name, seconds in times.items():
            self._seconds[phase] -= seconds
            self._seconds[name] += seconds

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase so far."""
        self.now(self._phase)
        return dict(self._seconds)
