"""A frozen trunk's cached features: the same as computing them, forgotten when the trunk changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.runs import run_inline, small
from meadow.arrays.files import read_arrays
from meadow.strategies.check import load
from meadow.tasks.evaluation import evaluate, load_into, predict
from meadow.tasks.features import view
from meadow.tasks.models.multihead import Multihead
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

EXPERIMENT = load("transfer", ["partition.clients=4", "task.source_samples=200", "task.source_epochs=1"])


def test_heads_on_cached_features_are_the_model_on_samples() -> None:
    task = open_task(EXPERIMENT)
    model = task.new_model()
    seen, data = view(task, model, frozen=True), task.client(0).test
    kept = seen.data("0/test", data)
    assert seen.data("0/test", data) is kept
    assert seen.model.state_dict().keys() == {n for n in model.state_dict() if n.startswith("heads.")}
    for name, output in predict(model, data.x, task.prepare).items():
        assert torch.equal(predict(seen.model, kept.x, seen.task.prepare)[name], output)


def test_features_of_another_trunk_are_made_anew() -> None:
    task = open_task(EXPERIMENT)
    model = task.new_model()
    assert isinstance(model, Multihead)
    seen, data = view(task, model, frozen=True), task.client(0).test
    before = seen.data("0/test", data)
    with torch.no_grad():
        model.trunk.get_parameter("linear2.bias").add_(1e-3)
    after = seen.data("0/test", data)
    assert torch.equal(after.x, model.trunk(data.x)) and not torch.equal(after.x, before.x)


@pytest.mark.parametrize(("frozen", "augment"), [(False, []), (True, ["flip"])])
def test_a_trunk_that_learns_or_sees_changing_samples_is_not_cached(frozen: bool, augment: list[str]) -> None:
    task = open_task(EXPERIMENT)
    task = replace(task, settings=task.settings.model_copy(update={"augment": tuple(augment)}))
    model = task.new_model()
    seen = view(task, model, frozen)
    assert seen.model is model and seen.data("x", task.client(0).test) is task.client(0).test


def test_a_pooled_head_alone_is_scored_on_the_trunk_that_it_was_trained_on(tmp_path: Path) -> None:
    experiment = small("transfer", "run.placement=pooled")
    summary = run_inline(experiment, tmp_path)
    task, model = open_task(experiment), open_task(experiment).new_model()
    arrays = read_arrays(next(iter(sorted((tmp_path / "checkpoints").glob("*0003*.safetensors")))))
    assert arrays.keys() == {n for n in model.state_dict() if n.startswith("heads.")}
    load_into(model, initial_state(experiment) | arrays)
    scores = evaluate(model, task.dataset.test, task)
    assert summary["metrics"]["global"]["digit"]["accuracy"] == scores["digit/accuracy"]
