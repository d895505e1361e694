"""The algorithms by name, and where each one stands: a new one is a file in `strategies/` and a line here.

What a name stands for is a `strategies.local.Algorithm`; `strategy.name` may also be a user's own, "module:object".
"""

ALGORITHMS: dict[str, str] = {
    "fedavg": "strategies.fedavg:FEDAVG",
    "fedprox": "strategies.fedprox:FEDPROX",
    "scaffold": "strategies.scaffold:SCAFFOLD",
    "fednova": "strategies.fednova:FEDNOVA",
    "feddyn": "strategies.feddyn:FEDDYN",
    "moon": "strategies.moon:MOON",
    "fedavgm": "strategies.fedopt:FEDAVGM",
    "fedadam": "strategies.fedopt:FEDADAM",
    "fedyogi": "strategies.fedopt:FEDYOGI",
    "fedadagrad": "strategies.fedopt:FEDADAGRAD",
    "fedsim": "strategies.fedavg:FEDAVG",
    "fedalt": "strategies.fedrep:FEDALT",
    "fedrep": "strategies.fedrep:FEDALT",
    "fedbabu": "strategies.fedbabu:FEDBABU",
    "ditto": "strategies.ditto:DITTO",
    "apfl": "strategies.apfl:APFL",
    "pfedme": "strategies.pfedme:PFEDME",
    "perfedavg": "strategies.perfedavg:FIRST_ORDER",
    "perfedavg-hf": "strategies.perfedavg:HESSIAN_FREE",
    "fedrod": "strategies.fedrod:FEDROD",
    "median": "strategies.robust:MEDIAN",
    "trimmed-mean": "strategies.robust:TRIMMED_MEAN",
    "krum": "strategies.robust:KRUM",
    "multi-krum": "strategies.robust:MULTI_KRUM",
    "bulyan": "strategies.robust:BULYAN",
    "geometric-median": "strategies.robust:GEOMETRIC_MEDIAN",
    "centred-clipping": "strategies.robust:CENTRED_CLIPPING",
    "norm-bound": "strategies.robust:NORM_BOUND",
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
