"""Rules on training: `[task]`, `[local]`, `[anchor]`, `[adapt]`, `[engine]`."""

from meadow.config.rules.rule import Rule
from meadow.config.schema import Experiment

HEAD = ("head", "last:0")
"""Values of `local.trainable` that never change the trunk."""

NO_SOURCE = "there is no source task"


def _by_depth(e: Experiment) -> bool:
    local = e.local
    return local.trainable.startswith("last:") or local.trainable == "gradual" or local.depth_lr_factor != 1


def _no_source(e: Experiment, free: bool = True) -> bool:
    """Whether there is no source task; `free`: nor another reference model."""
    return e.task.pretrained != "source" and (not free or not (e.anchor.to == "received" or e.anchor.teacher))


def _needs_source(name: str) -> Rule:
    is_ewc = name == "ewc"
    return Rule(
        (f"anchor.{name}", "task.pretrained"),
        lambda e: bool(getattr(e.anchor, name)) and _no_source(e, free=not is_ewc),
        f"{NO_SOURCE} to take as the reference",
        'write task.pretrained = "source"' + ("" if is_ewc else ', anchor.to = "received" or anchor.teacher'),
        (f"anchor.{name}=0.5",),
        (f"anchor.{name}=0.5", "task.pretrained=source"),
    )


def _fixed_images(setting: str, wrong: str) -> Rule:
    return Rule(
        (f"task.{setting}", "task.dataset"),
        lambda e: bool(getattr(e.task, setting)) and e.task.dataset in ("digits", "printed-digits"),
        "these images are always 8 x 8 grey pixels",
        'leave it out, or write another task.dataset, for example "stars"',
        (f"task.{setting}={wrong}",),
        (f"task.{setting}={wrong}", "task.dataset=stars", "task.targets=points"),
    )


