"""The work of `benchmarks/workloads.py` as a Flower app in the style of Flower's documentation, for Flower's Ray engine.

Each worker makes a client's model and samples once. The app is a module, as Flower advises: an app in `__main__` would be
pickled into every message. `benchmarks.sides` runs it.
"""

import functools
import os
import time
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from meadow.benchmarks.workloads import CLIENTS, LR, WORKLOADS, train_plainly

WORKLOAD = "MEADOW_BENCHMARK_WORKLOAD"
ROUNDS = "MEADOW_BENCHMARK_ROUNDS"

client_app = ClientApp()
server_app = ServerApp()
stamps: list[float] = []
"""When each round began."""


@functools.cache
def _network() -> nn.Module:
    torch.set_num_threads(1)
    return WORKLOADS[os.environ[WORKLOAD]].network()


@functools.cache
def _samples(client: int) -> tuple[Tensor, Tensor]:
    return WORKLOADS[os.environ[WORKLOAD]].client(client)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's epoch."""
    client = int(str(context.node_config["partition-id"]))
    network, (x, y) = _network(), _samples(client)
    network.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    train_plainly(network, optimizer, x, y, torch.Generator().manual_seed(client))
    reply = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})})
    return Message(reply, reply_to=message)


class Stamped(FedAvg):
    """FedAvg that notes when a round begins."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        stamps.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, every client in each, no evaluation."""
    strategy = Stamped(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    strategy.start(grid, ArrayRecord(_network().state_dict()), num_rounds=int(os.environ[ROUNDS]))
    stamps.append(time.perf_counter())
