"""The listener that writes records and checkpoints, while clients train the next round: a disk takes longer over a sync than
a small round.

What a round left is written before the next one's replies are combined; under DP before anything more is sent. Small rounds
may share a checkpoint (`EVERY`): whoever resumes a killed run plays what came after it again, to the same bits.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from meadow.server import checkpoints
from meadow.server.folder import RunFolder
from meadow.server.listeners import Listener, RoundDone

EVERY = 1.0
"""Seconds from one checkpoint to the next, where clients keep nothing: of what they keep, each state since the oldest
checkpoint has to stay."""


class Writer(Listener):
    """Writes to a run folder, one round after the other. The first has a checkpoint, and then the first of each `every`
    seconds, and the last. What goes wrong is raised by the next `settle`."""

    def __init__(self, folder: RunFolder, every: float) -> None:
        self._folder, self.every = folder, every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._given: RoundDone | None = None
        self._writing: Future[None] | None = None
        self._late: RoundDone | None = None
        """The last round, if its checkpoint is not written."""
        self._next = time.monotonic()

    def round_done(self, done: RoundDone) -> None:
        """Take what a round leaves: its record, and then its checkpoint, whose arrays nobody may change."""
        self.settle()
        self._given = done

    def clients_train(self) -> None:
        """Begin to write what was given. Not before the next messages are sent: Python lets one thread run at a time."""
        given, self._given = self._given, None
        if given is None:
            return
        if (now := time.monotonic()) >= self._next:
            self._next, self._late = now + self.every, None
            self._writing = self._thread.submit(self._write, given, True)
        else:
            self._late = given
            self._writing = self._thread.submit(self._write, given, False)

    def settle(self) -> None:
        """Return when all that was given is written."""
        self.clients_train()
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except BaseException:  # no checkpoint without its round's record
                self._late = None
                raise

    def rounds_end(self) -> None:
        """`settle`, for the last time: the last round has its checkpoint then."""
        try:
            self.settle()
            if self._late is not None:
                self._save(self._late)
        finally:
            self._thread.shutdown()

    def _write(self, done: RoundDone, with_checkpoint: bool) -> None:
        self._folder.append(done.record)
        if with_checkpoint:
            self._save(done)

    def _save(self, done: RoundDone) -> None:
        self._folder.sync()
        checkpoints.save(
            self._folder.checkpoints, checkpoints.Checkpoint(done.round, done.model, done.state, dict(done.privacy))
        )
