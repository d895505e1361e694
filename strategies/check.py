"""Checks that an experiment's settings fit its algorithm, by the properties that the `Algorithm` declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from meadow.config import load as config
from meadow.config.algorithms import ALGORITHMS
from meadow.config.rules.privacy import CLIENT, EXAMPLE, LOCAL
from meadow.config.rules.rule import Rule
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.strategies.protocol import Algorithm, Roles
from meadow.strategies.registry import algorithm


def fits(unit: str, a: Algorithm) -> bool:
    """Whether an algorithm supports this `privacy.unit`."""
    if unit == "client":
        return a.averages
    return a.is_trained_once if unit == "example" else (a.averages or a.is_trained_once) and not a.sends


def _which_fit(e: Experiment) -> str:
    names = [name for name in ALGORITHMS if fits(e.privacy.unit, algorithm(name))]
    own = "" if e.strategy.name in ALGORITHMS else "declare the property in its Algorithm (docs/strategies.md), or "
    return f"{own}write one of {', '.join(names)}"


def _federated(e: Experiment) -> bool:
    return e.run.placement == "federated"


def _unit(unit: str, why: str, given: tuple[str, ...], wrong: str) -> Rule:
    return Rule(
        ("privacy.unit", "strategy.name"),
        lambda e, a: e.privacy.unit == unit and not fits(unit, a),
        why,
        _which_fit,
        (*given, wrong),
        given,
    )


def _ordinary_steps(
    applies: Callable[[Algorithm], bool],
    why: str,
    remedy: str,
    example: str,
    key: str,
    changed: Any,
    wrong: tuple[str, ...],
) -> Rule:
    """A rule that `changed`, the effect of a setting on the loop's steps, does not fit the algorithms that `applies`
    selects."""
    return Rule(
        (key, "strategy.name"),
        lambda e, a: _federated(e) and applies(a) and bool(changed(e)),
        why,
        remedy,
        (f"strategy.name={example}", *wrong),
        wrong,
    )


_plain_sgd = partial(
    _ordinary_steps,
    lambda a: a.needs_plain_sgd,
    "it computes a mean gradient from a client's update, which needs plain steps with a known learning rate",
    "leave it out",
    "fednova",
)
_steps_itself = partial(
    _ordinary_steps,
    lambda a: a.steps_itself,
    "its clients take additional steps, which this setting would not affect",
    'leave it out, or write strategy.name = "fedavg"',
    "apfl",
)

_RATES: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("local.schedule", lambda e: e.local.schedule == "plateau", ("local.schedule=plateau",)),
    (
        "local.gradual_divide",
        lambda e: e.local.trainable == "gradual" and e.local.gradual_divide > 1,
        ("local.trainable=gradual", "local.gradual_divide=2"),
    ),
    ("local.patience", lambda e: e.local.patience, ("local.patience=1",)),
)
"""Settings that change the number or rate of the training loop's steps."""

