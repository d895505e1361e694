"""The work of `benchmarks/workloads.py` on one process of Apple's pfl-research, in the style of its tutorials.

    PFL_WORKER_RANK=0 PFL_WORKER_ADDRESSES=127.0.0.1:PORT,127.0.0.1:PORT python -m benchmarks.pfl_app WORKLOAD ROUNDS

Rank 0 prints when each round ended, as a JSON list in its last line.
"""

import json
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from meadow.benchmarks.workloads import BATCH, CLIENTS, LR, WORKLOADS


class Model(nn.Module):
    """The network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        return F.cross_entropy(self.network(x), y)

    def metrics(self, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
        return {"samples": Weighted(len(y), 1)}


class Stamps(TrainingProcessCallback):  # type: ignore[misc]
    """Notes when each round ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
        from pfl.metrics import Metrics

        self.times.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """All rounds of a workload."""
    name, rounds = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    work = WORKLOADS[name]
    users = list(range(CLIENTS))
    kept = {user: Dataset(raw_data=list(work.client(user)), user_id=str(user)) for user in users}
    data = FederatedDataset(lambda user: kept[user], get_user_sampler("minimize_reuse", users))
    network = Model(work.network())
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    stamps = Stamps()
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, 10**6, CLIENTS, None),
        SimulatedBackend(training_data=data, val_data=None),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=BATCH),
        callbacks=[stamps],
    )
    print("\n" + json.dumps(stamps.times))


if __name__ == "__main__":
    main()
