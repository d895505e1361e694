"""The experiment file's schema: one frozen model per section, and a default for every key.

A method such as FedPer or transfer learning is a preset, a set of values (`meadow/config/presets/`), not a class. Zero or
an empty string means "not set" where a description says so, because TOML and Flower's run configuration have no null.
"""

import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from meadow.config.algorithms import ALGORITHMS


def _listed(value: Any) -> Any:
    """Read "a,b" as a list, because Flower's run configuration and the command line have no lists."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _listed_floats(value: Any) -> Any:
    value = _listed(value)
    if isinstance(value, tuple):
        return tuple(float(v) if isinstance(v, str | int) and not isinstance(v, bool) else v for v in value)
    return value


def _no_such(known: Iterable[str], other: str) -> PydanticCustomError:
    """The error of a pydantic Literal, for a setting that also takes `other`."""
    expected = ", ".join(f"'{name}'" for name in known)
    return PydanticCustomError(
        "literal_error", "Input should be {expected} or {other}", {"expected": expected, "other": other}
    )


def _objects(value: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [name for name in value if ":" not in name]:
        raise ValueError(f'"{wrong[0]}": write module:object, for example "mine:OBJECT"')
    return value


def _path(value: str) -> str:
    """Refuse what no file system takes, which Python's functions for files answer by different exceptions."""
    if "\0" in value or max(len(os.fsencode(part)) for part in value.split("/")) > 255 or len(value) > 4000:
        raise ValueError("no file can have this name: write at most 255 bytes between slashes, and no zero bytes")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Objects = Annotated[Names, AfterValidator(_objects)]
"""A user's own objects, each "module:object"."""
Fractions = Annotated[tuple[float, ...], BeforeValidator(_listed_floats)]
Count = Annotated[int, Field(le=1_000_000)]
"""How many or how often. Beyond this limit, and that of `Units`, a value is a slip: a run would not end, or not begin."""
Units = Annotated[int, Field(le=100_000)]
"""The width of a layer, or the length of a sequence."""
Place = Annotated[str, AfterValidator(_path)]
"""A file or folder."""


