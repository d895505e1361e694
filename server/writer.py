"""Records and checkpoints go to disk while clients train the next round: a disk takes longer over a sync than a small round.

What a round left is whole on disk before the next one's replies are combined; under DP before anything more is sent.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from server import checkpoints
from server.folder import RunFolder


class Writer:
    """Writes to a run folder, one round after the other. What goes wrong is raised by the next `wait`."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._given: tuple[Mapping[str, Any], checkpoints.Checkpoint] | None = None
        self._writing: Future[None] | None = None

    def give(self, record: Mapping[str, Any], checkpoint: checkpoints.Checkpoint) -> None:
        """What a round leaves: its record, and then its checkpoint, whose arrays must not change until `wait` returns."""
        self.wait()
        self._given = record, checkpoint

    def begin(self) -> None:
        """Begin to write what was given. Not before the next messages are sent: Python lets one thread run at a time."""
        given, self._given = self._given, None
        if given is not None:
            self._writing = self._thread.submit(self._write, *given)

    def wait(self) -> None:
        """Return when all that was given is on disk."""
        self.begin()
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def end(self) -> None:
        """`wait`, for the last time."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, record: Mapping[str, Any], checkpoint: checkpoints.Checkpoint) -> None:
        self._folder.append(record)
        checkpoints.save(self._folder.checkpoints, checkpoint)
