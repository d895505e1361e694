"""The experiment file's schema: one frozen model per section, every key with a default, every combination checked.

An `Experiment` is a point on independent axes. A method such as FedPer or transfer learning is a preset of values on
them (`meadow/config/presets/`), not a class. Zero or an empty string means "not set" where the text of a key says so,
because TOML and Flower's run configuration have no null.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from meadow.config import rules
from meadow.config.algorithms import ALGORITHMS


def _listed(value: Any) -> Any:
    """Read "a,b" as a list: Flower's run configuration and the command line carry no lists. A number is a list of one."""
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


def _no_such(value: str, known: Iterable[str], other: str) -> PydanticCustomError:
    """What pydantic says of a Literal, for a name that may also be something else."""
    expected = ", ".join(f"'{name}'" for name in known)
    return PydanticCustomError(
        "literal_error", "Input should be {expected} or {other}", {"expected": expected, "other": other}
    )


def _objects(value: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [name for name in value if ":" not in name]:
        raise ValueError(f'"{wrong[0]}": write module:object, for example "mine:OBJECT"')
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Objects = Annotated[Names, AfterValidator(_objects)]
"""A user's own objects, each "module:object"."""
Fractions = Annotated[tuple[float, ...], BeforeValidator(_listed_floats)]


class Section(BaseModel):
    """What every section has in common: strict types, no unknown keys, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Run(Section):
    """`[run]`: what the run is called, what it draws from, how long it goes on, and where training happens."""

    name: str = Field("experiment", min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0, lt=2**63)
    rounds: int = Field(30, ge=1, description="Communication rounds; without federation, spells of local epochs.")
    placement: Literal["federated", "local", "pooled"] = Field(
        "federated", description="federated; local: each client alone; pooled: all training data in one place."
    )
    listeners: Objects = Field((), description="Your own module:object, told what happens (docs/listeners.md).")


class Task(Section):
    """`[task]`: what is learned, by which model, from which start. `docs/data.md` shows the lines for each format."""

    dataset: str = Field(
        "digits",
        min_length=1,
        description="digits, printed-digits or stars; a torchvision data set's name; ImageFolder, image-table, arrays, "
        "text, characters or tabular for files under root; hub:NAME; or a user's module:object.",
    )
    root: str = Field("", description="The folder of the data's files.")
    download: bool = Field(False, description="Let torchvision fetch a data set that is not under root.")
    train: str = Field(
        "", description="File or folder of the training pool, relative to root; empty: the format's own."
    )
    test: str = Field("", description="The same for the global test set; empty: test_fraction of the training file.")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="Share held out as the global test set if test is empty.")
    inputs: Names = Field((), description="The input columns; for tables each with its constants (docs/data.md).")
    targets: Names = Field(("digit", "slant"), min_length=1, description="The targets of the experiment.")
    kinds: Names = Field((), description="Of each target: class, labels, value or quantiles, with its constants.")
    client: str = Field("", description="The column that names the sample's client, for partition.law = natural.")
    public: str = Field(
        "", description='A public file to learn vocabulary, categories and scaling from; "train" declares that public.'
    )
    learn: str = Field(
        "all", description='"all": every target at once (multi-task); "first" or a target\'s name: that one alone.'
    )
    model: str = Field("mlp", min_length=1, description="A model of docs/models.md, or a user's module:object.")
    hidden: int = Field(64, ge=2, description="Units of the hidden layers of the MLP; channels of the CNN's trunk.")
    norm: Literal["", "group"] = Field("", description='"group": every batch normalisation is made a GroupNorm.')
    trunks: Literal["shared", "cross-stitch"] = Field(
        "shared", description='"cross-stitch": a trunk for each learned target, coupled after each layer.'
    )
    gated: bool = Field(False, description="A sigmoid gate over the trunk's features in front of each head.")
    pretrained: str = Field(
        "",
        description='Empty: random start; "source": a model trained on task.source; "DEFAULT": torchvision\'s '
        "published weights; else a .safetensors file.",
    )
    image_size: int = Field(0, ge=0, description="Images are resized and cropped to this square; 0: as they are.")
    channels: Literal["", "grey", "rgb", "bgr"] = Field(
        "", description="Colour channels of images; empty: as they are."
    )
    mean: Fractions = Field((), description="Subtracted from each channel, in units of 0..1; empty: nothing.")
    std: Fractions = Field((), description="Each channel is divided by this after that; empty: nothing.")
    augment: Names = Field((), description='Of training images: "flip", "crop 4", "rotate 15", "jitter 0.2", ...')
    tokens: str = Field("hash", description="words, hash, chars, or transformers:NAME: how text becomes numbers.")
    vocabulary: str = Field("", description="A file with one token a line, for tokens = words or chars.")
    vocabulary_size: int = Field(10000, ge=3, description="Tokens at most, the padding and the unknown one included.")
    length: int = Field(128, ge=1, description="Tokens of a text that are kept; characters of a window.")
    source: Literal["printed-digits"] = "printed-digits"
    source_samples: int = Field(4000, ge=100, description="Samples made for training the source model.")
    source_epochs: int = Field(10, ge=1)
    target_weights: Fractions = Field((), description="Weight of each learned target's loss, in order; empty: all 1.")

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.kinds and len(self.kinds) != len(self.targets):
            raise ValueError(
                f"kinds has {len(self.kinds)} entries for {len(self.targets)} targets {list(self.targets)}: "
                "give one each, or none"
            )
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}: give one each a channel")
        if self.std and min(self.std) <= 0:
            raise ValueError(f"std = {list(self.std)}: give positive numbers")
        return self


class Partition(Section):
    """`[partition]`: how the training samples are dealt to the clients. The laws: `meadow/tasks/splits/laws.py`,
    docs/splits.md."""

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
    clients: int = Field(20, ge=0, description="0, for law = natural: all that the data has.")
    alpha: float = Field(3.0, gt=0, description="Concentration of the Dirichlet laws: low is uneven.")
    shards: int = Field(2, ge=1, description="Shards a client, for law = shards.")
    labels: int = Field(2, ge=1, description="Labels a client, for law = labels.")
    noise: float = Field(0.1, gt=0, description="Variance of the last client's noise, for law = feature-shift.")
    min_size: int = Field(
        10,
        ge=3,
        description="A draw that gives a client fewer samples is drawn again; natural leaves such clients out.",
    )
    holds: Names = Field(
        (), description='Which client holds which targets: empty: all; "1": that many each; or "digit 0-9", ...'
    )
    parts: Fractions = Field((0.6, 0.2, 0.2), description="Train, validation and test fraction of each client.")

    @model_validator(mode="after")
    def _parts_add_up(self) -> Self:
        if len(self.parts) != 3 or abs(sum(self.parts) - 1) > 1e-9 or min(self.parts) <= 0:
            raise ValueError(f"parts = {list(self.parts)}: give three positive fractions that add up to 1")
        if self.clients == 0 and self.law != "natural":
            raise ValueError(
                f'clients = 0 with law = "{self.law}": only law = "natural" takes the number of clients from the data; '
                "write how many there are"
            )
        return self


class Cohort(Section):
    """`[cohort]`: which clients take part in a round, and how many of them must."""

    fraction: float = Field(1.0, gt=0, le=1)
    size: int = Field(0, ge=0, description="Clients a round; 0: use the fraction.")
    sampling: Literal["fixed", "poisson", "size", "schedule"] = Field(
        "fixed",
        description="fixed: so many, without replacement; poisson: each with probability size / clients; size: so many, "
        "the chance of each by its training samples; schedule: as the file says.",
    )
    schedule: str = Field("", description="File with one line a round: the clients that take part, for schedule.")
    quorum: int = Field(1, ge=0, description="A round with fewer good replies than this is void.")
    attempts: int = Field(1, ge=1, description="How often a round is tried, each time with a new cohort.")
    timeout: float = Field(600.0, gt=0, description="Seconds after which a missing reply counts as failed.")
    max_norm: float = Field(0.0, ge=0, description="A reply whose update is longer than this is refused; 0: none is.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Simulated: chance that a client of the cohort never answers.")
    stragglers: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Simulated: chance that a client of the cohort gets through part of its steps only.",
    )
    over_selection: float = Field(
        0.0, ge=0, description="Ask this share more clients than the cohort, and take the first replies."
    )


class Local(Section):
    """`[local]`: how a client trains within one round. `docs/training.md` gives each setting's formula and source."""

    epochs: int = Field(3, ge=1)
    steps: int = Field(0, ge=0, description="Optimiser steps a round; 0: use the epochs.")
    batch_size: int = Field(16, ge=0, description="0: the full batch.")
    optimizer: Literal["sgd", "adagrad", "rmsprop", "adam", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="Of sgd and rmsprop.")
    nesterov: bool = Field(False, description="Nesterov's momentum, for sgd.")
    weight_decay: float = Field(0.0, ge=0)
    trunk_lr_factor: float = Field(1.0, gt=0, description="The trunk's learning rate is lr times this.")
    depth_lr_factor: float = Field(1.0, gt=0, description="And times this once for each layer below the heads.")
    lr_factors: Names = Field((), description='And times these for named parts: "trunk.linear1 0.1", ...')
    schedule: Literal["constant", "step", "cosine", "plateau"] = Field(
        "constant", description="How the rate changes from round to round."
    )
    schedule_every: int = Field(10, ge=1, description="Rounds between the drops of schedule = step.")
    schedule_factor: float = Field(
        0.1, gt=0, lt=1, description="What a drop of step or plateau multiplies the rate by."
    )
    schedule_patience: int = Field(
        3, ge=0, description="Rounds without a better validation loss that schedule = plateau waits for."
    )
    warmup: int = Field(0, ge=0, description="Rounds in which the rate rises to its value, under any schedule.")
    clip_norm: float = Field(0.0, ge=0, description="A batch's gradient is scaled down to this length; 0: as it is.")
    patience: int = Field(
        0, ge=0, description="Stop after so many epochs without a better validation loss, keep the best; 0: never."
    )
    statistics: Literal["batch", "kept"] = Field(
        "batch",
        description="Batch normalisation that learns takes each batch's statistics and moves its own; kept: its own, "
        "as they came with the model.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of a class label spread over all classes.")
    balance: Literal["fixed", "uncertainty", "dwa", "gradnorm", "pcgrad"] = Field(
        "fixed", description="How several targets' losses are weighed, beside task.target_weights."
    )
    dwa_temperature: float = Field(2.0, gt=0, description="Of balance = dwa: high is even.")
    gradnorm_alpha: float = Field(1.5, ge=0, description="Of balance = gradnorm: how hard slow targets are pushed.")
    gradnorm_lr: float = Field(0.025, gt=0, description="The rate at which gradnorm's weights move.")
    trainable: str = Field(
        "all", description="all, head, last:N, gradual, lora, adapters or fisher: what training changes."
    )
    gradual_every: int = Field(1, ge=1, description="Rounds or epochs that a stage of trainable = gradual lasts.")
    gradual_unit: Literal["rounds", "epochs"] = "rounds"
    gradual_modules: int = Field(1, ge=1, description="Modules of the trunk that each stage adds, from the top.")
    gradual_divide: float = Field(1.0, ge=1, description="Each stage divides the rate by this.")
    lora_rank: int = Field(4, ge=1)
    lora_alpha: float = Field(4.0, gt=0, description="The low-rank term is multiplied by lora_alpha / lora_rank.")
    lora_share: Literal["both", "b", "a"] = Field(
        "both", description='"b": A is frozen (FFA-LoRA); "a": A is shared and B personal (FedSA-LoRA).'
    )
    adapter_size: int = Field(8, ge=1, description="Units of the bottleneck.")
    adapter_place: Literal["series", "parallel"] = "series"
    fisher_fraction: float = Field(0.1, gt=0, le=1, description="Share of the trunk's entries that learn.")
    fisher_on: Literal["source", "local"] = Field("source", description="The data that the entries are chosen on.")
    fisher_samples: int = Field(256, ge=1, description="Samples at most that a Fisher information is computed on.")

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
    """`[anchor]`: what holds local training near a model that was there before. docs/training.md has the formulas."""

    to: Literal["start", "received"] = Field(
        "start", description="Before the first round; or as the client has it at the beginning of the round."
    )
    l2: float = Field(0.0, ge=0, description="Weight of half the squared distance of the weights.")
    ewc: float = Field(0.0, ge=0, description="The same, each weight times the source task's Fisher information.")
    kl: float = Field(0.0, ge=0, description="Weight of the cross-entropy to that model's outputs.")
    distill: float = Field(0.0, ge=0, le=1, description="Distillation's share of the loss.")
    temperature: float = Field(2.0, gt=0, description="Distillation's temperature.")
    teacher: str = Field("", description="A .safetensors file with another model to learn outputs from (kl, distill).")
    teacher_model: str = Field("", description="That model's task.model; empty: the same.")
    teacher_hidden: int = Field(0, ge=0, description="That model's task.hidden; 0: the same.")


class Adapt(Section):
    """`[adapt]`: labelled samples of another domain beside the clients' own. docs/training.md has the formulas."""

    method: Literal["none", "source-only", "mmd", "coral", "deep-coral", "dann", "match", "augment"] = "none"
    weight: float = Field(1.0, gt=0, description="Weight of the alignment beside the data's loss.")
    labels: Literal["source", "both"] = Field(
        "source", description='"source": the clients\' own labels are not used; "both": they are.'
    )
    where: Literal["public", "clients"] = Field(
        "public", description="Every client has all source samples, or a share of them."
    )
    dataset: str = Field("", description="The source domain's task.dataset; empty: task.source.")
    root: str = Field("", description="Its task.root.")
    train: str = Field("", description="Its task.train.")
    targets: Names = Field((), description="Its names of task.targets, in order; empty: the same.")
    widths: Fractions = Field(
        (0.25, 0.5, 1.0, 2.0, 4.0), min_length=1, description="MMD's kernel widths, times the median squared distance."
    )
    ridge: float = Field(1.0, ge=0, description="Added to the variances that coral whitens and colours with.")
    dann_gamma: float = Field(10.0, gt=0, description="How fast DANN's reversal comes to its full strength.")
    dann_hidden: int = Field(64, ge=1, description="Units of DANN's domain classifier.")

    @model_validator(mode="after")
    def _widths_are_positive(self) -> Self:
        if min(self.widths) <= 0:
            raise ValueError(f"widths = {list(self.widths)}: give positive numbers")
        return self


SHARES = ("all", "none", "body", "head", "all-but-norms", "trainable")
"""The named sets of `strategy.share`; anything else is patterns over parameter names."""


class Strategy(Section):
    """`[strategy]`: how updates are shared and combined. docs/strategies.md says which setting belongs to which name."""

    name: str = Field("fedavg", description="An algorithm of docs/strategies.md, or a user's module:object.")
    share: str = Field(
        "all",
        min_length=1,
        description="Which arrays travel in a federated run: all, none, body, head, all-but-norms, trainable, or patterns "
        "over parameter names (trunk.linear1.*,heads.*); the trained arrays that do not are personal.",
    )
    weights: Literal["", "samples", "equal"] = Field(
        "",
        description="What a client counts in a mean: its samples, or 1; empty: as the algorithm's paper has it.",
    )
    stages: Objects = Field((), description="Your own stages of an update, module:OBJECT, in order (docs/stages.md).")
    server_lr: float = Field(1.0, gt=0, description="The server's step, as a factor of the mean change.")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="FedAvgM's beta.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Of FedAdam, FedYogi, FedAdagrad.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Of FedAdam and FedYogi.")
    tau: float = Field(1e-3, gt=0, description="Of FedAdam, FedYogi, FedAdagrad: added to the root.")
    mu: float = Field(0.1, ge=0, description="Weight of FedProx's and MOON's term.")
    temperature: float = Field(0.5, gt=0, description="MOON's.")
    alpha: float = Field(0.1, gt=0, description="FedDyn's.")
    pull: float = Field(1.0, ge=0, description="Ditto's and pFedMe's lambda: the pull towards the shared model.")
    mix: float = Field(0.5, ge=0, le=1, description="APFL's share of the personal model, at the start.")
    mix_lr: float = Field(0.0, ge=0, description="The rate at which APFL learns that share; 0: it stays.")
    head_epochs: int = Field(0, ge=0, description="FedRep's and FedAlt's epochs of what is personal; 0: local.epochs.")
    body_epochs: int = Field(0, ge=0, description="The same of what is shared.")
    inner_steps: int = Field(5, ge=1, description="pFedMe's steps on each batch.")
    inner_lr: float = Field(0.0, ge=0, description="pFedMe's personal rate, Per-FedAvg's alpha; 0: local.lr.")
    byzantine: int = Field(0, ge=0, description="Attackers in a cohort that Krum, Multi-Krum and Bulyan reckon with.")
    keep: int = Field(0, ge=0, description="Updates that Multi-Krum averages; 0: all but byzantine.")
    trim: float = Field(0.2, ge=0, lt=0.5, description="Share that the trimmed mean cuts off at either end.")
    bucket: int = Field(1, ge=1, description="Updates averaged at random before a robust rule; 1: none.")
    radius: float = Field(1.0, gt=0, description="Length to which centred clipping and norm-bound shorten an update.")
    iterations: int = Field(10, ge=1, description="Of centred clipping and the geometric median.")
    smoothing: float = Field(1e-6, gt=0, description="The geometric median's smallest distance.")

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        if name not in ALGORITHMS and ":" not in name:
            raise _no_such(name, ALGORITHMS, "your own module:object")
        return name

    @field_validator("share")
    @classmethod
    def _known_share(cls, share: str) -> str:
        if share not in SHARES and not any(sign in share for sign in ".*"):
            raise _no_such(share, SHARES, "patterns over parameter names")
        return share