class Section(BaseModel):
    """Base of all sections: strict types, unknown keys refused, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Run(Section):
    """`[run]`: the name, the seed, the number of rounds, and where training happens."""

    name: str = Field(
        "experiment", min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*$"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    rounds: int = Field(
        30, ge=1, le=100_000, description="Communication rounds; without federation, blocks of local epochs."
    )
    placement: Literal["federated", "local", "pooled"] = Field(
        "federated",
        description="federated; local: each client trains alone; pooled: all training data in one place (centralised).",
    )
    listeners: Objects = Field((), description="Your own module:object, called at each event (docs/listeners.md).")
    stop_metric: str = Field(
        "",
        description='The validation metric that patience, target and keep = "best" go by: "clients.TARGET.METRIC" (mean '
        'over clients) or "global.TARGET.METRIC" (shared model); empty: the clients\' primary metric of the first target.',
    )
    patience: Count = Field(0, ge=0, description="Stop after so many rounds without a better stop_metric; 0: never.")
    min_delta: float = Field(0.0, ge=0, description="A change of stop_metric up to this counts as none.")
    target: float = Field(0.0, description="Stop when stop_metric is this or better; 0: never.")
    min_rounds: Count = Field(0, ge=0, description="Do not stop before this round.")
    keep: Literal["last", "best"] = Field(
        "last", description="Score, report and keep the last round's model, or that of the best round by stop_metric."
    )

    @field_validator("stop_metric")
    @classmethod
    def _known_place(cls, value: str) -> str:
        if value and not re.fullmatch(r"(clients|global)\..+\.[^.]+", value):
            raise ValueError(
                f'"{value}": write clients.TARGET.METRIC or global.TARGET.METRIC, e.g. "clients.digit.loss"'
            )
        return value

    @property
    def selects(self) -> bool:
        """Whether validation metrics decide when the run stops or which model it keeps."""
        return bool(self.patience or self.target or self.keep == "best")


class Task(Section):
    """`[task]`: data set, targets, model and initial weights. `docs/data.md` shows the settings for each format."""

    dataset: str = Field(
        "digits",
        min_length=1,
        description="digits, printed-digits or stars; a torchvision data set's name; ImageFolder, image-table, arrays, "
        "text, characters or tabular for files under root; hub:NAME; or a user's module:object.",
    )
    root: Place = Field("", description="The folder of the data files.")
    download: bool = Field(False, description="Let torchvision download a data set that is not under root.")
    train: Place = Field(
        "", description="File or folder of training data, relative to root; empty: the format's default."
    )
    test: Place = Field("", description="The same for the global test set; empty: the default, or test_fraction.")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="Share held out as the global test set if there is none.")
    inputs: Names = Field((), description="The input columns; in tables each with its constants (docs/data.md).")
    targets: Names = Field(("digit", "slant"), min_length=1, description="The targets of the experiment.")
    kinds: Names = Field((), description="Type of each target: class, labels, value or quantiles (docs/data.md).")
    client: str = Field("", description="The column with each sample's client, for partition.law = natural.")
    public: Place = Field(
        "", description='Public file for vocabulary, categories and scaling; "train": the training file is public.'
    )
    learn: str = Field("all", description='"all" targets at once (multi-task), or only the "first" or a named one.')
    model: str = Field("mlp", min_length=1, description="A model of docs/models.md, or a user's module:object.")
    hidden: Units = Field(64, ge=2, description="Units of the hidden layers, or channels of the CNN (docs/models.md).")
    norm: Literal["", "group"] = Field("", description='"group": every batch normalisation is replaced by a GroupNorm.')
    trunks: Literal["shared", "cross-stitch"] = Field(
        "shared", description='"cross-stitch": one trunk for each learned target, coupled after each layer.'
    )
    gated: bool = Field(False, description="Put a sigmoid gate on the trunk's features before each head.")
    pretrained: Place = Field(
        "",
        description='Empty: random start; "source": a model trained on task.source; "DEFAULT": torchvision\'s '
        "published weights; else a .safetensors file.",
    )
    image_size: int = Field(
        0, ge=0, le=4096, description="Resize and crop images to squares of this side, in pixels; 0: off."
    )
    channels: Literal["", "grey", "rgb", "bgr"] = Field("", description="Colour channels to convert to; empty: off.")
    mean: Fractions = Field((), description="Mean subtracted from each channel, for pixels in 0..1; empty: none.")
    std: Fractions = Field((), description="Standard deviation that each channel is then divided by; empty: none.")
    augment: Names = Field((), description='Image augmentation: "flip", "crop 4", "rotate 15", "jitter 0.2", ...')
    tokens: str = Field("hash", description="Tokeniser of texts: words, hash, chars, or transformers:NAME.")
    vocabulary: Place = Field("", description="A file with one token per line, for tokens = words or chars.")
    vocabulary_size: Count = Field(10000, ge=3, description="Most distinct tokens, with padding and the unknown token.")
    length: Units = Field(128, ge=1, description="Tokens kept of each text; characters per window.")
    source: Literal["printed-digits"] = "printed-digits"
    source_samples: Count = Field(4000, ge=100, description="Samples generated to train the source model.")
    source_epochs: Count = Field(10, ge=1)
    target_weights: Fractions = Field((), description="Loss weight of each learned target, in order; empty: all 1.")

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.kinds and len(self.kinds) != len(self.targets):
            raise ValueError(
                f"kinds has {len(self.kinds)} entries for {len(self.targets)} targets {list(self.targets)}: "
                "give one per target, or none"
            )
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}: give one of each per channel")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std = {list(self.std)}: give positive numbers")
        return self


class Partition(Section):
    """`[partition]`: how the training samples are divided among the clients (docs/splits.md)."""

    law: Literal[
        "iid",
        "dirichlet",
        "dirichlet-class",
        "dirichlet-balanced",
        "shards",
        "labels",
        "quantity",
        "natural",
        "feature-shift",
    ] = "dirichlet"
    clients: Count = Field(20, ge=0, description="Number of clients; 0, with law = natural: all clients in the data.")
    alpha: float = Field(3.0, gt=0, description="Concentration of the Dirichlet laws; the lower, the more uneven.")
    shards: Count = Field(2, ge=1, description="Shards per client, for law = shards.")
    labels: Count = Field(2, ge=1, description="Labels per client, for law = labels.")
    noise: float = Field(0.1, gt=0, description="Variance of the last client's noise, for law = feature-shift.")
    min_size: Count = Field(
        10,
        ge=3,
        description="Fewest samples per client: splits with fewer are drawn again; natural omits such clients.",
    )
    holds: Names = Field(
        (),
        description='Which clients have labels of which targets; empty: all; "1": one target each; or "digit 0-9", ...',
    )
    parts: Fractions = Field((0.6, 0.2, 0.2), description="Train, validation and test fraction of each client.")

    @model_validator(mode="after")
    def _parts_add_up(self) -> Self:
        if len(self.parts) != 3 or abs(sum(self.parts) - 1) > 1e-9 or min(self.parts) <= 0:
            raise ValueError(f"parts = {list(self.parts)}: give three positive fractions that add up to 1")
        if self.clients == 0 and self.law != "natural":
            raise ValueError(
                f'clients = 0 with law = "{self.law}": only law = "natural" takes the number of clients from the data; '
                "write the number of clients"
            )
        return self


class Cohort(Section):
    """`[cohort]`: which clients take part in a round, and how many must reply."""

    fraction: float = Field(1.0, gt=0, le=1, description="Share of the clients that take part in a round.")
    size: Count = Field(0, ge=0, description="Clients per round; 0: use the fraction.")
    sampling: Literal["fixed", "poisson", "size", "schedule"] = Field(
        "fixed",
        description="fixed: that many, without replacement; poisson: each client with probability size / clients; size: "
        "that many, with chances in proportion to training samples; schedule: from a file.",
    )
    schedule: Place = Field("", description="For sampling = schedule: a file with one line of clients per round.")
    quorum: Count = Field(1, ge=0, description="A round with fewer valid replies than this is discarded.")
    attempts: int = Field(
        1, ge=1, le=1_000, description="Times a round is tried, each with a new cohort, before the run stops."
    )
    timeout: float = Field(
        600.0,
        gt=0,
        le=10_000_000,
        description="Seconds after which a missing reply counts as failed; on Ray each client's, from its turn on.",
    )
    max_norm: float = Field(0.0, ge=0, description="Updates with a larger L2 norm are refused; 0: no limit.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Simulated: probability that a cohort's client never replies.")
    stragglers: float = Field(
        0.0, ge=0, lt=1, description="Simulated: probability that a client does part of its steps."
    )
    over_selection: float = Field(0.0, ge=0, description="Share of extra clients to ask; the first replies are used.")


class Local(Section):
    """`[local]`: how a client trains within a round. `docs/training.md` gives formulas and sources."""

    epochs: Count = Field(3, ge=1, description="Local epochs per round.")
    steps: Count = Field(0, ge=0, description="Optimiser steps per round; 0: use the epochs.")
    batch_size: Count = Field(16, ge=0, description="0: the full batch.")
    optimizer: Literal["sgd", "adagrad", "rmsprop", "adam", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0, description="Learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd and rmsprop.")
    nesterov: bool = Field(False, description="Use Nesterov momentum, for sgd.")
    weight_decay: float = Field(0.0, ge=0)
    trunk_lr_factor: float = Field(1.0, gt=0, description="The trunk's learning rate is lr times this.")
    depth_lr_factor: float = Field(1.0, gt=0, description="Further factor for each layer below the heads.")
    lr_factors: Names = Field((), description='Further factors by prefix of array names: "trunk.linear1 0.1", ...')
    schedule: Literal["constant", "step", "cosine", "plateau"] = Field(
        "constant", description="How the learning rate changes from round to round."
    )
    schedule_every: Count = Field(10, ge=1, description="Rounds between drops of the rate, for schedule = step.")
    schedule_factor: float = Field(0.1, gt=0, lt=1, description="Factor of each drop, for schedule = step or plateau.")
    schedule_patience: Count = Field(
        3, ge=0, description="Rounds without a better validation loss before plateau drops."
    )
    warmup: Count = Field(0, ge=0, description="Rounds of linear warm-up, with any schedule.")
    clip_norm: float = Field(0.0, ge=0, description="Clip a batch's gradient to this L2 norm; 0: no clipping.")
    patience: Count = Field(
        0, ge=0, description="Stop after so many epochs without a better validation loss and keep the best; 0: off."
    )
    statistics: Literal["batch", "kept"] = Field(
        "batch",
        description="Batch normalisation: batch: normalise by batch statistics and update the running ones; kept: freeze "
        "the running statistics that came with the model and use them.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of a class label that is spread over all classes."
    )
    balance: Literal["fixed", "uncertainty", "dwa", "gradnorm", "pcgrad"] = Field(
        "fixed", description="Multi-task loss weighting, on top of task.target_weights."
    )
    dwa_temperature: float = Field(2.0, gt=0, description="Temperature of balance = dwa; high: even weights.")
    gradnorm_alpha: float = Field(1.5, ge=0, description="How strongly balance = gradnorm speeds up slow targets.")
    gradnorm_lr: float = Field(0.025, gt=0, description="Learning rate of gradnorm's weights.")
    trainable: str = Field("all", description="What is trained: all, head, last:N, gradual, lora, adapters or fisher.")
    gradual_every: Count = Field(1, ge=1, description="Rounds or epochs per stage of trainable = gradual.")
    gradual_unit: Literal["rounds", "epochs"] = "rounds"
    gradual_modules: Count = Field(1, ge=1, description="Modules of the trunk that each stage unfreezes, from the top.")
    gradual_divide: float = Field(1.0, ge=1, description="Each stage divides the learning rate by this.")
    lora_rank: Units = Field(4, ge=1, description="Rank of the LoRA factors.")
    lora_alpha: float = Field(4.0, gt=0, description="The low-rank term is multiplied by lora_alpha / lora_rank.")
    lora_share: Literal["both", "b", "a"] = Field(
        "both", description='"b": A is frozen (FFA-LoRA); "a": A is shared and B personal (FedSA-LoRA).'
    )
    adapter_size: Units = Field(8, ge=1, description="Units of an adapter's bottleneck.")
    adapter_place: Literal["series", "parallel"] = "series"
    fisher_fraction: float = Field(0.1, gt=0, le=1, description="Share of the trunk's weights that fisher trains.")
    fisher_on: Literal["source", "local"] = Field("source", description="The data that these weights are chosen by.")
    fisher_samples: Count = Field(256, ge=1, description="Most samples that a Fisher information is computed from.")

    @field_validator("trainable")
    @classmethod
    def _known_trainable(cls, value: str) -> str:
        if not re.fullmatch(r"all|head|last:\d+|gradual|lora|adapters|fisher", value):
            raise ValueError("write all, head, last:N (for example last:2), gradual, lora, adapters or fisher")
        return value

    @field_validator("lr_factors")
    @classmethod
    def _known_factors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not re.fullmatch(r"\S+ +[0-9.eE+-]+", entry) or not float(entry.split()[1]) > 0:
                raise ValueError(f'"{entry}": write the beginning of a name and a positive factor: "trunk.linear1 0.1"')
        return value

    @model_validator(mode="after")
    def _optimizer_parts_agree(self) -> Self:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError(
                f'nesterov = true with optimizer = "{self.optimizer}" and momentum = {self.momentum}: Nesterov\'s '
                'momentum is one of sgd; write optimizer = "sgd" and momentum = 0.9'
            )
        return self


class Anchor(Section):
    """`[anchor]`: regularisation of local training towards a reference model. docs/training.md has the formulas."""

    to: Literal["start", "received"] = Field(
        "start", description="Reference model: the one before round 1, or the one that the client received this round."
    )
    l2: float = Field(0.0, ge=0, description="Weight of half the squared L2 distance to the reference weights.")
    ewc: float = Field(0.0, ge=0, description="The same, each weight scaled by the source task's Fisher information.")
    kl: float = Field(0.0, ge=0, description="Weight of the cross-entropy to the reference model's outputs.")
    distill: float = Field(0.0, ge=0, le=1, description="Distillation's share of the loss.")
    temperature: float = Field(2.0, gt=0, description="Distillation's temperature.")
    teacher: Place = Field("", description="A .safetensors file with another model whose outputs kl and distill use.")
    teacher_model: str = Field("", description="The teacher's task.model; empty: the same.")
    teacher_hidden: Units = Field(0, ge=0, description="The teacher's task.hidden; 0: the same.")


class Adapt(Section):
    """`[adapt]`: domain adaptation from labelled samples of a source domain. docs/training.md has the formulas."""

    method: Literal["none", "source-only", "mmd", "coral", "deep-coral", "dann", "match", "augment"] = "none"
    weight: float = Field(1.0, gt=0, description="Weight of the alignment term in the loss.")
    labels: Literal["source", "both"] = Field(
        "source", description='"source": learn from source labels only; "both": also from the clients\' labels.'
    )
    where: Literal["public", "clients"] = Field(
        "public", description="public: every client has all source samples; clients: each has a share."
    )
    dataset: str = Field("", description="The source domain's task.dataset; empty: task.source.")
    root: Place = Field("", description="Its task.root.")
    train: Place = Field("", description="Its task.train.")
    targets: Names = Field((), description="Its columns for task.targets, in order; empty: the same names.")
    widths: Fractions = Field(
        (0.25, 0.5, 1.0, 2.0, 4.0), min_length=1, description="MMD kernel widths / median squared distance."
    )
    ridge: float = Field(1.0, ge=0, description="Added to the covariances' diagonals by method = coral.")
    dann_gamma: float = Field(10.0, gt=0, description="How fast DANN's gradient reversal reaches full strength.")
    dann_hidden: Units = Field(64, ge=1, description="Units of DANN's domain classifier.")

    @model_validator(mode="after")
    def _widths_are_positive(self) -> Self:
        if min(self.widths) <= 0:
            raise ValueError(f"widths = {list(self.widths)}: give positive numbers")
        return self


SHARES = ("all", "none", "body", "head", "all-but-norms", "trainable")
"""The named sets of `strategy.share`; anything else is patterns over parameter names."""


class Strategy(Section):
    """`[strategy]`: what is shared and how updates are combined. docs/strategies.md lists each algorithm's settings."""

    name: str = Field("fedavg", description="An algorithm of docs/strategies.md, or a user's module:object.")
    share: str = Field(
        "all",
        min_length=1,
        description="Arrays shared in a federated run: all, none, body (the trunk), head, all-but-norms, trainable, or "
        "patterns over parameter names (trunk.linear1.*,heads.*); other trained arrays are personal.",
    )
    weights: Literal["", "samples", "equal"] = Field(
        "", description="Weight of a client in a mean: its samples, or 1; empty: as in the algorithm's paper."
    )
    stages: Objects = Field((), description="Your own stages of updates, module:OBJECT, in order (docs/stages.md).")
    server_lr: float = Field(1.0, gt=0, description="Server learning rate: factor of the mean change.")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="FedAvgM's beta.")
    beta1: float = Field(0.9, ge=0, lt=1, description="beta1 of FedAdam, FedYogi, FedAdagrad.")
    beta2: float = Field(0.99, ge=0, lt=1, description="beta2 of FedAdam and FedYogi.")
    tau: float = Field(1e-3, gt=0, description="tau of FedAdam, FedYogi, FedAdagrad, added to the denominator.")
    mu: float = Field(0.1, ge=0, description="Weight of the proximal term of FedProx, or MOON's contrastive term.")
    temperature: float = Field(0.5, gt=0, description="Temperature of MOON.")
    alpha: float = Field(0.1, gt=0, description="alpha of FedDyn.")
    pull: float = Field(1.0, ge=0, description="lambda of Ditto and pFedMe: pull towards the shared model.")
    mix: float = Field(0.5, ge=0, le=1, description="APFL: initial share of the personal model.")
    mix_lr: float = Field(0.0, ge=0, description="APFL: learning rate of that share; 0: fixed.")
    head_epochs: Count = Field(0, ge=0, description="FedRep, FedAlt: epochs for the personal arrays; 0: local.epochs.")
    body_epochs: Count = Field(0, ge=0, description="FedRep, FedAlt: epochs for the shared arrays; 0: local.epochs.")
    inner_steps: Count = Field(5, ge=1, description="pFedMe: steps on each batch.")
    inner_lr: float = Field(0.0, ge=0, description="pFedMe's personal learning rate; Per-FedAvg's alpha; 0: local.lr.")
    byzantine: Count = Field(
        0, ge=0, description="Byzantine clients per cohort that Krum, Multi-Krum and Bulyan assume."
    )
    keep: Count = Field(0, ge=0, description="Updates that Multi-Krum averages; 0: all but byzantine.")
    trim: float = Field(0.2, ge=0, lt=0.5, description="Share of values that the trimmed mean drops at each end.")
    bucket: Count = Field(1, ge=1, description="Bucketing: updates averaged at random before a robust rule; 1: off.")
    radius: float = Field(1.0, gt=0, description="L2 norm to which centred clipping and norm-bound clip an update.")
    iterations: Count = Field(10, ge=1, description="Iterations of centred clipping and the geometric median.")
    smoothing: float = Field(1e-6, gt=0, description="Smallest distance in the geometric median's weights.")

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        if name not in ALGORITHMS and ":" not in name:
            raise _no_such(ALGORITHMS, "your own module:object")
        return name

    @field_validator("share")
    @classmethod
    def _known_share(cls, share: str) -> str:
        if share not in SHARES and not any(sign in share for sign in ".*"):
            raise _no_such(SHARES, "patterns over parameter names")
        return share


