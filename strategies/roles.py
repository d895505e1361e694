"""Decides which arrays are shared, personal or fixed, by `strategy.share` and `local.trainable`."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from meadow.arrays.named import AUXILIARY
from meadow.config.schema import SHARES, Experiment
from meadow.runtime.errors import UserError
from meadow.strategies.check import check_roles
from meadow.strategies.protocol import Roles
from meadow.strategies.registry import algorithm
from meadow.strategies.trainable import HEADS, is_added, trained


def roles_of(experiment: Experiment, model: nn.Module) -> Roles:
    """The roles of a model's arrays. Raises UserError if `strategy.share` does not fit the model."""
    names = tuple(model.state_dict())
    parameters = {name for name, _ in model.named_parameters()}
    return roles(experiment, names, norms(model), tuple(n for n in names if n not in parameters))


def roles(
    experiment: Experiment, names: Iterable[str], norms: Iterable[str] = (), buffers: tuple[str, ...] = ()
) -> Roles:
    """The roles of arrays with these state names, in this order.

    norms: names of normalisation layers. buffers: names that are not parameters. Raises UserError for patterns that
    match no name, and for "all-but-norms" without norms.
    """
    order = tuple(names)
    heads = tuple(n for n in order if n.startswith(HEADS))
    body = tuple(n for n in order if not n.startswith(HEADS))
    learning = trained(experiment, order)
    changed = tuple(n for n in order if n in learning)
    if experiment.local.statistics == "kept":
        changed = tuple(n for n in changed if n not in buffers)
    if not algorithm(experiment.strategy.name).trains_heads:
        changed = tuple(n for n in changed if n in body)
    # FedSA-LoRA: each client keeps its B; the settings allow this only with share = "trainable".
    federated = experiment.run.placement == "federated"
    own_b = federated and experiment.local.trainable == "lora" and experiment.local.lora_share == "a"
    sets = {
        "all": order,
        "none": (),
        "body": body,
        "head": heads,
        "all-but-norms": tuple(n for n in order if n not in set(norms)),
        "trainable": tuple(n for n in changed if not (own_b and is_added(n, "lora_b"))),
    }
    share = experiment.share
    if share == "all-but-norms" and len(sets[share]) == len(order):
        raise UserError(
            f'strategy.share = "all-but-norms": task.model = "{experiment.task.model}" has no normalisation layers, so '
            'this would be FedAvg: write strategy.share = "all", or task.model = "cnn", which has some'
        )
    shared = sets[share] if share in SHARES else _matching(share, order)
    personal = tuple(n for n in changed if n not in shared)
    fixed = tuple(n for n in order if n not in shared and n not in personal)
    found = Roles(changed, shared, personal, fixed, buffers)
    if share != "none" and not found.learned_together:
        raise UserError(
            f'strategy.share = "{experiment.strategy.share}" with local.trainable = "{experiment.local.trainable}" and '
            f'strategy.name = "{experiment.strategy.name}" shares only arrays that never change: write strategy.share = '
            '"trainable", or local.trainable = "all"'
        )
    check_roles(experiment, found)
    return found


def norms(model: nn.Module) -> tuple[str, ...]:
    """The state names, statistics included, of a model's normalisation layers, which FedBN keeps with the client.

    The type decides, not the layer's name: torch's, and classes whose name ends with "Norm" (transformers' RMS norms).
    """
    torchs = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    prefixes = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torchs) or type(module).__name__.rstrip("1234d").endswith("Norm")
    }
    return tuple(n for n in model.state_dict() if n.rpartition(".")[0] in prefixes)


def _matching(patterns: str, names: tuple[str, ...]) -> tuple[str, ...]:
    wanted = [p.strip() for p in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise UserError(
                f'strategy.share = "{patterns}": "{pattern}" matches no array of the model; write one of '
                f"{', '.join(SHARES)}, or patterns with * for these names: {', '.join(names)}"
            )
    return tuple(n for n in names if any(fnmatchcase(n, p) for p in wanted))


def name_weights(metrics: Mapping[str, Any], names: Iterable[str], equal: bool = False) -> dict[str, float]:
    """The weight of each array in a client's reply: the number of training samples (`num-examples`), for a head those
    of its target (`num-examples/<target>`). A head that no sample trained has weight 0 and is not sent.

    equal: weight 1 for each array that is sent. Auxiliary arrays ("c@trunk.w") always have weight 1.
    """
    weights = {}
    for name in names:
        kind, _, of = name.rpartition(AUXILIARY)
        target = of.split(".")[1] if of.startswith(HEADS) else ""
        weight = float(metrics.get(f"num-examples/{target}", metrics["num-examples"]))
        weights[name] = float(weight > 0) if equal or kind else weight
    return weights
