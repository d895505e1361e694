"""The two ways in which a run ends that are not a fault of Meadow's."""


class UserError(Exception):
    """The user's input is wrong. The message names the setting, its value, the reason and the way out (exit status 2)."""


class RunStopped(Exception):
    """A run ended early for a stated reason: too few clients, a spent budget, the user (exit status 3)."""
