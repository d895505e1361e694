"""How the command ends after an exception: one message, and the exit status that its kind has."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from meadow.runtime.errors import RunStopped, UserError
from meadow.runtime.logs import printable

_UNSUITABLE = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip
"""Errors of a file that say that the user named an unsuitable one."""


@contextmanager
def exit_status_of_errors() -> Iterator[None]:
    """Inside the block an exception that is no bug ends the process with a message and its exit status, no traceback."""
    try:
        yield
    except UserError as error:
        _end(2, str(error))
    except RunStopped as stop:
        _end(3, str(stop))
    except MemoryError as error:
        _end(3, f"the memory is used up ({error}); choose smaller batches, models or data")
    except OSError as error:
        if error.filename is None or error.errno not in _UNSUITABLE:
            raise
        _end(2, f"{error.filename}: {error.strerror}; choose another file or folder")
    except SystemExit as end:
        if end.code != 130:  # typer's status after Ctrl-C
            raise
        _end(3, "stopped by the user; to continue, add --resume --out DIR to the command")


def _end(status: int, message: str) -> None:
    Console(stderr=True).print(f"[bold red]meadow:[/] {escape(printable(message))}", highlight=False, soft_wrap=True)
    sys.exit(status)
