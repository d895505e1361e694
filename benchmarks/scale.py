"""What clients cost beside their training: rounds of empty clients, personal state, and populations up to a million."""

from dataclasses import dataclass, field

import numpy as np
import torch

from config.load import resolve
from config.schema import Experiment, Task
from config.seeds import numpy_generator
from strategies.fedavg import FedAvg
from strategies.local import Algorithm, Half, Outcome, Turn
from tasks.data import Part, Raw

SAMPLES = 4
"""Samples dealt to each client, of which two are for training."""
FEATURES = 8


@dataclass(frozen=True)
class Nothing:
    """What a client reports that did not train."""

    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)


class Empty(Half):
    """A client that sends back what it received."""

    def train(self, turn: Turn) -> Outcome:
        return Outcome(turn.received, Nothing())


empty = Algorithm(FedAvg, Empty())


def population(task: Task) -> Raw:
    """Samples for `task.source_samples` clients, four each, of eight numbers."""
    draw = numpy_generator(0, "benchmark")
    parts = []
    for count in (SAMPLES * task.source_samples, 100):
        x = torch.from_numpy(draw.random((count, FEATURES), dtype=np.float32))
        parts.append(Part(x, {"label": draw.integers(0, 2, count)}))
    return Raw("population", parts[0], parts[1], {"label": "class 2"})


def experiment(clients: int, cohort: int, rounds: int, strategy: str, hidden: int) -> Experiment:
    return resolve(
        {
            "run": {"rounds": rounds},
            "task": {
                "dataset": "benchmarks.scale:population",
                "targets": ["label"],
                "source_samples": clients,
                "model": "mlp",
                "hidden": hidden,
            },
            "partition": {"law": "iid", "clients": clients, "min_size": SAMPLES},
            "cohort": {"size": cohort},
            "strategy": {"name": f"benchmarks.scale:{strategy}" if strategy in ("empty",) else strategy},
            "evaluate": {"on": ["clients"], "every": 10**6},
        }
    )
