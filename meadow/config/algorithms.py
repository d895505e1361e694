"""The algorithms by name, and where each one stands: a new one is a file in `strategies/` and a line here.

What a name stands for is a `meadow.strategies.protocol.Algorithm`; `strategy.name` may also be a user's own,
"module:object".
"""

ALGORITHMS: dict[str, str] = {
    "fedavg": "meadow.strategies.algorithms.fedavg:FEDAVG",
    "fedprox": "meadow.strategies.algorithms.fedprox:FEDPROX",
    "scaffold": "meadow.strategies.algorithms.scaffold:SCAFFOLD",
    "fednova": "meadow.strategies.algorithms.fednova:FEDNOVA",
    "feddyn": "meadow.strategies.algorithms.feddyn:FEDDYN",
    "moon": "meadow.strategies.algorithms.moon:MOON",
    "fedavgm": "meadow.strategies.algorithms.fedopt:FEDAVGM",
    "fedadam": "meadow.strategies.algorithms.fedopt:FEDADAM",
    "fedyogi": "meadow.strategies.algorithms.fedopt:FEDYOGI",
    "fedadagrad": "meadow.strategies.algorithms.fedopt:FEDADAGRAD",
    "fedsim": "meadow.strategies.algorithms.fedavg:FEDAVG",
    "fedalt": "meadow.strategies.algorithms.fedrep:FEDALT",
    "fedrep": "meadow.strategies.algorithms.fedrep:FEDALT",
    "fedbabu": "meadow.strategies.algorithms.fedbabu:FEDBABU",
    "ditto": "meadow.strategies.algorithms.ditto:DITTO",
    "apfl": "meadow.strategies.algorithms.apfl:APFL",
    "pfedme": "meadow.strategies.algorithms.pfedme:PFEDME",
    "perfedavg": "meadow.strategies.algorithms.perfedavg:FIRST_ORDER",
    "perfedavg-hf": "meadow.strategies.algorithms.perfedavg:HESSIAN_FREE",
    "fedrod": "meadow.strategies.algorithms.fedrod:FEDROD",
    "median": "meadow.strategies.algorithms.robust:MEDIAN",
    "trimmed-mean": "meadow.strategies.algorithms.robust:TRIMMED_MEAN",
    "krum": "meadow.strategies.algorithms.robust:KRUM",
    "multi-krum": "meadow.strategies.algorithms.robust:MULTI_KRUM",
    "bulyan": "meadow.strategies.algorithms.robust:BULYAN",
    "geometric-median": "meadow.strategies.algorithms.robust:GEOMETRIC_MEDIAN",
    "centred-clipping": "meadow.strategies.algorithms.robust:CENTRED_CLIPPING",
    "norm-bound": "meadow.strategies.algorithms.robust:NORM_BOUND",
}

SUMMED_EQUALLY = ("scaffold", "feddyn")
"""Algorithms whose state on the server is a plain sum over clients: a weighted mean of models would not fit it."""

NORMALISED = ("scaffold", "fednova")
"""Algorithms that turn a client's whole move back into a mean gradient, which is known for SGD alone."""

ROBUST = (
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "bulyan",
    "geometric-median",
    "centred-clipping",
    "norm-bound",
)
"""Aggregators that judge each client's update beside the others'."""


PRIVATE = (
    "fedavg",
    "fedsim",
    "fedprox",
    "scaffold",
    "feddyn",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "fedbabu",
    "ditto",
    *ROBUST,
)
"""Algorithms whose clients train what they send once a round, by the data's loss alone: so DP-SGD can take its place."""

AVERAGES = (
    "fedavg",
    "fedsim",
    "fedprox",
    "moon",
    "fedalt",
    "fedrep",
    "fedbabu",
    "ditto",
    "apfl",
    "pfedme",
    "perfedavg",
    "perfedavg-hf",
    "fedrod",
)
"""Algorithms whose server's half is a mean of what clients send, and nothing beside it."""

WATCHING = ("apfl", "pfedme", "perfedavg", "perfedavg-hf", "fedrod")
"""Algorithms whose clients take steps of their own beside the loop's: what changes the loop's alone has no part in them."""


def least_updates(name: str, byzantine: int) -> int:
    """How many updates an aggregator needs to withstand so many attackers: Blanchard et al. 2017 for Krum, El Mhamdi et
    al. 2018 for Bulyan; the others combine whatever there is."""
    return {"krum": 2 * byzantine + 3, "multi-krum": 2 * byzantine + 3, "bulyan": 4 * byzantine + 3}.get(name, 1)
