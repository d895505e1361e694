"""The two exceptions that end a run without a fault in Meadow."""


class UserError(Exception):
    """The user's input is wrong. The message names the setting, its value, the reason and the remedy (exit status
    2)."""


class RunStopped(Exception):
    """A run ended early for a stated reason: too few clients, a spent budget, the user (exit status 3)."""