class Attack(Section):
    """`[attack]`: simulated malicious clients, drawn from the seed, to test a defence."""

    kind: Literal["none", "label-flip", "sign-flip", "replacement", "ipm", "alie", "noise"] = "none"
    fraction: float = Field(0.2, gt=0, lt=1, description="Share of all clients that attack.")
    scale: float = Field(1.0, ge=0, description="Strength (docs/strategies.md); replacement, alie: 0 for the paper's.")


RELEASES = ("samples", "loss", "metrics", "labels", "hashes", "errors")


class Privacy(Section):
    """`[privacy]`: the unit of protection, the budget, and what may be released unprotected (`docs/privacy.md`)."""

    unit: Literal["none", "example", "client", "local"] = Field(
        "none",
        description="none; example: DP-SGD at each client; client: clipped updates, noise at the server; local: noise at "
        "each client.",
    )
    epsilon: float = Field(0.0, ge=0, description="Privacy budget of each unit for the whole run; 0: not set.")
    noise_multiplier: float = Field(0.0, ge=0, description="Noise deviation / clip; 0: calibrated to epsilon.")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of (epsilon, delta)-DP.")
    clip: float = Field(1.0, gt=0, description="Clipping norm (L2) of per-example gradients, or of client updates.")
    accountant: Literal["pld", "rdp", "prv"] = "pld"
    sample_rate: float = Field(
        0.0, ge=0, le=1, description="unit = example: sampling probability of each example per step, a public constant."
    )
    denominator: float = Field(0.0, ge=0, description="Divisor of the noisy sum; 0: batch_size, or expected cohort.")
    grad_sample: Literal["auto", "book", "hooks", "loop"] = Field(
        "auto",
        description="unit = example: how per-example gradients are clipped and summed: book: one pass (ghost clipping with "
        "book-keeping); hooks: Opacus; loop: one pass per example; auto: by the model.",
    )
    adaptive_clip: bool = Field(False, description="unit = client: let clip follow a quantile of update norms.")
    clip_quantile: float = Field(0.5, ge=0, le=1, description="That quantile: share of updates not clipped.")
    clip_rate: float = Field(0.2, gt=0, description="Learning rate of the adaptive clipping norm.")
    clip_count_noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of the noise on the count of unclipped updates; 0: a twentieth of the denominator.",
    )
    budgets: str = Field(
        "",
        description="Budget per client: empty: privacy.epsilon; uniform A B; choice A B ...; file PATH, a CSV with the "
        "columns client and epsilon.",
    )
    on_exhausted: Literal["leave", "stop"] = Field(
        "leave",
        description="When a client's next release would exceed its budget: the client leaves, or the run stops.",
    )
    release: Names = Field(
        (),
        description="What clients report unprotected under DP: any of samples, loss, metrics, labels, hashes, errors.",
    )

    @field_validator("accountant", mode="before")
    @classmethod
    def _no_gdp(cls, value: Any) -> Any:
        if value == "gdp":
            raise ValueError(
                "the GDP approximation underestimates epsilon (1.62 where 2.85 is true); write pld, rdp or prv"
            )
        return value

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if wrong := [name for name in self.release if name not in RELEASES]:
            raise ValueError(f"release = {wrong}: give any of {', '.join(RELEASES)}")
        if self.unit == "none":
            for name in ("epsilon", "noise_multiplier", "budgets"):
                if value := getattr(self, name):
                    raise ValueError(
                        f'{name} = {value} with unit = "none" protects nothing: write unit = "example", "client" or '
                        '"local", or leave it out'
                    )
        elif not (self.epsilon or self.noise_multiplier or self.budgets):
            raise ValueError(
                f'unit = "{self.unit}" with neither epsilon nor noise_multiplier: write a budget such as epsilon = '
                "3.0, which sets the noise, or noise_multiplier"
            )
        if self.adaptive_clip and self.unit != "client":
            raise ValueError(
                f'adaptive_clip = true with unit = "{self.unit}": adaptive clipping works on client updates only; '
                'write unit = "client", or adaptive_clip = false'
            )
        kind, *words = self.budgets.split() or [""]
        numbers = [float(word) for word in words if _is_positive(word)]
        is_drawn = len(numbers) == len(words) > 0 and (
            kind == "choice" or (kind == "uniform" and len(numbers) == 2 and numbers[0] <= numbers[1])
        )
        if self.budgets and not is_drawn and not (kind == "file" and words):
            raise ValueError(
                f'budgets = "{self.budgets}": write "uniform 1 8", "choice 1 2 4", with positive numbers, or "file '
                'budgets.csv"'
            )
        return self


