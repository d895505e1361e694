"""Compare the speed of stacked clients on a GPU (`engine.device = "cuda"`) with the plain PyTorch loop on the same device.

    python -m benchmarks.gpu [--device cuda|cpu] [--precision float32|bfloat16] [--clients N] [--samples N] [workload ...]

Both train every client from the same model for one epoch of plain SGD, batches of 20, samples on the device, and sum the
results. "of matrix rate" compares the models' products with the device's measured rate of large products, "of copy rate" the
unavoidable memory traffic (in each step, parameters read twice and written once) with its measured copy rate. Without a GPU
the exit status is 2; `--device cpu` runs the same code on the CPU.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from rich.console import Console

from meadow.arrays.sums import BLOCK
from meadow.benchmarks.output import Row, chosen, options, table
from meadow.benchmarks.workloads import BATCH, CLIENTS, LR, SAMPLES, WORKLOADS
from meadow.client.trainers.kernel import Member
from meadow.client.trainers.network import network
from meadow.client.trainers.stacked import Stacked
from meadow.config.load import load
from meadow.config.schema import Engine, Task
from meadow.runtime.seeds import torch_generator
from meadow.tasks.data import Target
from meadow.tasks.evaluation import state_of
from meadow.tasks.models.multihead import Multihead, build

TARGET = Target("label", "class", 10)
NAMES = ("mlp", "small-cnn", "large-cnn")
SHORTEST = 0.5
"""The shortest duration of a measurement, in seconds."""


@dataclass(frozen=True)
class Work:
    """A model, and clients with their samples on the device."""

    model: Multihead
    members: list[Member]
    device: torch.device
    engine: Engine


def make(name: str, clients: int, samples: int, engine: Engine) -> Work:
    """A workload of `benchmarks/workloads.py` for as many clients and samples."""
    work, device = WORKLOADS[name], torch.device(engine.device)
    model = cast(Multihead, build(Task(model=work.model, hidden=work.hidden), (TARGET,), work.inputs))
    members = []
    for client in range(clients):
        x, y = work.samples(samples, f"client {client}")
        order = torch.randperm(samples, generator=torch_generator(0, "order", client))[None]
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
    found = network(work.model.cpu(), work.members[0].x.shape[1:], [TARGET], [1.0])
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


def measure(name: str, clients: int, samples: int, engine: Engine, matrix: float, copies: float) -> Row:
    """A row for a workload, given the device's rates."""
    work, found = make(name, clients, samples, engine), WORKLOADS[name]
    slow, fast = seconds(plain(work), work.device), seconds(stacked(work), work.device)
    flops = found.flops() * clients * samples / (CLIENTS * SAMPLES)
    size = sum(p.numel() for p in work.model.parameters())
    traffic = 3 * 4 * size * sum(member.steps for member in work.members)
    return {
        "workload": found.title,
        "plain, clients/s": clients / slow,
        "stacked, clients/s": clients / fast,
        "times": slow / fast,
        "of matrix rate": flops / fast / matrix,
        "of copy rate": traffic / fast / copies,
    }


COLUMNS = {"workload": "", "plain, clients/s": ",.0f", "stacked, clients/s": ",.0f", "times": ".1f",
           "of matrix rate": ".1%", "of copy rate": ".1%"}  # fmt: skip


def _device(engine: Engine) -> str:
    return torch.cuda.get_device_name() if engine.device == "cuda" else "CPU, one thread"


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, "workload", NAMES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=50)
    given = parser.parse_args()
    names = chosen(parser, given.names, NAMES)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU here; --device cpu runs the same code on the CPU", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(1)
    engine = Engine(device=given.device, precision=given.precision, exact=False)
    matrix, copies = matrix_rate(engine), copy_rate(engine)
    rows = [measure(name, given.clients, given.samples, engine, matrix, copies) for name in names]
    title = (
        f"{_device(engine)}, {engine.precision}: {matrix / 1e12:.2f} TFLOP/s, copies {copies / 1e9:.0f} GB/s; "
        f"{given.clients} clients of {given.samples} samples"
    )
    console = Console(width=120)
    console.print(table(title, COLUMNS, rows))
    if importlib.util.find_spec("pfl") is None:
        console.print("pfl-research is left out: it is not installed (pip install pfl, in an environment of its own)")


if __name__ == "__main__":
    main()
