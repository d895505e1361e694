"""Rules of `run.patience`, `run.target` and `run.keep`, which go by validation scores of the clients."""

from meadow.config.rules.rule import Rule
from meadow.config.schema import Experiment

GO_BY = 'run.patience, run.target and run.keep = "best" go by the scores of clients on their validation parts'


def _without_scores(e: Experiment) -> bool:
    return e.run.selects and not (e.evaluate.validation and "clients" in e.evaluate.on)


SELECTION = (
    Rule(
        ("evaluate.validation", "evaluate.on"),
        _without_scores,
        GO_BY,
        'write evaluate.validation = true, and "clients" in evaluate.on',
        ("run.patience=3", "evaluate.validation=false"),
        ("run.patience=3",),
    ),
    Rule(
        ("privacy.unit", "privacy.release"),
        lambda e: e.run.selects and e.privacy.unit != "none" and "metrics" not in e.privacy.release,
        f"{GO_BY}, which no mechanism protects",
        'write privacy.release = ["metrics"] to send them unprotected, or leave the three out',
        ("run.keep=best", "privacy.unit=client", "privacy.noise_multiplier=1"),
        ("run.keep=best", "privacy.unit=client", "privacy.noise_multiplier=1", "privacy.release=metrics"),
    ),
)
