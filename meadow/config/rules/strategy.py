"""Rules on sharing that hold for every algorithm; the algorithms' own rules are in `meadow/strategies/`."""

from meadow.config.rules.rule import Rule
from meadow.config.schema import Experiment


def _not_federated(e: Experiment) -> bool:
    return e.run.placement != "federated"


STRATEGY = (
    Rule(
        ("strategy.server_lr", "run.placement"),
        lambda e: _not_federated(e) and e.strategy.server_lr != 1,
        "without federation there is no server step",
        "leave it out",
        ("strategy.server_lr=0.5", "run.placement=local"),
        ("strategy.server_lr=0.5",),
    ),
    Rule(
        ("evaluate.unseen", "run.placement"),
        lambda e: _not_federated(e) and bool(e.evaluate.unseen),
        "without federation there is no shared model to evaluate on unseen clients",
        'write run.placement = "federated"',
        ("evaluate.unseen=0.2", "run.placement=local"),
        ("evaluate.unseen=0.2",),
    ),
    Rule(
        ("attack.kind", "run.placement"),
        lambda e: _not_federated(e) and e.attack.kind != "none",
        "without federation there is no shared model to attack",
        'write run.placement = "federated"',
        ("attack.kind=label-flip", "attack.fraction=0.5", "run.placement=local"),
        ("attack.kind=label-flip", "attack.fraction=0.5"),
    ),
    Rule(
        ("attack.kind", "strategy.share"),
        lambda e: not _not_federated(e) and e.strategy.share == "none" and e.attack.kind not in ("none", "label-flip"),
        "nothing is shared, so there is nothing to attack",
        'share something, or write attack.kind = "label-flip"',
        ("attack.kind=noise", "attack.fraction=0.5", "strategy.share=none"),
        ("attack.kind=label-flip", "attack.fraction=0.5", "strategy.share=none"),
    ),
    Rule(
        ("strategy.stages", "run.placement"),
        lambda e: _not_federated(e) and bool(e.strategy.stages),
        "no update is sent",
        'write run.placement = "federated", or leave it out',
        ("strategy.stages=mine:STAGE", "run.placement=local"),
        ("strategy.stages=mine:STAGE",),
    ),
    Rule(
        ("strategy.stages", "strategy.share"),
        lambda e: not _not_federated(e) and e.strategy.share == "none" and bool(e.strategy.stages),
        "no update is sent",
        "share something, or leave it out",
        ("strategy.stages=mine:STAGE", "strategy.share=none"),
        ("strategy.stages=mine:STAGE",),
    ),
)