TRAINING = (
    Rule(
        ("task.learn", "task.targets"),
        lambda e: e.task.learn not in ("all", "first", *e.task.targets),
        "there is no such target",
        'write "all", "first" or one of the targets',
        ("task.learn=colour",),
        ("task.learn=slant",),
    ),
    Rule(
        ("task.target_weights", "task.targets", "task.learn"),
        lambda e: (
            e.task.learn in ("all", "first", *e.task.targets)
            and bool(e.task.target_weights)
            and len(e.task.target_weights) != len(e.learned)
        ),
        lambda e: f"{len(e.task.target_weights)} values for {len(e.learned)} learned targets {list(e.learned)}",
        "give one per target, or none",
        ("task.target_weights=1,2,3",),
        ("task.target_weights=1,2", "task.learn=all"),
    ),
    _fixed_images("channels", "rgb"),
    _fixed_images("image_size", "16"),
    Rule(
        ("strategy.share", "local.trainable"),
        lambda e: e.share == "body" and e.local.trainable in HEAD,
        "the shared trunk would never change",
        'write strategy.share = "head" or "none", or local.trainable = "all"',
        ("strategy.share=body", "local.trainable=head"),
        ("strategy.share=head", "local.trainable=head"),
    ),
    Rule(
        ("local.lora_share", "strategy.share"),
        lambda e: (
            e.local.trainable == "lora"
            and e.run.placement == "federated"
            and e.local.lora_share == "a"
            and e.share not in ("trainable", "none")
        ),
        "B would be shared too",
        'write strategy.share = "trainable"',
        ("local.trainable=lora", "local.lora_share=a"),
        ("local.trainable=lora", "local.lora_share=a", "strategy.share=trainable"),
    ),
    Rule(
        ("local.fisher_on", "task.pretrained"),
        lambda e: e.local.trainable == "fisher" and e.local.fisher_on == "source" and _no_source(e, free=False),
        NO_SOURCE,
        'write task.pretrained = "source" or local.fisher_on = "local"',
        ("local.trainable=fisher", "local.fisher_on=source"),
        ("local.trainable=fisher", "local.fisher_on=local"),
    ),
    Rule(
        ("task.trunks", "local.trainable", "local.depth_lr_factor"),
        lambda e: e.task.trunks == "cross-stitch" and _by_depth(e),
        "coupled trunks have no single order of layers",
        'write trainable = "all" or "head", and lr_factors',
        ("task.trunks=cross-stitch", "local.trainable=last:1"),
        ("task.trunks=cross-stitch", "local.trainable=head"),
    ),
    Rule(
        ("local.balance", "local.trainable"),
        lambda e: e.local.trainable in (*HEAD, "gradual") and e.local.balance in ("gradnorm", "pcgrad"),
        "it weights by gradients of the trunk, which is not trained (or not at first)",
        'write local.balance = "dwa" or another local.trainable',
        ("local.balance=gradnorm", "local.trainable=head"),
        ("local.balance=dwa", "local.trainable=head"),
    ),
    Rule(
        ("local.gradual_unit", "local.steps"),
        lambda e: (
            e.local.trainable == "gradual"
            and e.local.gradual_unit == "epochs"
            and bool(e.local.steps)
            and e.privacy.unit != "example"
        ),
        "a round counted in steps has no epochs",
        'write local.steps = 0 or local.gradual_unit = "rounds"',
        ("local.trainable=gradual", "local.gradual_unit=epochs", "local.steps=3"),
        ("local.trainable=gradual", "local.gradual_unit=rounds", "local.steps=3"),
    ),
    *(_needs_source(name) for name in ("ewc", "kl", "distill")),
    Rule(
        ("anchor.ewc", "anchor.to"),
        lambda e: bool(e.anchor.ewc) and e.anchor.to == "received",
        "the Fisher information belongs to the source model",
        'write anchor.to = "start", or anchor.l2',
        ("anchor.ewc=1", "anchor.to=received", "task.pretrained=source"),
        ("anchor.ewc=1", "anchor.to=start", "task.pretrained=source"),
    ),
    Rule(
        ("task.trunks", "anchor.ewc", "local.fisher_on"),
        lambda e: (
            e.task.trunks == "cross-stitch"
            and (bool(e.anchor.ewc) or (e.local.trainable == "fisher" and e.local.fisher_on == "source"))
        ),
        "the source model has one trunk",
        'write anchor.l2, or fisher_on = "local"',
        ("task.trunks=cross-stitch", "anchor.ewc=1", "task.pretrained=source"),
        ("task.trunks=cross-stitch", "anchor.l2=1", "task.pretrained=source"),
    ),
    Rule(
        ("anchor.ewc", "local.trainable"),
        lambda e: bool(e.anchor.ewc) and e.local.trainable in ("lora", "adapters"),
        "the weights that have Fisher information are never trained",
        "write anchor.l2 or anchor.kl",
        ("anchor.ewc=1", "local.trainable=lora", "task.pretrained=source"),
        ("anchor.kl=1", "local.trainable=lora", "task.pretrained=source"),
    ),
    Rule(
        ("anchor.l2", "anchor.ewc", "local.trainable"),
        lambda e: bool(e.anchor.l2 or e.anchor.ewc) and e.anchor.to == "start" and e.local.trainable in HEAD,
        "they regularise the trunk, which is never trained",
        'write 0, anchor.to = "received", or another local.trainable',
        ("anchor.l2=1", "local.trainable=head"),
        ("anchor.l2=1", "local.trainable=last:1"),
    ),
    Rule(
        ("evaluate.on", "task.pretrained"),
        lambda e: "source" in e.evaluate.on and _no_source(e, free=False),
        NO_SOURCE,
        'write task.pretrained = "source"',
        ("evaluate.on=global,source",),
        ("evaluate.on=global,source", "task.pretrained=source"),
    ),
    Rule(
        ("adapt.method", "local.trainable"),
        lambda e: e.adapt.method in ("mmd", "deep-coral", "dann", "match") and e.local.trainable in HEAD,
        "it aligns features of the trunk, which is never trained",
        'write adapt.method = "coral" or "augment", or local.trainable = "all"',
        ("adapt.method=mmd", "local.trainable=head"),
        ("adapt.method=coral", "local.trainable=head"),
    ),
    Rule(
        ("adapt.method", "adapt.labels", "task.gated", "task.trunks"),
        lambda e: (
            e.adapt.method == "augment" and (e.adapt.labels == "source" or e.task.gated or e.task.trunks != "shared")
        ),
        "the target domain's weights are learned from its labels, in a plain head",
        'write adapt.labels = "both", task.gated = false and task.trunks = "shared"',
        ("adapt.method=augment", "adapt.labels=source"),
        ("adapt.method=augment", "adapt.labels=both"),
    ),
    Rule(
        ("engine.precision", "engine.device"),
        lambda e: (
            e.engine.precision != "float32"
            and (e.engine.device == "cpu" or (e.engine.exact and e.engine.trainer == "auto"))
        ),
        'only the trainer "stacked" on a GPU has half precision',
        'write engine.device = "cuda" and engine.exact = false, or engine.precision = "float32"',
        ("engine.precision=bfloat16",),
        ("engine.precision=bfloat16", "engine.device=cuda", "engine.exact=false"),
    ),
)
