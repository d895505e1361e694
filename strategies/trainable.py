"""Which arrays local training changes, and at which rate: `local.trainable` and its stages, by state name.

Server and client both use this module, so they agree on what is trained. The trunk's layers are its modules with state,
in the model's order; the top layer is the last.
"""

from collections.abc import Iterable

from meadow.config.schema import Experiment, Local

HEADS = "heads."
"""Prefix of the heads' state names; all other names belong to the trunk (`strategy.share = "body"`)."""

ADDED = ("lora_a", "lora_b", "adapter")
"""Names of the modules that `meadow/tasks/models/peft.py` adds to layers."""


def layer(name: str) -> str:
    """The layer of an array: its module, or for an added module the layer that it was added to."""
    parts = name.split(".")[:-1]
    added = next((i for i, part in enumerate(parts) if part in ADDED), len(parts))
    return ".".join(parts[:added])


def is_added(name: str, *kinds: str) -> bool:
    """Whether an array belongs to an added module, of these kinds or of any."""
    return any(part in (kinds or ADDED) for part in name.split("."))


def layers(names: Iterable[str]) -> list[str]:
    """The trunk's layers, from the top down."""
    return list(dict.fromkeys(layer(name) for name in names if not name.startswith(HEADS)))[::-1]


def last_stage(experiment: Experiment) -> int:
    """The last stage of trainable = "gradual" in the run."""
    local, rounds = experiment.local, experiment.run.rounds
    return (rounds * (local.epochs if local.gradual_unit == "epochs" else 1) - 1) // local.gradual_every


def stage(experiment: Experiment, round_: int, epoch: int) -> int:
    """The stage of trainable = "gradual" in an epoch (from 0) of a round (from 1); 0 for other settings.

    Training after the last round (fine-tuning for evaluation) stays in the last stage.
    """
    local = experiment.local
    if local.trainable != "gradual":
        return 0
    done = (round_ - 1) * local.epochs + epoch if local.gradual_unit == "epochs" else round_ - 1
    return min(done // local.gradual_every, last_stage(experiment))


def trained(experiment: Experiment, names: Iterable[str], at_stage: int | None = None) -> frozenset[str]:
    """The names that local training changes: the heads, and the trunk's arrays that `local.trainable` selects.

    gradual: the `gradual_modules` times k top layers at stage k; without a stage, those of the last one. lora,
    adapters: the added modules (without a frozen A). fisher: all; a mask selects their entries
    (`client/loop/trainable.py`).
    """
    local, order = experiment.local, tuple(names)
    kind, _, count = local.trainable.partition(":")
    if kind in ("all", "fisher"):
        return frozenset(order)
    if kind == "lora":
        learning = {n for n in order if is_added(n, "lora_b") or (is_added(n, "lora_a") and local.lora_share != "b")}
    elif kind == "adapters":
        learning = {n for n in order if is_added(n, "adapter")}
    else:
        depth = {"head": 0, "last": int(count or 0), "gradual": 0}[kind]
        if kind == "gradual":
            depth = local.gradual_modules * (last_stage(experiment) if at_stage is None else at_stage)
        top = set(layers(order)[:depth])
        learning = {n for n in order if not n.startswith(HEADS) and layer(n) in top}
    return frozenset(learning | {n for n in order if n.startswith(HEADS)})


def rate_factors(local: Local, names: Iterable[str]) -> dict[str, float]:
    """The factor of each name's learning rate: 1 for heads; for the trunk `trunk_lr_factor`, times `depth_lr_factor`
    for each layer below the top (Howard and Ruder 2018, section 3.2: 1 / 2.6). The longest prefix in `lr_factors`
    multiplies it."""
    order = tuple(names)
    depth = {place: i for i, place in enumerate(layers(order))}
    named = {entry.split()[0]: float(entry.split()[1]) for entry in local.lr_factors}
    factors = {}
    for name in order:
        factor = 1.0
        if not name.startswith(HEADS):
            factor = local.trunk_lr_factor * local.depth_lr_factor ** depth[layer(name)]
        best = max((part for part in named if name.startswith(part)), key=len, default=None)
        factors[name] = factor if best is None else factor * named[best]
    return factors
