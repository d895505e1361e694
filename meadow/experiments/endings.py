"""How a command ends: the exit status and the one message of each kind of exception."""

import errno
from collections.abc import Callable

from meadow.runtime.errors import RunStopped, UserError

_UNSUITABLE = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
)  # fmt: skip
"""Errors of a file that say that the user named an unsuitable one."""


def outcome(command: Callable[[], object]) -> tuple[int, str]:
    """Run a command; return its exit status and the message to end with, or "". An exception that is a bug is raised, and
    KeyboardInterrupt is, too."""
    try:
        command()
    except UserError as error:
        return 2, str(error)
    except RunStopped as stop:
        return 3, str(stop)
    except MemoryError as error:
        return 3, f"the memory is used up ({error}); choose smaller batches, models or data"
    except OSError as error:
        if error.filename is None or error.errno not in _UNSUITABLE:
            raise
        return 2, f"{error.filename}: {error.strerror}; choose another file or folder"
    except SystemExit as end:
        if end.code == 130:  # typer's status after Ctrl-C
            raise KeyboardInterrupt from None
        return int(end.code or 0), ""
    return 0, ""
