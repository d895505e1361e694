"""What local training changes, by the names of a model's state: `local.trainable`, its stages and its rates.

Server and client both ask here, with the names alone, so that what travels is what is trained. The trunk's layers are
its modules that hold state, in the order in which the model names them; the top is the last of them.
"""

from collections.abc import Iterable

from meadow.config.schema import Experiment, Local

HEADS = "heads."
"""State names of the heads start with this, all others belong to the trunk ("body")."""

ADDED = ("lora_a", "lora_b", "adapter")
"""Names of the modules that `meadow/tasks/models/peft.py` adds to a layer."""


def layer(name: str) -> str:
    """The layer that an array belongs to: its module; what `meadow/tasks/models/peft.py` adds to a layer belongs to
    that layer."""
    parts = name.split(".")[:-1]
    added = next((i for i, part in enumerate(parts) if part in ADDED), len(parts))
    return ".".join(parts[:added])


def is_added(name: str, *kinds: str) -> bool:
    """Whether an array is one of those that `meadow/tasks/models/peft.py` adds, of any kind or of those named."""
    return any(part in (kinds or ADDED) for part in name.split("."))


def layers(names: Iterable[str]) -> list[str]:
    """The trunk's layers, from the top down."""
    return list(dict.fromkeys(layer(name) for name in names if not name.startswith(HEADS)))[::-1]


def last_stage(experiment: Experiment) -> int:
    """The stage of trainable = "gradual" that the run ends in."""
    local, rounds = experiment.local, experiment.run.rounds
    return (rounds * (local.epochs if local.gradual_unit == "epochs" else 1) - 1) // local.gradual_every


def stage(experiment: Experiment, round_: int, epoch: int) -> int:
    """The stage of trainable = "gradual" in an epoch (from 0) of a round (from 1); 0 under every other setting.

    A function of the round, so that a resumed run goes on in it. What is trained after the last round (fine-tuning for
    evaluation) stays in the last stage.
    """
    local = experiment.local
    if local.trainable != "gradual":
        return 0
    done = (round_ - 1) * local.epochs + epoch if local.gradual_unit == "epochs" else round_ - 1
    return min(done // local.gradual_every, last_stage(experiment))


def trained(experiment: Experiment, names: Iterable[str], at_stage: int | None = None) -> frozenset[str]:
    """The names that local training changes: the heads' and those that `local.trainable` lets learn.

    gradual: at stage k, the `gradual_modules` times k top layers; without a stage, all that learn at some time in the
    run. lora and adapters: what they add (A not, where it is frozen). fisher: every array; which of its entries, the
    mask decides (`client/loop/trainable.py`).
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
    """What each name's learning rate is multiplied by: heads 1; the trunk `trunk_lr_factor`, times `depth_lr_factor`
    for each layer from the top one down (Howard and Ruder 2018, section 3.2: 1 / 2.6); each times the factor of the
    longest entry of `lr_factors` that its name begins with."""
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
