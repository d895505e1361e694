"""Combinations of settings that are refused, as data: each rule has a reason and says what to write instead.

Rules that depend on the algorithm are in `strategies/check.py`.
"""

from meadow.config.rules.cohort import COHORT
from meadow.config.rules.privacy import PRIVACY
from meadow.config.rules.rule import Rule as Rule
from meadow.config.rules.selection import SELECTION
from meadow.config.rules.strategy import STRATEGY
from meadow.config.rules.training import TRAINING
from meadow.config.schema import Experiment

RULES: tuple[Rule, ...] = (*COHORT, *TRAINING, *STRATEGY, *SELECTION, *PRIVACY)


def faults(experiment: Experiment) -> list[str]:
    """One line for each rule that the experiment breaks."""
    return [fault for rule in RULES if (fault := rule.fault(experiment))]
