"""Rules of what is shared, where, that hold for every algorithm; those of algorithms are in `meadow/strategies/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meadow.config.rules.rule import Rule

if TYPE_CHECKING:
    from meadow.config.schema import Experiment


def _apart(e: Experiment) -> bool:
    return e.run.placement != "federated"


STRATEGY = (
    Rule(
        ("strategy.server_lr", "run.placement"),
        lambda e: _apart(e) and e.strategy.server_lr != 1,
        "there is no server that takes a step",
        "leave it out",
        ("strategy.server_lr=0.5", "run.placement=local"),
        ("strategy.server_lr=0.5",),
    ),
    Rule(
        ("evaluate.unseen", "run.placement"),
        lambda e: _apart(e) and bool(e.evaluate.unseen),
        "there is no shared model that unseen clients could be given",
        'write run.placement = "federated"',
        ("evaluate.unseen=0.2", "run.placement=local"),
        ("evaluate.unseen=0.2",),
    ),
    Rule(
        ("attack.kind", "run.placement"),
        lambda e: _apart(e) and e.attack.kind != "none",
        "there is no shared model that could be attacked",
        'write run.placement = "federated"',
        ("attack.kind=label-flip", "attack.fraction=0.5", "run.placement=local"),
        ("attack.kind=label-flip", "attack.fraction=0.5"),
    ),
    Rule(
        ("attack.kind", "strategy.share"),
        lambda e: not _apart(e) and e.strategy.share == "none" and e.attack.kind not in ("none", "label-flip"),
        "nothing travels that could be attacked",
        'share something, or write attack.kind = "label-flip"',
        ("attack.kind=noise", "attack.fraction=0.5", "strategy.share=none"),
        ("attack.kind=label-flip", "attack.fraction=0.5", "strategy.share=none"),
    ),
    Rule(
        ("strategy.stages", "run.placement"),
        lambda e: _apart(e) and bool(e.strategy.stages),
        "no update leaves",
        'write run.placement = "federated", or leave it out',
        ("strategy.stages=mine:STAGE", "run.placement=local"),
        ("strategy.stages=mine:STAGE",),
    ),
    Rule(
        ("strategy.stages", "strategy.share"),
        lambda e: not _apart(e) and e.strategy.share == "none" and bool(e.strategy.stages),
        "no update leaves",
        "share something, or leave it out",
        ("strategy.stages=mine:STAGE", "strategy.share=none"),
        ("strategy.stages=mine:STAGE",),
    ),
)
