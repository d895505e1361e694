"""Records and checkpoints go to disk while clients train the next round: a disk takes longer over a sync than a small round.

What a round left is whole on disk before the next one's replies are combined; under DP before anything more is sent.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from server import checkpoints
from server.folder import RunFolder


class Writer:
    """Writes to a run folder, one round after the other. What goes wrong is raised by the next call."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writing: Future[None] | None = None

    def begin(self, record: Mapping[str, Any], checkpoint: checkpoints.Checkpoint) -> None:
        """Begin to write a round's record and then its checkpoint, whose arrays must not change until `wait` returns."""
        self.wait()
        self._writing = self._thread.submit(self._write, record, checkpoint)

    def wait(self) -> None:
        """Return when all is on disk."""
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
