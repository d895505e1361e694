"""The benchmarks compare like with like: every engine's model is the same function with the same gradients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.runs import small
from meadow.benchmarks.profile import measure
from meadow.benchmarks.workloads import BATCH, WORKLOADS
from meadow.config.schema import Task
from meadow.runtime.clock import PHASES
from meadow.runtime.identity import ROOT
from meadow.tasks.data import Target
from meadow.tasks.models.multihead import build


@pytest.mark.parametrize("name", WORKLOADS)
def test_meadows_model_is_the_plain_one(name: str) -> None:
    """In float64, so that what differs is the function, not its rounding."""
    work = WORKLOADS[name]
    task = Task(model=work.model, hidden=work.hidden)
    own = build(task, (Target("label", "class", work.classes),), work.inputs).double()
    plain = work.network().double()
    pairs = list(zip(own.parameters(), plain.parameters(), strict=True))
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
    x, y = work.client(0)
    x, y = (x.double() if x.is_floating_point() else x)[:BATCH], y[:BATCH]
    outputs = own(x)["label"], plain(x)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        F.cross_entropy(output, y).backward()  # type: ignore[no-untyped-call]
    for a, b in pairs:
        assert a.grad is not None and b.grad is not None and b.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "parameters"), [("mlp", 159_010), ("small-cnn", 61_706), ("large-cnn", 1_663_370)])
def test_the_models_have_the_sizes_that_the_tables_name(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in WORKLOADS[name].network().parameters()) == parameters


def test_the_operations_of_a_round_are_counted() -> None:
    """The MLP: 2 x 159,000 products and sums a sample forward, as many for the weights' gradients, and 2 x 2,000 more for
    the hidden layer's; the samples themselves need no gradient."""
    weights = 784 * 200 + 200 * 10
    assert WORKLOADS["mlp"].flops() == 6000 * (2 * 2 * weights + 2 * 200 * 10)


@pytest.mark.parametrize("settings", [("cohort.size=3", "strategy.share=body"), ("run.placement=pooled",)])
def test_a_rounds_phases_are_measured(settings: tuple[str, ...]) -> None:
    """That they add up to the whole is the clock's (tests/runtime/test_clock.py); their share is in the printed table."""
    phases, wall = measure(small("fedavg", "engine.name=inline", "run.rounds=4", *settings))
    assert tuple(phases) == PHASES and all(seconds >= 0 for seconds in phases.values())
    assert phases["train"] > 0 and wall > 0


def test_a_worker_finds_the_models_and_data_sets_of_benchmarks_and_documents(tmp_path: Path) -> None:
    """It starts in another folder, and a dependency brings a package named `benchmarks`."""
    code = """
import sys
from meadow.benchmarks.workloads import WORKLOADS, settings
from meadow.config.load import flatten, read_tree
from meadow.runtime.objects import user_object
experiments = [settings(name, 1) for name in WORKLOADS] + [dict(flatten(read_tree(path))) for path in sys.argv[1:]]
for experiment in experiments:
    for key in ("task.dataset", "task.model", "strategy.name"):
        if ":" in str(experiment.get(key, "")):
            user_object(key, experiment[key])
"""
    examples = sorted((ROOT / "docs" / "examples").glob("*.toml"))
    assert examples
    done = subprocess.run(
        [sys.executable, "-c", code, *examples], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