RULES: tuple[Rule, ...] = (
    Rule(
        ("strategy.name", "run.placement"),
        lambda e, a: not _federated(e) and not a.is_plain,
        "that placement combines nothing",
        'write run.placement = "federated", or strategy.name = "fedavg"',
        ("strategy.name=fedprox", "run.placement=local"),
        ("strategy.name=fedprox",),
    ),
    Rule(
        ("strategy.name", "strategy.share"),
        lambda e, a: _federated(e) and e.strategy.share == "none" and not a.is_plain,
        "nothing is shared, so nothing is combined",
        'share something, or write strategy.name = "fedavg"',
        ("strategy.name=fedprox", "strategy.share=none"),
        ("strategy.name=fedprox", "strategy.share=body"),
    ),
    Rule(
        ("strategy.weights", "strategy.name"),
        lambda e, a: _federated(e) and a.equal_weights and e.strategy.weights == "samples",
        "its server state is an unweighted sum over clients, which does not fit weighted models",
        'write strategy.weights = "equal"',
        ("strategy.name=scaffold", "strategy.weights=samples"),
        ("strategy.name=scaffold", "strategy.weights=equal"),
    ),
    Rule(
        ("local.optimizer", "strategy.name"),
        lambda e, a: _federated(e) and a.needs_plain_sgd and e.local.optimizer != "sgd",
        "it computes a mean gradient from a client's update, which works for SGD only",
        'write local.optimizer = "sgd"',
        ("strategy.name=fednova", "local.optimizer=adam"),
        ("strategy.name=fednova", "local.optimizer=sgd"),
    ),
    *(_plain_sgd(*each) for each in _RATES),
    _plain_sgd("local.nesterov", lambda e: e.local.nesterov, ("local.nesterov=true", "local.momentum=0.9")),
    *(_steps_itself(*each) for each in _RATES),
    _steps_itself(
        "local.trainable", lambda e: e.local.trainable == "fisher", ("local.trainable=fisher", "local.fisher_on=local")
    ),
    _steps_itself("local.clip_norm", lambda e: e.local.clip_norm, ("local.clip_norm=1",)),
    _steps_itself("anchor.l2", lambda e: e.anchor.l2, ("anchor.l2=1",)),
    _steps_itself("anchor.ewc", lambda e: e.anchor.ewc, ("anchor.ewc=1", "task.pretrained=source")),
    _steps_itself("anchor.kl", lambda e: e.anchor.kl, ("anchor.kl=1", "anchor.to=received")),
    _steps_itself("anchor.distill", lambda e: e.anchor.distill, ("anchor.distill=0.5", "anchor.to=received")),
    _steps_itself("local.balance", lambda e: e.local.balance != "fixed", ("local.balance=dwa",)),
    _steps_itself("adapt.method", lambda e: e.adapt.method != "none", ("adapt.method=coral",)),
    Rule(
        ("strategy.bucket", "strategy.name"),
        lambda e, a: e.partition.clients > 0 and e.strategy.bucket > 1 and not a.buckets,
        "buckets do not change an average",
        lambda e: f"write strategy.bucket = 1, or one of {', '.join(n for n in ALGORITHMS if algorithm(n).buckets)}",
        ("strategy.bucket=2",),
        ("strategy.bucket=2", "strategy.name=median"),
    ),
    Rule(
        ("strategy.byzantine", "strategy.name", "strategy.bucket"),
        lambda e, a: e.partition.clients > 0 and update_count(e) < a.least_updates(e.strategy.byzantine),
        lambda e: (
            f"that needs {algorithm(e.strategy.name).least_updates(e.strategy.byzantine)} or more updates, and a cohort of "
            f"{e.cohort_size} gives {update_count(e)}"
        ),
        "write a larger cohort, or a smaller strategy.byzantine or strategy.bucket",
        ("strategy.name=krum", "strategy.byzantine=2", "partition.clients=6", "cohort.fraction=1"),
        ("strategy.name=krum", "strategy.byzantine=2", "partition.clients=7", "cohort.fraction=1"),
    ),
    _unit(
        "example",
        "its clients train more than once a round, or not on per-example losses alone",
        EXAMPLE,
        "strategy.name=moon",
    ),
    _unit("local", "its clients also send auxiliary arrays, which would get no noise", LOCAL, "strategy.name=scaffold"),
    _unit("client", "clipping and noise would replace its server algorithm", CLIENT, "strategy.name=scaffold"),
)


def update_count(e: Experiment) -> int:
    """The number of updates that the server combines in a round: clients, or buckets of them."""
    return -(-e.cohort_size // e.strategy.bucket)


def faults(experiment: Experiment) -> list[str]:
    """One line for each rule that the experiment breaks."""
    try:
        chosen = algorithm(experiment.strategy.name)
    except UserError as error:
        return [str(error)]
    found = [rule.fault(experiment, chosen) for rule in RULES]
    return [fault for fault in [*found, *(rule.fault(experiment) for rule in chosen.rules)] if fault]


def check(experiment: Experiment) -> None:
    """Raise UserError with all `faults`, if any."""
    if found := faults(experiment):
        raise UserError("\n".join(found))


def check_roles(experiment: Experiment, roles: Roles) -> None:
    """Raise UserError if the algorithm does not fit the roles of a model's arrays."""
    if found := [f for rule in algorithm(experiment.strategy.name).model_rules if (f := rule.fault(experiment, roles))]:
        raise UserError("\n".join(found))


def load(experiment: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Experiment:
    """Load an experiment (`meadow.config.load.load`) and check it, including its algorithm's rules."""
    return config.load(experiment, overrides, faults)


def resolve(tree: Mapping[str, Any]) -> Experiment:
    """Resolve settings (`meadow.config.load.resolve`) and check them, including the algorithm's rules."""
    return config.resolve(tree, faults)


def equal_weights(experiment: Experiment) -> bool:
    """Whether all clients have equal weights: set so, required by the algorithm, or because clients were sampled by
    size."""
    by_paper = algorithm(experiment.strategy.name).equal_weights or experiment.cohort.sampling == "size"
    return {"": by_paper, "equal": True, "samples": False}[experiment.strategy.weights]
