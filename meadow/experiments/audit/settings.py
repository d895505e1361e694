"""What the audits have in common: how many canaries there are, how long they are, and experiments with other values."""

from typing import Any

from meadow.config.load import apply, resolve, to_tree
from meadow.config.schema import Experiment

CANARIES = 1000
LONG = 100.0
"""A canary's gradient or update before the clip, in clips."""
MOST_STEPS = 600
"""Steps of training that canaries go through at most."""


def changed(experiment: Experiment, **settings: Any) -> Experiment:
    """The experiment with other values, `section__key=value`."""
    return resolve(apply(to_tree(experiment), [(key.replace("__", "."), value) for key, value in settings.items()]))


def unbudgeted(experiment: Experiment, noise: float) -> Experiment:
    return changed(experiment, privacy__noise_multiplier=noise, privacy__epsilon=0.0, privacy__budgets="")
