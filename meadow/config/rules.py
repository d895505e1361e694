"""What does not go together in an experiment: settings that are each right, and wrong beside another.

Nothing is refused merely because nobody thought of it: each refusal here has a reason, and says what to write instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meadow.config.algorithms import AVERAGES, NORMALISED, PRIVATE, ROBUST, SUMMED_EQUALLY, WATCHING, least_updates

if TYPE_CHECKING:
    from meadow.config.schema import Experiment


def check(experiment: Experiment) -> None:
    """Raise ValueError for a combination of settings that cannot be: with the settings, the reason and the way out."""
    task, learned = experiment.task, experiment.learned
    unknown = experiment.partition.clients == 0  # until the data has been opened: meadow.tasks.task.settle
    if not unknown:
        _cohort(experiment)
    if task.learn not in ("all", "first", *task.targets):
        raise ValueError(
            f'task.learn = "{task.learn}" is no target: write "all", "first" or one of {list(task.targets)}'
        )
    if task.target_weights and len(task.target_weights) != len(learned):
        raise ValueError(
            f"task.target_weights has {len(task.target_weights)} values for {len(learned)} learned targets "
            f"{list(learned)}: give one each, or none"
        )
    for setting, value in {"channels": task.channels, "image_size": task.image_size}.items():
        if value and task.dataset in ("digits", "printed-digits"):
            raise ValueError(
                f'task.{setting} = {value!r} with task.dataset = "{task.dataset}": these images are 8 x 8 grey pixels and '
                'are taken as they are; leave it out, or write task.dataset = "stars" or another one with images'
            )
    _trainable(experiment)
    _source(experiment)
    _strategy(experiment)
    if not unknown:
        _defence(experiment)
    _adapt(experiment)
    _engine(experiment)
    if faults := _privacy_faults(experiment):
        raise ValueError("; ".join(faults))


def _engine(experiment: Experiment) -> None:
    engine = experiment.engine
    if engine.precision != "float32" and (engine.device == "cpu" or (engine.exact and engine.trainer == "auto")):
        raise ValueError(
            f'engine.precision = "{engine.precision}" with engine.device = "{engine.device}": half precision is for the '
            'trainer "stacked" on a GPU; write engine.device = "cuda" and engine.exact = false, or engine.precision = '
            '"float32"'
        )


def _trainable(experiment: Experiment) -> None:
    local, share = experiment.local, experiment.share
    if share == "body" and local.trainable in ("head", "last:0"):
        raise ValueError(
            f'strategy.share = "body" with local.trainable = "{local.trainable}" shares only what never changes: write '
            'strategy.share = "head" or "none", or local.trainable = "all"'
        )
    federated_lora = local.trainable == "lora" and experiment.run.placement == "federated"
    if federated_lora and local.lora_share == "a" and share not in ("trainable", "none"):
        raise ValueError(
            f'local.lora_share = "a" with strategy.share = "{share}": B would travel too; write '
            'strategy.share = "trainable"'
        )
    if local.trainable == "fisher" and local.fisher_on == "source" and experiment.task.pretrained != "source":
        raise ValueError(
            f'local.fisher_on = "source" with task.pretrained = "{experiment.task.pretrained}": there is no source task; '
            'write task.pretrained = "source" or local.fisher_on = "local"'
        )
    by_depth = local.trainable.startswith("last:") or local.trainable == "gradual" or local.depth_lr_factor != 1
    if experiment.task.trunks == "cross-stitch" and by_depth:
        raise ValueError(
            f'task.trunks = "cross-stitch" with local.trainable = "{local.trainable}" and local.depth_lr_factor = '
            f'{local.depth_lr_factor}: coupled trunks have no one order of layers; write trainable = "all" or '
            '"head", and lr_factors'
        )
    if local.trainable in ("head", "last:0", "gradual") and local.balance in ("gradnorm", "pcgrad"):
        raise ValueError(
            f'local.balance = "{local.balance}" with local.trainable = "{local.trainable}": it weighs gradients of the '
            'trunk, which does not learn (or not at first); write local.balance = "dwa" or another local.trainable'
        )
    if local.trainable == "gradual" and local.gradual_unit == "epochs" and local.steps:
        raise ValueError(
            f'local.gradual_unit = "epochs" with local.steps = {local.steps}: rounds then have no number of epochs; '
            'write local.steps = 0 or local.gradual_unit = "rounds"'
        )


def _source(experiment: Experiment) -> None:
    anchor, pretrained = experiment.anchor, experiment.task.pretrained
    asked = {"anchor.ewc": anchor.ewc, "anchor.kl": anchor.kl, "anchor.distill": anchor.distill}
    if anchor.to == "received" or anchor.teacher:
        asked = {"anchor.ewc": anchor.ewc}
    for name, value in asked.items():
        if value and pretrained != "source":
            raise ValueError(
                f'{name} = {value} with task.pretrained = "{pretrained}": there is no source task to hold on to; write '
                'task.pretrained = "source"'
                + ("" if name == "anchor.ewc" else ', anchor.to = "received" or anchor.teacher')
            )
    if anchor.ewc and anchor.to == "received":
        raise ValueError(
            f'anchor.ewc = {anchor.ewc} with anchor.to = "received": the Fisher information is the source model\'s; '
            'write anchor.to = "start", or anchor.l2'
        )
    whole = anchor.ewc or (experiment.local.trainable == "fisher" and experiment.local.fisher_on == "source")
    if whole and experiment.task.trunks == "cross-stitch":
        raise ValueError(
            f'task.trunks = "cross-stitch" with anchor.ewc = {anchor.ewc} and local.fisher_on = '
            f'"{experiment.local.fisher_on}": the source model has one trunk; write anchor.l2, or fisher_on = "local"'
        )
    if anchor.ewc and experiment.local.trainable in ("lora", "adapters"):
        raise ValueError(
            f'anchor.ewc = {anchor.ewc} with local.trainable = "{experiment.local.trainable}": the weights that the Fisher '
            "information is of never change; write anchor.l2 or anchor.kl"
        )
    if (anchor.l2 or anchor.ewc) and anchor.to == "start" and experiment.local.trainable in ("head", "last:0"):
        raise ValueError(
            f"anchor.l2 = {anchor.l2} and anchor.ewc = {anchor.ewc} hold the trunk, which local.trainable = "
            f'"{experiment.local.trainable}" never changes: write 0, anchor.to = "received", or another local.trainable'
        )
    if "source" in experiment.evaluate.on and pretrained != "source":
        raise ValueError(
            f'evaluate.on names "source" with task.pretrained = "{pretrained}": there is no source task; write '
            'task.pretrained = "source"'
        )


def _cohort(experiment: Experiment) -> None:
    cohort, participants = experiment.cohort, experiment.participants
    if participants < 1 or (experiment.evaluate.unseen and participants == experiment.partition.clients):
        raise ValueError(
            f"evaluate.unseen = {experiment.evaluate.unseen:g} of partition.clients = {experiment.partition.clients} leaves "
            f"{participants} clients in training: choose a share that holds out one client or more, and not all"
        )
    if cohort.size > participants:
        held = (
            f" less the {experiment.partition.clients - participants} unseen ones" if experiment.evaluate.unseen else ""
        )
        raise ValueError(
            f"cohort.size = {cohort.size} is more than partition.clients = {experiment.partition.clients}{held}: "
            "make the cohort smaller or the population larger"
        )
    if cohort.quorum > experiment.cohort_size and cohort.sampling in ("fixed", "size"):
        raise ValueError(
            f"cohort.quorum = {cohort.quorum} is more than the {experiment.cohort_size} clients of a cohort, so every "
            "round would fail: make the quorum smaller or the cohort larger"
        )
    if (cohort.sampling == "schedule") != bool(cohort.schedule):
        raise ValueError(
            f'cohort.sampling = "{cohort.sampling}" with cohort.schedule = "{cohort.schedule}": a schedule needs a '
            'file, and a file is read only with cohort.sampling = "schedule"'
        )
    if cohort.over_selection and cohort.sampling not in ("fixed", "size"):
        raise ValueError(
            f'cohort.over_selection = {cohort.over_selection:g} with cohort.sampling = "{cohort.sampling}": such a '
            'cohort has no size to be filled; write cohort.sampling = "fixed" or "size", or over_selection = 0'
        )


def _strategy(experiment: Experiment) -> None:
    name, share, local = experiment.strategy.name, experiment.strategy.share, experiment.local
    apart, is_plain = experiment.run.placement != "federated", name in ("fedavg", "fedsim")
    if apart and experiment.strategy.server_lr != 1:
        raise ValueError(
            f"strategy.server_lr = {experiment.strategy.server_lr:g} with run.placement = "
            f'"{experiment.run.placement}": there is no server that takes a step; leave it out'
        )
    if name == "feddyn" and experiment.strategy.server_lr != 1:
        raise ValueError(
            f'strategy.server_lr = {experiment.strategy.server_lr:g} with strategy.name = "feddyn": its server\'s step '
            "has no size of its own; leave it out"
        )
    if apart and not is_plain:
        raise ValueError(
            f'strategy.name = "{name}" with run.placement = "{experiment.run.placement}": nothing is combined there; write '
            'run.placement = "federated", or strategy.name = "fedavg"'
        )
    if apart and experiment.strategy.stages:
        raise ValueError(
            f'strategy.stages = {list(experiment.strategy.stages)} with run.placement = "{experiment.run.placement}": no '
            'update leaves; write run.placement = "federated", or leave it out'
        )
    if apart and (experiment.evaluate.unseen or experiment.attack.kind != "none"):
        what = "evaluate.unseen" if experiment.evaluate.unseen else "attack.kind"
        raise ValueError(
            f'{what} with run.placement = "{experiment.run.placement}": there is no shared model that unseen clients could '
            'be given, or that could be attacked; write run.placement = "federated"'
        )
    if apart:
        return
    if share == "none" and not is_plain:
        raise ValueError(
            f'strategy.name = "{name}" with strategy.share = "none": nothing travels, so nothing is combined; share '
            'something, or write strategy.name = "fedavg"'
        )
    if share == "none" and experiment.strategy.stages:
        raise ValueError(
            f'strategy.stages = {list(experiment.strategy.stages)} with strategy.share = "none": no update leaves; share '
            "something, or leave it out"
        )
    if share == "none" and experiment.attack.kind not in ("none", "label-flip"):
        raise ValueError(
            f'attack.kind = "{experiment.attack.kind}" with strategy.share = "none": nothing travels that could be '
            'attacked; share something, or write attack.kind = "label-flip"'
        )
    if name in SUMMED_EQUALLY and experiment.strategy.weights == "samples":
        raise ValueError(
            f'strategy.weights = "samples" with strategy.name = "{name}": its server adds up what clients keep, each '
            'once, and models weighted otherwise would not fit; write strategy.weights = "equal"'
        )
    _own_steps(experiment)
    if name in NORMALISED and local.optimizer != "sgd":
        raise ValueError(
            f'local.optimizer = "{local.optimizer}" with strategy.name = "{name}": it turns a client\'s move back into '
            'a mean gradient, which is known for SGD only; write local.optimizer = "sgd"'
        )
    nothing_personal = share in ("all", "trainable") or (share == "head" and local.trainable == "head")
    if name in ("fedrep", "fedalt") and nothing_personal:
        raise ValueError(
            f'strategy.share = "{share}" with strategy.name = "{name}": nothing is personal, so there are no two parts '
            'to train in turns; write strategy.share = "body"'
        )
    heads_alone = ("head", "last:0", "gradual") if name == "fedbabu" else ("head", "last:0")
    if name in ("fedbabu", "moon") and local.trainable in heads_alone:
        raise ValueError(
            f'local.trainable = "{local.trainable}" with strategy.name = "{name}": it trains the trunk from round 1 on; '
            'write local.trainable = "all"'
        )
    if name == "fedbabu" and share == "head":
        raise ValueError(
            'strategy.share = "head" with strategy.name = "fedbabu": its head never changes, so nothing would be '
            'learned together; write strategy.share = "body"'
        )
    if name == "fedrod" and experiment.task.gated:
        raise ValueError(
            'task.gated = true with strategy.name = "fedrod": two gated heads do not add up to one; write '
            "task.gated = false"
        )


def _own_steps(experiment: Experiment) -> None:
    """Refuse what the training loop does with its own steps alone, where an algorithm needs to know or share it."""
    name, local, anchor = experiment.strategy.name, experiment.local, experiment.anchor
    rates = {
        "local.schedule": local.schedule == "plateau" and local.schedule,
        "local.gradual_divide": local.trainable == "gradual" and local.gradual_divide > 1 and local.gradual_divide,
        "local.patience": local.patience,
    }
    for setting, value in (rates | {"local.nesterov": local.nesterov}).items():
        if name in NORMALISED and value:
            raise ValueError(
                f'{setting} = {value} with strategy.name = "{name}": it turns a client\'s move back into a mean '
                "gradient, for which each client's steps must be plain and of the same known rate; leave it out"
            )
    own: dict[str, object] = rates | {
        "local.trainable": local.trainable == "fisher" and local.trainable,
        "local.clip_norm": local.clip_norm,
        "anchor.l2": anchor.l2,
        "anchor.ewc": anchor.ewc,
        "anchor.kl": anchor.kl,
        "anchor.distill": anchor.distill,
        "local.balance": local.balance != "fixed" and local.balance,
        "adapt.method": experiment.adapt.method != "none" and experiment.adapt.method,
    }
    for setting, changed in own.items():
        if name in WATCHING and changed:
            raise ValueError(
                f'{setting} = {changed} with strategy.name = "{name}": its clients take steps of their own, where that '
                'would have no part; leave it out, or write strategy.name = "fedavg"'
            )


def _defence(experiment: Experiment) -> None:
    attack, strategy, clients = experiment.attack, experiment.strategy, experiment.partition.clients
    name, f = strategy.name, strategy.byzantine
    if attack.kind != "none" and round(attack.fraction * clients) < 1:
        raise ValueError(
            f"attack.fraction = {attack.fraction:g} of {clients} clients is none: raise it, or "
            'write attack.kind = "none"'
        )
    if strategy.bucket > 1 and name not in ROBUST and ":" not in name:
        raise ValueError(
            f'strategy.bucket = {strategy.bucket} with strategy.name = "{name}": a mean of means is the mean; '
            f"write strategy.bucket = 1, or one of {', '.join(ROBUST)}"
        )
    updates = -(-experiment.cohort_size // strategy.bucket)
    needed = least_updates(name, f)
    if updates < needed:
        raise ValueError(
            f'strategy.byzantine = {f} with strategy.name = "{name}" needs {needed} updates or more, and a cohort of '
            f"{experiment.cohort_size} with strategy.bucket = {strategy.bucket} gives {updates}: make the cohort larger, "
            "or byzantine or the bucket smaller"
        )
    if name == "multi-krum" and strategy.keep > updates:
        raise ValueError(f"strategy.keep = {strategy.keep} is more than the {updates} updates of a cohort")


def _adapt(experiment: Experiment) -> None:
    adapt, task = experiment.adapt, experiment.task
    if adapt.method in ("mmd", "deep-coral", "dann", "match") and experiment.local.trainable in ("head", "last:0"):
        raise ValueError(
            f'adapt.method = "{adapt.method}" with local.trainable = "{experiment.local.trainable}": it aligns features '
            'of the trunk, which never changes; write adapt.method = "coral" or "augment", or local.trainable = "all"'
        )
    if adapt.method == "augment" and (adapt.labels == "source" or task.gated or task.trunks != "shared"):
        raise ValueError(
            f'adapt.method = "augment" with adapt.labels = "{adapt.labels}", task.gated = {task.gated} and task.trunks '
            f'= "{task.trunks}": what is the target domain\'s own is learned from its labels, by a plain head; write '
            'adapt.labels = "both", task.gated = false and task.trunks = "shared"'
        )


def _privacy_faults(experiment: Experiment) -> list[str]:
    """Why the experiment's privacy would not hold, or cannot be had: each with the setting, the reason and the way out.

    What only the model can tell (batch normalisation, shared parameters) is refused by `meadow.privacy.dpsgd` when it
    is opened.
    """
    privacy, faults = experiment.privacy, []
    if privacy.unit == "none":
        return []
    setting = f'privacy.unit = "{privacy.unit}"'
    name, cohort = experiment.strategy.name, experiment.cohort
    fits = {
        "example": (PRIVATE, "its clients train more than once a round, or by more than each sample's own loss"),
        "local": (
            tuple(n for n in (*AVERAGES, *PRIVATE) if n != "scaffold"),
            "what its clients send beside the model would leave without noise",
        ),
        "client": (AVERAGES, "clip and noise take the place of its server's half"),
    }
    names, why = fits[privacy.unit]
    if name not in names:
        faults.append(f'{setting} with strategy.name = "{name}": {why}; write one of {", ".join(dict.fromkeys(names))}')
    if cohort.sampling in ("size", "schedule"):
        faults.append(
            f'{setting} with cohort.sampling = "{cohort.sampling}": who takes part must be a function of the seed alone, '
            'which the account knows beforehand; write "poisson" or "fixed"'
        )
    if cohort.stragglers and privacy.unit in ("example", "local"):
        faults.append(
            f"{setting} with cohort.stragglers = {cohort.stragglers:g}: the steps of a round are a public constant; write 0"
        )
    if experiment.strategy.weights == "samples" and (privacy.unit == "client" or "samples" not in privacy.release):
        faults.append(
            f'{setting} with strategy.weights = "samples": how many samples a client has is private, so each counts 1; '
            "leave it out"
        )
    if privacy.unit == "client" and privacy.budgets:
        faults.append(
            f'{setting} with privacy.budgets = "{privacy.budgets}": one noise is added for all clients, so they have one '
            "budget; write privacy.epsilon"
        )
    if privacy.unit == "client" and cohort.quorum > 1 and cohort.sampling == "poisson":
        faults.append(
            f"{setting} with cohort.quorum = {cohort.quorum}: whether a round goes on would tell how many took part; write 1"
        )
    if privacy.unit == "client":
        changed = {
            "strategy.server_lr": experiment.strategy.server_lr != 1,
            "cohort.attempts": cohort.attempts > 1,
            "cohort.over_selection": cohort.over_selection > 0,
            "attack.kind": experiment.attack.kind not in ("none", "label-flip"),
        }
        faults += [
            f"{setting} with {key}: the account is of one cohort a round, clipped, noised and added as it is; leave it out"
            for key, is_on in changed.items()
            if is_on
        ]
    if privacy.unit == "example":
        if privacy.sample_rate == 0:
            faults.append(
                f"{setting} without privacy.sample_rate: it must be a public constant, not a function of each client's "
                "size; write the batch over a size that all may know, for example privacy.sample_rate = 0.05"
            )
        if privacy.denominator == 0 and experiment.local.batch_size == 0:
            faults.append(
                f"{setting} with local.batch_size = 0: the noisy sum would be divided by each client's private size; "
                "write privacy.denominator, the expected batch"
            )
        local = experiment.local
        private = {
            "patience": local.patience > 0,
            "schedule": local.schedule == "plateau",
            "balance": local.balance != "fixed",
            "fisher_on": local.trainable == "fisher" and local.fisher_on == "local",
        }
        faults += [
            f"{setting} with local.{name} = {getattr(local, name)}: it is decided by private samples without any noise; "
            f'leave it out or write privacy.unit = "client"'
            for name, is_on in private.items()
            if is_on
        ]
        if experiment.adapt.method != "none":
            faults.append(
                f'{setting} with adapt.method = "{experiment.adapt.method}": it compares whole batches of private samples, '
                'so no sample\'s share can be clipped; write privacy.unit = "client"'
            )
        if local.trainable == "gradual" and local.gradual_unit == "epochs":
            faults.append(
                f'{setting} with local.gradual_unit = "epochs": a round of DP-SGD has steps and no epochs; write '
                'local.gradual_unit = "rounds"'
            )
    elif experiment.share == "none":
        faults.append(
            f'{setting} with nothing shared (run.placement = "{experiment.run.placement}", strategy.share = '
            f'"{experiment.strategy.share}"): no update leaves, so there is nothing to protect; write privacy.unit = '
            '"none", or "example" if the models themselves are given away'
        )
    elif experiment.run.placement == "pooled":
        faults.append(
            f'{setting} with run.placement = "pooled": there are no updates of clients; write privacy.unit = "example"'
        )
    for target, kind in zip(experiment.task.targets, experiment.task.kinds, strict=False):
        if "balanced" in kind.split():
            faults.append(
                f'{setting} with task.kinds = "{kind}" for the target "{target}": class weights from private labels are '
                "neither clipped nor noised; write public ones, weights W1 W2 ..."
            )
    if experiment.task.public == "train":
        faults.append(
            f'{setting} with task.public = "train": vocabulary and scaling would be learned from private data; name a '
            "public file, or constants"
        )
    return faults