def _is_positive(word: str) -> bool:
    try:
        return 0 < float(word) < float("inf")
    except ValueError:
        return False


class Evaluate(Section):
    """`[evaluate]`: what is measured, and how often."""

    every: Count = Field(1, ge=1, description="Evaluate in every n-th round, and always after the last.")
    on: Names = Field(
        ("global", "clients"),
        description="Any of global, clients, source (the source task before and after the run: forgetting).",
    )
    validation: bool = Field(True, description="Also score models on clients' validation parts, where test parts are.")
    sample: Count = Field(0, ge=0, description="Clients evaluated at the end, drawn from the seed; 0: all.")
    fine_tune_epochs: Count = Field(0, ge=0, description="Also evaluate clients' models after this many local epochs.")
    folds: int = Field(0, ge=0, le=1_000, description="Number of cross-validation folds; 0: none.")
    fold: int = Field(
        0, ge=0, le=1_000, description="k: use the k-th fold as each client's test set; 0: use partition.parts."
    )
    unseen: float = Field(
        0.0, ge=0, lt=1, description="Share of clients kept out of all cohorts, evaluated at the end."
    )

    @model_validator(mode="after")
    def _known_places(self) -> Self:
        if wrong := set(self.on) - {"global", "clients", "source"}:
            raise ValueError(f'on = {sorted(wrong)}: give "global", "clients", "source" or several of them')
        if self.folds == 1 or self.fold > self.folds:
            raise ValueError(
                f"folds = {self.folds} with fold = {self.fold}: give 2 folds or more (0 for none), and a fold among them"
            )
        return self