class Attack(Section):
    """`[attack]`: clients that are not honest, to test a defence with. They are drawn from the seed."""

    kind: Literal["none", "label-flip", "sign-flip", "replacement", "ipm", "alie", "noise"] = "none"
    fraction: float = Field(0.2, gt=0, lt=1, description="Share of all clients that attack.")
    scale: float = Field(
        1.0, ge=0, description="Strength (strategies/attacks.py); 0: what the paper of replacement and alie says."
    )


RELEASES = ("samples", "loss", "metrics", "labels", "hashes", "errors")


class Privacy(Section):
    """`[privacy]`: what is protected, how well, and what may leave all the same. `docs/privacy.md` says what it means."""

    unit: Literal["none", "example", "client", "local"] = Field(
        "none",
        description="none; example: DP-SGD at each client; client: clipped updates, noise at the server; local: noise at "
        "each client.",
    )
    epsilon: float = Field(0.0, ge=0, description="Budget of each unit for the whole run; 0: none is set.")
    noise_multiplier: float = Field(
        0.0, ge=0, description="Deviation of the noise, in units of the clip; 0: calibrated from epsilon."
    )
    delta: float = Field(1e-5, gt=0, lt=1)
    clip: float = Field(1.0, gt=0, description="Largest norm of an example's gradient, or of a client's update.")
    accountant: Literal["pld", "rdp", "prv"] = "pld"
    sample_rate: float = Field(
        0.0, ge=0, le=1, description="unit = example: chance of each example in each step, a public constant."
    )
    denominator: float = Field(
        0.0, ge=0, description="What the noisy sum is divided by; 0: local.batch_size, or the expected cohort."
    )
    grad_sample: Literal["auto", "book", "hooks", "loop"] = Field(
        "auto",
        description="unit = example: how per-example gradients are clipped and summed: book, one pass with our "
        "book-keeping; hooks, Opacus; loop, one pass per example; auto, by the model.",
    )
    adaptive_clip: bool = Field(False, description="unit = client: the clip follows a quantile of the updates' norms.")
    clip_quantile: float = Field(0.5, ge=0, le=1, description="Share of updates that the adaptive clip lets through.")
    clip_rate: float = Field(0.2, gt=0, description="How fast the adaptive clip moves.")
    clip_count_noise: float = Field(
        0.0, ge=0, description="Deviation of the noise on the adaptive clip's count; 0: a twentieth of the denominator."
    )
    budgets: str = Field(
        "",
        description="Each client's own epsilon: empty: privacy.epsilon; uniform A B; choice A B ...; file PATH, a CSV "
        "with the columns client and epsilon.",
    )
    on_exhausted: Literal["leave", "stop"] = Field(
        "leave", description="A client whose next release would pass its budget: it leaves, or the run stops."
    )
    release: Names = Field(
        (), description="What may leave unprotected under DP: any of samples, loss, metrics, labels, hashes, errors."
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
                f'unit = "{self.unit}" with neither epsilon nor noise_multiplier: write epsilon = 3.0 for a budget that the '
                "noise is calibrated to, or the noise itself"
            )
        if self.adaptive_clip and self.unit != "client":
            raise ValueError(
                f'adaptive_clip = true with unit = "{self.unit}": only updates of whole clients have an adaptive clip; '
                'write unit = "client", or a fixed clip'
            )
        kind, *words = self.budgets.split() or [""]
        numbers = [float(word) for word in words if _is_positive(word)]
        law = len(numbers) == len(words) > 0 and (
            kind == "choice" or (kind == "uniform" and len(numbers) == 2 and numbers[0] <= numbers[1])
        )
        if self.budgets and not law and not (kind == "file" and len(words) == 1):
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

    every: int = Field(1, ge=1, description="Evaluate in every n-th round, and always after the last.")
    on: Names = Field(
        ("global", "clients"),
        description="Any of global, clients, and source: the source task, before and after the run, to see forgetting.",
    )
    sample: int = Field(0, ge=0, description="Clients that are scored at the end, drawn from the seed; 0: all.")
    fine_tune_epochs: int = Field(0, ge=0, description="Score each client's model after this many local epochs too.")
    folds: int = Field(0, ge=0, description="Cross-validation: so many runs, each with another part of every client.")
    fold: int = Field(
        0, ge=0, description="0: the parts of partition.parts; k: the k-th fold is each client's test part."
    )
    unseen: float = Field(
        0.0, ge=0, lt=1, description="Share of the clients that no cohort ever has; they are scored at the end."
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
    """`[engine]`: how the run is launched. Nothing here changes the result, but that `threads`, `exact` and `device` change
    its last bits, and `precision` more."""

    name: Literal["inline", "ray", "processes"] = "ray"
    workers: int = Field(0, ge=0, description="Ray actors, or SuperNodes; 0: one a core, or four SuperNodes.")
    threads: int = Field(1, ge=1, description="Threads a worker; two lose against one on a shared machine.")
    exact: bool = Field(
        True,
        description="A client's bits depend on itself alone; false: faster kernels where they fit (docs/speed.md).",
    )
    trainer: Literal["auto", "loop", "direct", "fused", "stacked"] = Field(
        "auto", description="Who trains clients: the fastest that can, or this one (docs/speed.md)."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where clients are trained and models evaluated.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the products of the trainer stacked on a GPU; all else is float32."
    )
    state_memory: int = Field(
        1024,
        ge=0,
        description="Megabytes of clients' states that a machine keeps in memory until the end; more is on disk.",
    )
    address: str = Field("", description='A Ray cluster to join, as "HOST:6379" or "auto"; "": Ray on this machine.')


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

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> Self:
        more = (info.context or {}).get("faults")
        if found := [*rules.faults(self), *(more(self) if more else ())]:
            raise ValueError("\n".join(found))
        return self

    @property
    def learned(self) -> tuple[str, ...]:
        """The targets that the model has a head for."""
        if self.task.learn == "all":
            return self.task.targets
        return (self.task.targets[0] if self.task.learn == "first" else self.task.learn,)

    @property
    def share(self) -> str:
        """What travels: `strategy.share` in a federated run, nothing when each client is alone, what is
        trained when pooled."""
        return {"federated": self.strategy.share, "local": "none", "pooled": "trainable"}[self.run.placement]

    @property
    def participants(self) -> int:
        """Clients that may be in a cohort: all but those of `evaluate.unseen`, a rounded share."""
        return self.partition.clients - round(self.evaluate.unseen * self.partition.clients)

    @property
    def cohort_size(self) -> int:
        """Clients whose replies a round is to have; of a Poisson cohort the expected number."""
        if self.run.placement == "local":
            return self.partition.clients
        return self.cohort.size or max(1, round(self.cohort.fraction * self.participants))
