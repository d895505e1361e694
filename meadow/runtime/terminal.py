"""Standard output that is full or closed: an error like any other that ends a command, never a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn, TextIO

from meadow.runtime.errors import RunStopped


@contextmanager
def checked_output() -> Iterator[None]:
    """Inside the block, output that cannot be written raises RunStopped.

    A standard file that the caller closed is opened on nothing: otherwise a file of ours would take its number, and get
    whatever a library prints there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest free number; writing to it fails
    closed = sys.stdout is None
    with redirect_stdout(_Checked(open(1, "w", closefd=False) if closed else sys.stdout)):
        yield


class _Checked:
    """A text file that raises RunStopped in place of OSError, and again at each later use."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return self._file.write(text) if self._fault is None else self._refuse(self._fault)
        except OSError as fault:
            self._refuse(fault)

    def flush(self) -> None:
        try:
            self._file.flush() if self._fault is None else self._refuse(self._fault)
        except OSError as fault:
            self._refuse(fault)

    def _refuse(self, fault: OSError) -> NoReturn:
        if self._fault is None:
            self._fault = fault
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._file.fileno())  # what is still buffered goes nowhere when Python ends
            os.close(nothing)
        reason = fault.strerror or fault
        raise RunStopped(
            f"standard output cannot be written ({reason}); run folders are complete without it"
        ) from fault