class Engine(Section):
    """`[engine]`: how the run is executed. `threads`, `exact` and `device` change a result's last bits, `precision` more;
    other settings change nothing."""

    name: Literal["inline", "ray", "processes"] = "ray"
    workers: int = Field(
        0, ge=0, le=10_000, description="Ray actors, or SuperNodes; 0: one actor per core, or four SuperNodes."
    )
    threads: int = Field(1, ge=1, le=1_000, description="Threads per worker; one is fastest on a shared machine.")
    exact: bool = Field(
        True,
        description="Bit-reproducible: a client's result does not depend on which clients it is trained with; false: faster "
        "kernels (docs/speed.md).",
    )
    trainer: Literal["auto", "loop", "direct", "fused", "stacked"] = Field(
        "auto",
        description="Training implementation: auto: the fastest that can train this model; or this one (docs/speed.md).",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Device for training and evaluation.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of matrix products in trainer = stacked on a GPU; all else is float32."
    )
    state_memory: int = Field(
        1024, ge=0, le=100_000_000, description="Megabytes of client states in a machine's memory; the rest is on disk."
    )
    address: str = Field("", description='Ray cluster to join, "HOST:6379" or "auto"; empty: Ray on this machine.')


class Experiment(Section):
    """One experiment, complete. The same experiment gives the same bits on every engine."""

    run: Run = Field(default_factory=Run)
    task: Task = Field(default_factory=Task)
    partition: Partition = Field(default_factory=Partition)
    cohort: Cohort = Field(default_factory=Cohort)
    local: Local = Field(default_factory=Local)
    anchor: Anchor = Field(default_factory=Anchor)
    adapt: Adapt = Field(default_factory=Adapt)
    strategy: Strategy = Field(default_factory=Strategy)
    attack: Attack = Field(default_factory=Attack)
    privacy: Privacy = Field(default_factory=Privacy)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    engine: Engine = Field(default_factory=Engine)

    @property
    def learned(self) -> tuple[str, ...]:
        """The targets that the model has a head for."""
        if self.task.learn == "all":
            return self.task.targets
        return (self.task.targets[0] if self.task.learn == "first" else self.task.learn,)

    @property
    def share(self) -> str:
        """What is shared: `strategy.share` in a federated run; "none" if local, "trainable" if pooled."""
        return {"federated": self.strategy.share, "local": "none", "pooled": "trainable"}[self.run.placement]

    @property
    def participants(self) -> int:
        """How many clients may be in a cohort: all but the rounded share `evaluate.unseen`."""
        return self.partition.clients - round(self.evaluate.unseen * self.partition.clients)

    @property
    def cohort_size(self) -> int:
        """How many clients a round should have; for Poisson sampling the expected number."""
        if self.run.placement == "local":
            return self.partition.clients
        return self.cohort.size or max(1, round(self.cohort.fraction * self.participants))
