"""The exceptions that end a run without a fault in Meadow."""

_LINE, _LINES = 2000, 40


class _ForUser(Exception):
    """Its message is for the user. Values in it may be of any length: it is cut to what can be read."""

    def __init__(self, message: str) -> None:
        super().__init__(_readable(message))


class UserError(_ForUser):
    """The user's input is wrong. The message names the setting, its value, the reason and the remedy (exit status 2)."""


class RunStopped(_ForUser):
    """A run ended early for a stated reason: too few clients, a spent budget, the user (exit status 3)."""


class Interrupted(KeyboardInterrupt):
    """The user's Ctrl-C or another signal that ends the command; a KeyboardInterrupt of a client's code is not."""


def _readable(message: str) -> str:
    """The message with long lines cut in the middle, which leaves the setting and the remedy, and at most 40 lines."""
    lines = message.split("\n")
    rest = [f"... and {len(lines) - _LINES:,} more"] if len(lines) > _LINES else []
    return "\n".join(
        [
            line if len(line) <= _LINE else f"{line[: _LINE // 2]} ... ({len(line):,} characters) ... {line[-600:]}"
            for line in lines[:_LINES]
        ]
        + rest
    )
