"""The work for comparing engines: models, random data of the right shape, and the plain PyTorch loop over them.

100 clients of 60 samples, batches of 20, one epoch of plain SGD in float32. The data is random, because the speed of a round
does not depend on its values. Every engine builds its model here, so all train the same.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from meadow.config.schema import Task
from meadow.runtime.seeds import torch_generator, torch_seeded
from meadow.tasks.data import Inputs, Part, Raw
from meadow.tasks.models import networks

CLIENTS = 100
SAMPLES = 60
BATCH = 20
LR = 0.05
_PER_CLIENT = 100
"""Samples of each client; 60% of them are for training."""

PARTS = "0.6,0.2,0.2"


def one_hidden(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """Flatten, and one hidden layer of `hidden` units with ReLU: with its head the MLP 784-200-10."""
    layers = [nn.Flatten(), nn.Linear(math.prod(inputs.shape), task.hidden), nn.ReLU()]
    return nn.Sequential(*layers), task.hidden


def tanh(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """The network that Tramer and Boneh (2021) train on Fashion-MNIST by DP-SGD (docs/examples/fashion-mnist-private.toml).

    Convolution 8 x 8 with 16 filters (stride 2), pooling 2 x 2 (stride 1), convolution 4 x 4 with 32 (stride 2), pooling
    again, a layer of 32 units; tanh after each. With a head of ten classes 26,010 parameters for 28 x 28 in grey.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(inputs.shape[0], 16, 8, stride=2, padding=2),
        tanh1=nn.Tanh(),
        pool1=nn.MaxPool2d(2, stride=1),
        conv2=nn.Conv2d(16, 32, 4, stride=2),
        tanh2=nn.Tanh(),
        pool2=nn.MaxPool2d(2, stride=1),
        flatten=nn.Flatten(),
        linear=nn.Linear(512, 32),
        tanh3=nn.Tanh(),
    )
    return nn.Sequential(layers), 32


def mlp_784() -> nn.Module:
    """The MLP 784-200-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))


def lenet() -> nn.Module:
    """LeNet-size CNN, 61,706 parameters, with its layers in the usual order."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mcmahan() -> nn.Module:
    """The CNN of McMahan et al. 2017, 1,663,370 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def windows() -> nn.Module:
    """Meadow's 1-D CNN for sensor windows, in torch's own layers."""
    layers: list[nn.Module] = []
    for before, width in ((9, 9), (64, 5), (64, 3)):
        layers += [nn.Conv1d(before, 64, width, padding=width // 2), nn.GroupNorm(8, 64), nn.ReLU()]
        layers += [nn.MaxPool1d(2)] if width > 3 else []
    return nn.Sequential(*layers, networks.MeanAndMaximum(), nn.Linear(128, 6))


class Packed(nn.Module):
    """Meadow's BiLSTM for texts, over packed sequences as in torch's documentation."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 64, padding_idx=0)
        self.lstm = nn.LSTM(64, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x != 0).sum(1)
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=-math.inf)
        return self.head(states.amax(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Workload:
    """A model and the shape of its samples. `model`: its name in `task.model`; `plain`: makes the same in plain PyTorch."""

    title: str
    model: str
    plain: Callable[[], nn.Module]
    classes: int
    inputs: Inputs
    hidden: int = 64
    rounds: int = 10
    """Rounds of one measurement: enough to last about two seconds."""

    def network(self) -> nn.Module:
        """The model as plain PyTorch."""
        with torch_seeded(0, "benchmark"):
            return self.plain()

    def samples(self, count: int, purpose: str) -> tuple[Tensor, Tensor]:
        """Random samples and their classes; texts are a quarter to all of the length."""
        draw = torch_generator(0, "benchmark", purpose)
        y = torch.randint(self.classes, (count,), generator=draw)
        if not self.inputs.tokens:
            return torch.rand(count, *self.inputs.shape, generator=draw), y
        x = torch.randint(1, self.inputs.tokens, (count, *self.inputs.shape), generator=draw)
        longest = self.inputs.shape[0]
        lengths = torch.randint(longest // 4, longest + 1, (count, 1), generator=draw)
        return x.masked_fill_(torch.arange(longest) >= lengths, 0), y

    def client(self, number: int) -> tuple[Tensor, Tensor]:
        """A client's training samples, for engines that take them client by client."""
        return self.samples(SAMPLES, f"client {number}")

    def flops(self) -> int:
        """Floating-point operations of one round, forward and backward, as counted by torch for one batch."""
        network, (x, y) = self.network(), self.client(0)
        counter = FlopCounterMode(display=False)
        with counter:
            F.cross_entropy(network(x[:BATCH]), y[:BATCH]).backward()  # type: ignore[no-untyped-call]
        return counter.get_total_flops() * CLIENTS * SAMPLES // BATCH


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-200-10", "meadow.benchmarks.workloads:one_hidden", mlp_784, 10, Inputs((1, 28, 28)), 200, rounds=40
    ),
    "small-cnn": Workload("LeNet-size CNN (62k)", "lenet", lenet, 10, Inputs((1, 28, 28)), rounds=12),
    "large-cnn": Workload("CNN of McMahan et al. (1.66M)", "mcmahan-cnn", mcmahan, 10, Inputs((1, 28, 28)), rounds=3),
    "cnn1d": Workload("1-D CNN of uci_har", "cnn1d", windows, 6, Inputs((9, 128)), rounds=6),
    "bilstm": Workload("BiLSTM", "bilstm", lambda: Packed(5000), 3, Inputs((32,), 5000), rounds=4),
}


def _dataset(name: str) -> Callable[[Task], Raw]:
    def reader(task: Task) -> Raw:
        work = WORKLOADS[name]
        train, test = (
            Part(x, {"label": y.numpy()})
            for x, y in (work.samples(CLIENTS * _PER_CLIENT, "train"), work.samples(100, "test"))
        )
        kinds, images = {"label": "class"}, len(work.inputs.shape) == 3
        return Raw(name, train, test, kinds=kinds, tokens=work.inputs.tokens, images=images)

    return reader


mlp, small_cnn, large_cnn, cnn1d, bilstm = (_dataset(name) for name in WORKLOADS)


def settings(name: str, rounds: int) -> dict[str, object]:
    """The workload as a Meadow experiment: every client in every round, no evaluation before the end."""
    work = WORKLOADS[name]
    return {
        "run.name": name,
        "run.rounds": rounds,
        "task.dataset": f"meadow.benchmarks.workloads:{name.replace('-', '_')}",
        "task.targets": ["label"],
        "task.model": work.model,
        "task.hidden": work.hidden,
        "partition.law": "iid",
        "partition.clients": CLIENTS,
        "partition.parts": PARTS,
        "local.epochs": 1,
        "local.batch_size": BATCH,
        "local.lr": LR,
        "local.momentum": 0.0,
        "evaluate.every": 10**6,
        "evaluate.on": ["clients"],
    }


def train_plainly(
    network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, generator: torch.Generator
) -> None:
    """One epoch over a client's samples, in plain PyTorch."""
    for index in torch.split(torch.randperm(len(x), generator=generator), BATCH):
        optimizer.zero_grad()
        F.cross_entropy(network(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
