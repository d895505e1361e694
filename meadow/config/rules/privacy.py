"""Rules of `[privacy]`: settings under which a guarantee would not hold.

`meadow.privacy.dpsgd` refuses models that DP-SGD cannot train (batch normalisation, shared parameters) when it opens them;
`meadow.strategies.check` has the rules that depend on the algorithm.
"""

from collections.abc import Callable

from meadow.config.rules.rule import Rule, Text
from meadow.config.schema import Experiment

EXAMPLE = ("privacy.unit=example", "privacy.noise_multiplier=1", "privacy.sample_rate=0.1", "local.steps=2")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1")
LOCAL = ("privacy.unit=local", "privacy.noise_multiplier=1")
GIVEN = {"example": EXAMPLE, "client": CLIENT, "local": LOCAL}
"""The overrides of a minimal experiment with each unit."""


def _private(
    units: tuple[str, ...],
    keys: tuple[str, ...],
    when: Callable[[Experiment], bool],
    why: Text,
    write: Text,
    wrong: tuple[str, ...],
    right: tuple[str, ...] = (),
) -> Rule:
    """A rule for these privacy units."""
    given = GIVEN[units[0]]
    return Rule(
        ("privacy.unit", *keys),
        lambda e: e.privacy.unit in units and when(e),
        why,
        write,
        (*given, *wrong),
        (*given, *right),
    )


ALL = ("example", "client", "local")
_ONE_COHORT = "the accounting assumes one cohort per round whose clipped updates and noise are summed unchanged"
_NO_NOISE = "this is decided by private samples without noise"
_AS_CLIENT = 'leave it out or write privacy.unit = "client"'

PRIVACY = (
    _private(
        ALL,
        ("cohort.sampling",),
        lambda e: e.cohort.sampling in ("size", "schedule"),
        "the accounting must know each client's participation beforehand, from the seed alone",
        'write "poisson" or "fixed"',
        ("cohort.sampling=size", "strategy.weights=equal"),
    ),
    _private(
        ("example", "local"),
        ("cohort.stragglers",),
        lambda e: bool(e.cohort.stragglers),
        "the number of steps per round must be a public constant",
        "write cohort.stragglers = 0",
        ("cohort.stragglers=0.5",),
    ),
    _private(
        ALL,
        ("strategy.weights",),
        lambda e: (
            e.strategy.weights == "samples" and (e.privacy.unit == "client" or "samples" not in e.privacy.release)
        ),
        "a client's sample count is private, so all clients have weight 1",
        "leave it out",
        ("strategy.weights=samples",),
        ("strategy.weights=samples", "privacy.release=samples"),
    ),
    Rule(
        ("privacy.unit", "privacy.budgets"),
        lambda e: e.privacy.unit == "client" and bool(e.privacy.budgets),
        "the same noise protects all clients, so they have one budget",
        "write privacy.epsilon",
        ("privacy.unit=client", "privacy.budgets=uniform 1 8"),
        CLIENT,
    ),
    _private(
        ("client",),
        ("cohort.quorum", "cohort.sampling"),
        lambda e: e.cohort.quorum > 1 and e.cohort.sampling == "poisson",
        "whether a round is discarded would reveal how many clients took part",
        "write cohort.quorum = 1",
        ("cohort.quorum=2", "cohort.sampling=poisson"),
        ("cohort.quorum=1", "cohort.sampling=poisson"),
    ),
    *(
        _private(("client",), (key,), when, _ONE_COHORT, "leave it out", wrong)
        for key, when, wrong in (
            ("strategy.server_lr", lambda e: e.strategy.server_lr != 1, ("strategy.server_lr=0.5",)),
            ("cohort.attempts", lambda e: e.cohort.attempts > 1, ("cohort.attempts=2",)),
            ("cohort.over_selection", lambda e: e.cohort.over_selection > 0, ("cohort.over_selection=0.5",)),
            (
                "attack.kind",
                lambda e: e.attack.kind not in ("none", "label-flip"),
                ("attack.kind=noise", "attack.fraction=0.5"),
            ),
        )
    ),
    Rule(
        ("privacy.unit", "privacy.sample_rate"),
        lambda e: e.privacy.unit == "example" and e.privacy.sample_rate == 0,
        "it must be a public constant, not a function of each client's size",
        "write the batch size over a public number of samples, for example privacy.sample_rate = 0.05",
        ("privacy.unit=example", "privacy.noise_multiplier=1", "local.steps=2"),
        EXAMPLE,
    ),
    _private(
        ("example",),
        ("local.batch_size", "privacy.denominator"),
        lambda e: e.privacy.denominator == 0 and e.local.batch_size == 0,
        "the noisy sum would be divided by each client's private size",
        "write privacy.denominator, the expected batch size",
        ("local.batch_size=0",),
        ("local.batch_size=0", "privacy.denominator=16"),
    ),
    *(
        _private(("example",), (f"local.{name}",), when, _NO_NOISE, _AS_CLIENT, wrong)
        for name, when, wrong in (
            ("patience", lambda e: e.local.patience > 0, ("local.patience=1",)),
            ("schedule", lambda e: e.local.schedule == "plateau", ("local.schedule=plateau",)),
            ("balance", lambda e: e.local.balance != "fixed", ("local.balance=dwa",)),
            (
                "fisher_on",
                lambda e: e.local.trainable == "fisher" and e.local.fisher_on == "local",
                ("local.trainable=fisher", "local.fisher_on=local"),
            ),
        )
    ),
    _private(
        ("example",),
        ("adapt.method",),
        lambda e: e.adapt.method != "none",
        "its loss couples the samples of a batch, so there are no per-example gradients to clip",
        'write privacy.unit = "client"',
        ("adapt.method=coral",),
    ),
    _private(
        ("example",),
        ("local.gradual_unit",),
        lambda e: e.local.trainable == "gradual" and e.local.gradual_unit == "epochs",
        "a round of DP-SGD is counted in steps, not in epochs",
        'write local.gradual_unit = "rounds"',
        ("local.trainable=gradual", "local.gradual_unit=epochs"),
        ("local.trainable=gradual", "local.gradual_unit=rounds"),
    ),
    _private(
        ("client", "local"),
        ("run.placement", "strategy.share"),
        lambda e: e.share == "none",
        "nothing is shared, so there are no updates to protect",
        'write privacy.unit = "none", or "example" if the models themselves are published',
        ("strategy.share=none",),
    ),
    _private(
        ("client", "local"),
        ("run.placement",),
        lambda e: e.run.placement == "pooled",
        "pooled training has no client updates",
        'write privacy.unit = "example"',
        ("run.placement=pooled",),
    ),
    _private(
        ALL,
        ("task.kinds",),
        lambda e: any("balanced" in kind.split() for kind in e.task.kinds[: len(e.task.targets)]),
        "class weights from private labels are neither clipped nor noised",
        "write public weights instead of balanced: weights W1 W2 ...",
        ("task.kinds=class balanced,value",),
        ("task.kinds=class,value",),
    ),
    _private(
        ALL,
        ("task.public",),
        lambda e: e.task.public == "train",
        "vocabulary and scaling would come from private data without protection",
        "name a public file, or write the constants in task.inputs",
        ("task.public=train",),
    ),
)
