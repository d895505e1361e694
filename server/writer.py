"""Records and checkpoints go to disk while clients train the next round: a disk takes longer over a sync than a small round.

What a round left is written before the next one's replies are combined; under DP before anything more is sent. Small rounds
may share a checkpoint (`EVERY`): whoever resumes a killed run plays what came after it again, to the same bits.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from meadow.server import checkpoints
from meadow.server.folder import RunFolder

EVERY = 1.0
"""Seconds from one checkpoint to the next, where clients keep nothing: of what they keep, each state since the oldest
checkpoint has to stay."""


class Writer:
    """Writes to a run folder, one round after the other. The first has a checkpoint, and then the first of each `every`
    seconds, and the last. What goes wrong is raised by the next `wait`."""

    def __init__(self, folder: RunFolder, every: float) -> None:
        self._folder, self._every = folder, every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._given: tuple[Mapping[str, Any], checkpoints.Checkpoint] | None = None
        self._writing: Future[None] | None = None
        self._late: checkpoints.Checkpoint | None = None
        """Of the last round, if it is not written."""
        self._next = time.monotonic()

    def give(self, record: Mapping[str, Any], checkpoint: checkpoints.Checkpoint) -> None:
        """What a round leaves: its record, and then its checkpoint, whose arrays nobody may change."""
        self.wait()
        self._given = record, checkpoint

    def begin(self) -> None:
        """Begin to write what was given. Not before the next messages are sent: Python lets one thread run at a time."""
        given, self._given = self._given, None
        if given is None:
            return
        record, self._late = given
        if (now := time.monotonic()) >= self._next:
            self._next = now + self._every
            self._writing = self._thread.submit(self._write, record, self._late)
            self._late = None
        else:
            self._writing = self._thread.submit(self._write, record)

    def wait(self) -> None:
        """Return when all that was given is written."""
        self.begin()
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except BaseException:  # no checkpoint without its round's record
                self._late = None
                raise

    def end(self) -> None:
        """`wait`, for the last time: the last round has its checkpoint then."""
        try:
            self.wait()
            if self._late is not None:
                self._save(self._late)
        finally:
            self._thread.shutdown()

    def _write(self, record: Mapping[str, Any], checkpoint: checkpoints.Checkpoint | None = None) -> None:
        self._folder.append(record)
        if checkpoint is not None:
            self._save(checkpoint)

    def _save(self, checkpoint: checkpoints.Checkpoint) -> None:
        self._folder.sync()
        checkpoints.save(self._folder.checkpoints, checkpoint)
