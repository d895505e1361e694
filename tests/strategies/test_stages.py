"""Stages of an update: the documented one by hand, what leaves and what is kept, and where a stage may stand."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.rounding import close, floats
from helpers.runs import RESUMED, run_inline, small
from helpers.worlds import N, State, data, descend, experiment, run, same, start, stored
from meadow.arrays.named import Arrays, of_kind
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.server.attempt import restored
from meadow.strategies.roles import roles
from meadow.strategies.stages import AtClient, Left, Stage, Stages, stages_of
from meadow.strategies.wire.packing import Answer, Values
from meadow.tasks.start import initial_state

PAGE = (Path(__file__).parents[2] / "docs" / "stages.md").read_text()


class Plain(Stage):
    """Leaves everything as it is, and may stand anywhere."""

    name, before_noise = "plain", True


class Half(Stage):
    """Sends half of each move, in the form of the model; the server doubles it."""

    name, sums = "half", False

    def leave(self, update: Arrays, at: AtClient) -> Left:
        return Left({f"{n}/half": np.divide(v, 2) for n, v in update.items()})

    def restore(self, update: Arrays, received: Arrays) -> Arrays:
        return {n.removesuffix("/half"): v * 2 for n, v in update.items()}


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The documented module, on the path."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "sparse.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "user"))
    yield importlib.import_module("sparse")
    sys.modules.pop("sparse")


def test_the_documented_stage_is_top_k_with_error_feedback(tmp_path: Path, sparse: Any) -> None:
    """By hand: e is what a client has not sent so far; it sends the largest entry of e + y - x of each array (a tenth of
    four, of two and of one), and the server adds the mean of these."""
    plan = experiment("strategy.stages=sparse:TopK", "run.rounds=3")
    w = start(plan)
    rest: list[State] = [{name: np.zeros_like(x) for name, x in w.items()} for _ in N]
    for _ in range(3):
        left = []
        for c in (0, 1):
            y, sent = descend(w, data(plan, c)), {}
            for name in w:
                e = rest[c][name] + y[name] - w[name]
                sent[name] = np.where(np.abs(e) == np.abs(e).max(), e, 0.0)
                rest[c][name] = e - sent[name]
            left.append(sent)
        w = {name: x + (N[0] * left[0][name] + N[1] * left[1][name]) / sum(N) for name, x in w.items()}
    found = run(plan, tmp_path / "run")
    same(found.arrays, w)
    for c in (0, 1):
        memory = stored(tmp_path / "run", c, 3)
        (kind,) = {name.partition("@")[0] for name in memory}
        same(of_kind(kind, memory), rest[c])
    # A place is four bytes, a value eight; of each of three arrays one leaves each of two clients.
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [record["bytes_up"] for record in records] == [2 * 3 * (4 + 8)] * 3
    assert all(record["bytes_down"] == 2 * 8 * sum(x.size for x in w.values()) for record in records)


def test_what_is_not_sent_is_kept(sparse: Any) -> None:
    """received + what leaves, restored, and what is kept are together what was trained and what was kept before."""
    draw = np.random.default_rng(0)
    received: Arrays = {"w": draw.normal(size=(7, 9)).astype(np.float32)}
    trained: Arrays = {"w": draw.normal(size=(7, 9)).astype(np.float32)}
    memory: Arrays = {"w": draw.normal(size=(7, 9))}
    stage = sparse.TopK()
    left = stage.leave(trained, AtClient(0, 1, received, {"w": 1.0}, memory=memory))
    assert left.arrays["w/places"].shape == left.arrays["w/values"].shape == (6,)
    restored_ = stage.restore(left.arrays, received)
    whole = floats(trained)["w"] + floats(memory)["w"]
    # The values travel in float32, and so does the sum: two roundings.
    close(restored_["w"] + left.memory["w"], whole, 2, terms=np.abs(received["w"]) + np.abs(whole))


def test_stages_are_undone_in_reverse(tmp_path: Path) -> None:
    """Halving is exact in floating point, so the bits are those of a run without it, however often."""
    expected = run_inline(small("scaffold"), tmp_path / "without")
    name = f"{__name__}:Half"
    summary = run_inline(small("scaffold", f"strategy.stages={name},{__name__}:Plain,{name}"), tmp_path / "with")
    assert [summary[key] for key in RESUMED] == [expected[key] for key in RESUMED]
    assert summary["cost"]["bytes_up"] == expected["cost"]["bytes_up"]


def test_an_update_that_cannot_be_restored_costs_its_client_alone(sparse: Any) -> None:
    sent: Arrays = {"w": np.zeros(30, np.float32)}
    stages = Stages([sparse.TopK()])
    metrics: dict[str, Values] = {"metrics": {"num-examples": 10}}
    good: Arrays = {"w/places": np.array([3], np.int32), "w/values": np.array([2.0], np.float32)}
    bad: list[Arrays] = [
        {"w/places": np.array([30], np.int32), "w/values": np.array([2.0], np.float32)},
        {"w/places": np.array([3], np.int32)},
    ]
    answers = [Answer(c, metrics, arrays) for c, arrays in enumerate([good, *bad])]
    found = restored(stages, 1, answers, dict.fromkeys(range(3), sent), dict.fromkeys(range(3), 10))
    assert found[0].arrays is not None and found[0].arrays["w"][3] == 2 and found[0].values == metrics
    assert [answer.values for answer in found[1:]] == [None, None]
    assert all("top-k" in answer.error for answer in found[1:])


LOCAL = ("privacy.unit=local", "privacy.noise_multiplier=0.5", "privacy.accountant=rdp")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "cohort.sampling=poisson", "cohort.fraction=0.5")


def stages(plan: Experiment) -> Stages:
    return stages_of(plan, roles(plan, initial_state(plan)))


@pytest.mark.usefixtures("sparse")
def test_a_stage_that_reads_updates_before_the_noise_must_say_that_it_may() -> None:
    with pytest.raises(UserError, match=r'privacy\.unit = "client".*before_noise'):
        stages(small("fedavg", *CLIENT, "strategy.stages=sparse:TopK"))
    for unit in (CLIENT, LOCAL, ()):
        assert [stage.name for stage in stages(small("fedavg", *unit, f"strategy.stages={__name__}:Plain"))][
            -1
        ] == "plain"
    names = [stage.name for stage in stages(small("fedavg", *LOCAL, "strategy.stages=sparse:TopK"))]
    assert names.index("local-noise") < names.index("top-k")


@pytest.mark.parametrize("settings", [CLIENT, LOCAL], ids=["client", "local"])
def test_a_stage_that_changes_nothing_changes_no_bits_under_dp(settings: tuple[str, ...], tmp_path: Path) -> None:
    """But for the noise of local DP, which is of the experiment and so of its stages: there a run says what left."""
    name = f"{__name__}:Plain"
    summary = run_inline(small("fedavg", *settings, f"strategy.stages={name}"), tmp_path / "with")
    assert summary["status"] == "done"
    (left,) = [each for each in summary["privacy"]["releases"] if "plain" in each["what"]]
    if settings == CLIENT:
        expected = run_inline(small("fedavg", *settings), tmp_path / "without")
        assert summary["model_sha256"] == expected["model_sha256"] and left["mechanism"] == "not protected"
    else:
        assert left["mechanism"] != "not protected"


def test_a_stage_needs_an_update_that_leaves() -> None:
    for settings in (("strategy.share=none",), ("run.placement=local",), ("run.placement=pooled",)):
        with pytest.raises(UserError, match=r"strategy\.stages"):
            small("fedavg", f"strategy.stages={__name__}:Plain", *settings)


@pytest.mark.parametrize("name", ["nowhere:X", f"{__name__}:PAGE"])
def test_what_is_no_stage_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f'strategy.stages = "{name}"')):
        stages(small("fedavg", f"strategy.stages={name}"))
