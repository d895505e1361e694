"""Compare the speed of stacked clients on a GPU (`engine.device = "cuda"`) with the plain PyTorch loop on the same device.

    python -m benchmarks.gpu [--device cuda|cpu] [--precision float32|bfloat16] [--clients N] [--samples N] [workload ...]

Both train every client from the same model for one epoch of plain SGD, batches of 20, samples on the device, and sum the
results. "of matrix rate" compares the models' products with the device's measured rate of large products, "of copy rate" the
unavoidable memory traffic (in each step, parameters read twice and written once) with its measured copy rate. Without a GPU
the exit status is 2; `--device cpu` runs the same code on the CPU.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from meadow.arrays.sums import BLOCK
from meadow.client.trainers.kernel import Member
from meadow.client.trainers.network import network
from meadow.client.trainers.stacked import Stacked
from meadow.config.load import load
from meadow.config.schema import Engine, Task
from meadow.runtime.seeds import torch_generator, torch_seeded
from meadow.tasks.data import Inputs, Target
from meadow.tasks.evaluation import state_of
from meadow.tasks.models import networks
from meadow.tasks.models.multihead import Multihead

BATCH, LR, CLASSES = 20, 0.05, 10
SHAPE = (1, 28, 28)
SHORTEST = 0.5
"""The shortest duration of a measurement, in seconds."""


def one_hidden(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """784-200."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(inputs.shape), 200), nn.ReLU()), 200


WORKLOADS = {
    "mlp": ("MLP 784-200-10", one_hidden),
    "small-cnn": ("LeNet-size CNN (62k)", networks.lenet),
    "large-cnn": ("CNN of McMahan et al. (1.66M)", networks.mcmahan_cnn),
}


@dataclass(frozen=True)
class Work:
    """A model, and clients with their samples on the device."""

    model: Multihead
    members: list[Member]
    device: torch.device
    engine: Engine

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def flops(self) -> int:
        """Floating-point operations of one epoch of all clients, as counted by torch."""
        counter, member = FlopCounterMode(display=False), self.members[0]
        self.model.cpu()
        with counter:
            F.cross_entropy(self.model(member.x[:BATCH].cpu())["label"], member.y[0][:BATCH].cpu()).backward()  # type: ignore[no-untyped-call]
        self.model.zero_grad()
        return counter.get_total_flops() * sum(len(m.x) for m in self.members) // BATCH


def make(name: str, clients: int, samples: int, engine: Engine) -> Work:
    """A workload with random samples, because the speed does not depend on their values."""
    with torch_seeded(0, "benchmark"):
        trunk, features = WORKLOADS[name][1](Task(), Inputs(SHAPE))
        model = Multihead(trunk, {"label": nn.Linear(features, CLASSES)}, {"label": False})
    device = torch.device(engine.device)
    members = []
    for client in range(clients):
        draw = torch_generator(0, "benchmark", client)
        x, y = torch.rand(samples, *SHAPE, generator=draw), torch.randint(CLASSES, (samples,), generator=draw)
        order = torch.randperm(samples, generator=draw)[None]
        members.append(Member(client, x.to(device), [y.to(device)], [None], order, BATCH, -(-samples // BATCH)))
    return Work(model, members, device, engine)


def plain(work: Work) -> Callable[[], None]:
    """Clients one after another, in plain PyTorch."""
    model = work.model.to(work.device)
    parameters: list[torch.Tensor] = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    total = [torch.zeros_like(p) for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=LR)
    half = work.engine.precision == "bfloat16"

    def run() -> None:
        for member in work.members:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            for index in torch.split(member.order[0].to(work.device), BATCH):
                optimizer.zero_grad()
                with torch.autocast(work.device.type, torch.bfloat16, enabled=half):
                    output = model(member.x[index])["label"]
                F.cross_entropy(output.float(), member.y[0][index]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=len(member.x))

    return run


def stacked(work: Work) -> Callable[[], None]:
    """Blocks of clients at once, as in `meadow run`."""
    targets = [Target("label", "class", CLASSES)]
    found = network(work.model.cpu(), SHAPE, targets, [1.0])
    experiment = load("fedavg", ["local.momentum=0"]).model_copy(update={"engine": work.engine})
    kernels, start = Stacked(found, experiment), state_of(work.model)
    blocks = [work.members[i : i + BLOCK] for i in range(0, len(work.members), BLOCK)]
    rates = dict.fromkeys(start, LR)
    weights = [[dict.fromkeys(start, float(len(m.x))) for m in block] for block in blocks]

    def run() -> None:
        for i in range(0, len(blocks), kernels.blocks_at_once):
            part = slice(i, i + kernels.blocks_at_once)
            kernels.train(start, blocks[part], rates, weights[part])

    return run


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least time of several runs, after two that warm up."""
    took, began = list[float](), time.perf_counter()
    while len(took) < 4 or time.perf_counter() < began + SHORTEST:
        at = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - at)
    return min(took[2:])


def matrix_rate(engine: Engine) -> float:
    """Operations a second of large products in the precision of the run."""
    device = torch.device(engine.device)
    size = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if engine.precision == "bfloat16" else torch.float32
    a, b = (torch.rand(size, size, device=device, dtype=kind) for _ in range(2))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b), device)


def copy_rate(engine: Engine) -> float:
    """Bytes a second, read and written, of copying 256 MB."""
    device = torch.device(engine.device)
    a = torch.zeros(2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / seconds(lambda: b.copy_(a), device)


def measure(names: Sequence[str], clients: int, samples: int, engine: Engine) -> Table:
    """A row for each workload."""
    matrix, copies = matrix_rate(engine), copy_rate(engine)
    title = f"{_device(engine)}, {engine.precision}: {matrix / 1e12:.2f} TFLOP/s, copies {copies / 1e9:.0f} GB/s"
    table = Table(title=f"{title}; {clients} clients of {samples} samples", title_justify="left", box=None)
    for heading in ("workload", "plain, clients/s", "stacked, clients/s", "times", "of matrix rate", "of copy rate"):
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for name in names:
        work = make(name, clients, samples, engine)
        flops = work.flops()
        slow, fast = seconds(plain(work), work.device), seconds(stacked(work), work.device)
        traffic = 3 * 4 * work.parameters * sum(member.steps for member in work.members)
        table.add_row(
            WORKLOADS[name][0],
            f"{clients / slow:,.0f}",
            f"{clients / fast:,.0f}",
            f"{slow / fast:.1f}",
            f"{flops / fast / matrix:.1%}",
            f"{traffic / fast / copies:.1%}",
        )
    return table


def _device(engine: Engine) -> str:
    return torch.cuda.get_device_name() if engine.device == "cuda" else "CPU, one thread"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=50)
    given = parser.parse_args()
    names = given.workloads or list(WORKLOADS)
    if unknown := [name for name in names if name not in WORKLOADS]:
        parser.error(f"there is no workload {unknown[0]}; there are {', '.join(WORKLOADS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU here; --device cpu runs the same code on the CPU", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(1)
    engine = Engine(device=given.device, precision=given.precision, exact=False)
    console = Console(width=120)
    console.print(measure(names, given.clients, given.samples, engine))
    if importlib.util.find_spec("pfl") is None:
        console.print("pfl-research is left out: it is not installed (pip install pfl, in an environment of its own)")


if __name__ == "__main__":
    main()
