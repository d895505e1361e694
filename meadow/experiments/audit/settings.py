"""Settings that the audits share: the number and size of canaries, and changed experiments."""

from typing import Any

from meadow.config.load import apply, resolve, to_tree
from meadow.config.schema import Experiment

CANARIES = 1000
LONG = 100.0
"""Norm of a canary's gradient or update before clipping, in units of the clip."""
MOST_STEPS = 600
"""The largest number of training steps with canaries."""


def changed(experiment: Experiment, **settings: Any) -> Experiment:
    """The experiment with changed settings, `section__key=value`."""
    return resolve(apply(to_tree(experiment), [(key.replace("__", "."), value) for key, value in settings.items()]))


def unbudgeted(experiment: Experiment, noise: float) -> Experiment:
    return changed(experiment, privacy__noise_multiplier=noise, privacy__epsilon=0.0, privacy__budgets="")
