"""The listener that writes records and checkpoints while clients train the next round, because a disk's sync can take longer
than a small round.

A round is on disk before the next one's replies are combined; under DP, before anything more is sent. Short rounds may share
a checkpoint (`EVERY`): a resumed run then replays the rounds after it, to the same bits.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from meadow.server import checkpoints
from meadow.server.folder import RunFolder
from meadow.server.listeners import Listener, RoundDone

EVERY = 1.0
"""Seconds between checkpoints if clients keep no state. Otherwise every round has one, because clients must keep all their
states since the oldest checkpoint."""


class Writer(Listener):
    """Writes rounds to a run folder, one after the other. The first and last rounds get a checkpoint, and the first round in
    each `every` seconds. The next `settle` raises an error of the writing thread."""

    def __init__(self, folder: RunFolder, run: str, every: float) -> None:
        self._folder, self._run, self.every = folder, run, every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: RoundDone | None = None
        self._writing: Future[None] | None = None
        self._late: RoundDone | None = None
        """The last round, if it has no checkpoint yet."""
        self._next = time.monotonic()

    def round_done(self, done: RoundDone) -> None:
        """Take a round to write. Nobody may change its arrays from now on."""
        self.settle()
        self._pending = done

    def clients_train(self) -> None:
        """Begin to write the round. This waits for the next messages, because Python runs only one thread at a time."""
        done, self._pending = self._pending, None
        if done is None:
            return
        with_checkpoint = (now := time.monotonic()) >= self._next
        if with_checkpoint:
            self._next = now + self.every
        self._late = None if with_checkpoint else done
        self._writing = self._thread.submit(self._write, done, with_checkpoint)

    def settle(self) -> None:
        """Wait until every round is written."""
        self.clients_train()
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except BaseException:  # no checkpoint without its round's record
                self._late = None
                raise

    def rounds_end(self) -> None:
        """`settle` for the last time, and write the last round's checkpoint."""
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
        checkpoint = checkpoints.Checkpoint(done.round, done.model, done.state, dict(done.privacy), self._run)
        checkpoints.save(self._folder.checkpoints, checkpoint)
