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
    "fedsim": "meadow.strategies.algorithms.fedavg:FEDSIM",
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
