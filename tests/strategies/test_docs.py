"""docs/strategies.md: its own strategy runs and does what it says, and it names every algorithm and setting."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import run_inline, small
from helpers.worlds import N, data, experiment, gradient, mean, run, same, start, step
from meadow.arrays.named import of_kind
from meadow.config.algorithms import ALGORITHMS
from meadow.config.load import preset_names
from meadow.config.rules.privacy import EXAMPLE
from meadow.config.schema import SHARES, Attack, Cohort, Strategy
from meadow.runtime.errors import UserError
from meadow.strategies import algorithm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "strategies.md").read_text()


def test_the_documented_strategy_runs_by_its_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "lookahead.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    beta = 0.6
    plan = experiment(
        "strategy.name=lookahead:LOOKAHEAD", "strategy.mu=0.3", f"strategy.server_momentum={beta}", "run.rounds=3"
    )
    w = start(plan)
    v = {n: np.zeros_like(x) for n, x in w.items()}
    for _ in range(3):
        ends = []
        for c in (0, 1):
            y = w
            for _ in range(2):
                g = gradient(y, data(plan, c))
                y = step(y, {n: g[n] + 0.3 * (y[n] - w[n]) for n in g})
            ends.append(y)
        delta = {n: x - w[n] for n, x in mean(ends, N).items()}
        v = {n: beta * v[n] + delta[n] for n in w}
        w = {n: w[n] + delta[n] + beta * v[n] for n in w}
    found = run(plan, tmp_path / "run")
    same(found.arrays, w)
    same(of_kind("v", found.strategy), v)
    sys.modules.pop("lookahead")


def test_the_documented_strategy_runs_under_dp_as_what_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FedProx does, for the same epsilon; without the declaration it is refused, and a false one fails in the round."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "lookahead.py").write_text(code)
    (tmp_path / "silent.py").write_text(code.replace(", trains_once=True", ""))
    (tmp_path / "twice.py").write_text(code.replace("        fitted =", "        context.fit()\n        fitted ="))
    monkeypatch.syspath_prepend(str(tmp_path))
    given = (*EXAMPLE, "strategy.mu=0.3", "strategy.server_momentum=0", "run.rounds=2")
    plans = [small("fedavg", *given, f"strategy.name={name}") for name in ("lookahead:LOOKAHEAD", "fedprox")]
    ours, theirs = (run_inline(plan, tmp_path / str(place)) for place, plan in enumerate(plans))
    assert ours["status"] == theirs["status"] == "done"
    assert ours["privacy"]["epsilon"] == theirs["privacy"]["epsilon"]
    with pytest.raises(UserError, match=r"privacy\.unit.*strategy\.name"):
        small("fedavg", *given, "strategy.name=silent:LOOKAHEAD")
    failed = run_inline(small("fedavg", *given, "strategy.name=twice:LOOKAHEAD"), tmp_path / "twice")
    assert failed["status"] == "stopped" and failed["rounds"] == 0
    for name in ("lookahead", "silent", "twice"):
        sys.modules.pop(name)


def test_no_other_file_asks_for_an_algorithms_name() -> None:
    """What is true of an algorithm stands in its own file: no other compares `strategy.name`, or anything, with a name."""
    some = "|".join(ALGORITHMS)
    asks = re.compile(rf"""strategy\.name *(==|!=|in [^A])|(==|!=|\bin) *[(\[{{]? *["']({some})["']""")
    found = []
    for room in ("strategies", "client", "server", "simulation", "meadow"):
        for path in (ROOT / room).rglob("*.py"):
            if path.parent != ROOT / "strategies" / "algorithms":
                lines = enumerate(path.read_text().splitlines(), 1)
                found += [f"{path.relative_to(ROOT)}:{number}" for number, line in lines if asks.search(line)]
    assert found == []


def test_every_name_and_setting_is_on_the_page() -> None:
    names = [*ALGORITHMS, *SHARES, *Strategy.model_fields, *Cohort.model_fields]
    names += Attack.model_fields["kind"].annotation.__args__[1:]  # type: ignore[union-attr]
    missing = [
        name for name in names if name not in ("name", "timeout") and not re.search(rf"\b{re.escape(name)}\b", PAGE)
    ]
    assert missing == []


def test_every_algorithm_has_a_preset() -> None:
    assert ALGORITHMS.keys() <= set(preset_names())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:X", "No module named 'nowhere'"),
        ("meadow.strategies.algorithms.fedavg:NONE", "has no attribute 'NONE'"),
        ("meadow.strategies.algorithms.fedavg:FedAvg", "must be a meadow.strategies.protocol.Algorithm"),
    ],
)
def test_what_is_no_strategy_is_named(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        algorithm(name)
    assert words in str(caught.value) and f'strategy.name = "{name}"' in str(caught.value)
