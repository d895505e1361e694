"""The experiment file: what is read comes back, what is wrong is named with the way out, seeds never collide."""

import hashlib
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.refusals import refused
from meadow.config.load import flatten, from_flat, preset_names, read_tree, to_flat, to_toml, to_tree
from meadow.config.schema import Experiment, Strategy
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import derive, torch_generator, torch_seeded
from meadow.strategies.check import load


@pytest.mark.parametrize("name", preset_names())
def test_resolved_experiment_round_trips(name: str, tmp_path: Path) -> None:
    experiment = load(name, ["task.targets=slant,digit", "local.lr=1"])
    path = tmp_path / "experiment.toml"
    path.write_text(to_toml(experiment))
    assert load(path) == experiment
    assert from_flat(to_flat(experiment)) == experiment


def test_flower_declares_every_key_with_its_default() -> None:
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    flat = {
        f"{section}.{key}": value
        for section, keys in declared.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    assert flat == to_flat(Experiment())
    assert {k: v for k, v in declared.items() if not isinstance(v, dict)} == {"out": "", "resume": False}


def test_presets_differ_in_axis_values_only() -> None:
    axes = {"run.name", "run.placement", "task.learn", "task.pretrained", "local.trunk_lr_factor"}
    axes |= {"local.trainable", "local.lora_share", "local.gradual_every"}
    axes |= {"anchor.l2", "anchor.ewc", "anchor.kl", "anchor.distill", "task.trunks", "local.balance"}
    axes |= {"adapt.method", "adapt.weight", "adapt.labels"}
    axes |= {f"strategy.{key}" for key in Strategy.model_fields} | {"evaluate.fine_tune_epochs"}
    for name in preset_names():
        keys = {key for key, _ in flatten(read_tree(name))}
        assert keys <= axes, name
        assert read_tree(name)["run"]["name"] == name


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.round=3", ["run.round", "did you mean run.rounds"]),
        ("rn.rounds=3", ["rn", "did you mean run"]),
        ("run.rounds=many", ["run.rounds = 'many'", "integer"]),
        ("run.rounds=2.5", ["run.rounds = 2.5", "integer"]),
        ("local.lr=-1", ["local.lr = -1", "greater than 0"]),
        ("local.lr=nan", ["local.lr = nan"]),
        ("strategy.share=bodi", ["strategy.share = 'bodi'", "did you mean body"]),
        ("cohort.size=50", ["cohort.size = 50", "partition.clients = 20", "smaller"]),
        ("cohort.quorum=21", ["cohort.quorum = 21", "smaller"]),
        ("partition.parts=0.5,0.5", ["partition.parts = [0.5, 0.5]", "three"]),
        ("task.learn=size", ['task.learn = "size"', "digit"]),
        ("task.target_weights=1,2,3", ["task.target_weights", "digit"]),
        ("evaluate.on=server", ["evaluate.on = ['server']", "clients"]),
        ("local.trainable=head", ['strategy.share = "body"', 'local.trainable = "head"']),
        ("rounds=3", ["rounds=3", "section.key=value"]),
        ("local.learning_rate=0.1", ["local.learning_rate", "did you mean local.lr?"]),
        ("run.Rounds=3", ["run.Rounds", "did you mean run.rounds?"]),
        ("task.channels=rgb", ['task.channels = "rgb"', 'task.dataset = "digits"', "grey"]),
        ("task.image_size=32", ["task.image_size = 32", "8 x 8"]),
    ],
)
def test_wrong_input_is_named_with_a_way_out(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("fedper", [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load("fedper", ["run.rounds=0", "local.lr=0", "partition.law=dirichlett"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["cohort.size=30", "engine.trainer=fast"], ["engine.trainer", "cohort.size"]),
        (["cohort.size=30", "partition.clients=-1"], ["partition.clients"]),  # the default of 20 is nobody's setting
    ],
)
def test_a_wrong_value_hides_no_broken_rule_but_those_about_itself(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("fedavg", overrides)
    assert [line.split(" = ")[0] for line in str(caught.value).splitlines()] == named


@pytest.mark.parametrize("name", ["fedpr", "nowhere.toml", "a/b"])
def test_unknown_experiment(name: str) -> None:
    with pytest.raises(UserError, match=name):
        load(name)


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[run\n")
    with refused(path):
        load(path)


def test_a_file_whose_name_no_run_may_have(tmp_path: Path) -> None:
    path = tmp_path / "my first (try).toml"
    path.write_text("[run]\nrounds = 3\n")
    assert load(path).run.name == "my-first-try-"


def test_switching_placement_alone_is_enough() -> None:
    for name in ("transfer", "finetune", "multitask"):
        assert load(name).share == "none"
        federated = load(name, ["run.placement=federated"])
        assert to_tree(federated) | {"run": {}} == to_tree(load(f"federated-{name}")) | {"run": {}}


@given(st.lists(st.one_of(st.integers(0, 20), st.text("ab1,:", max_size=3)), max_size=4), st.integers(0, 3))
def test_derive_depends_on_every_argument_and_never_on_how_they_join(path: list[int | str], seed: int) -> None:
    value = derive(seed, "p", *path)
    assert value == derive(seed, "p", *path)
    assert 0 <= value < 2**63
    assert value != derive(seed + 1, "p", *path)
    assert value != derive(seed, "p", *path, 0)
    joined = "".join(map(str, path))
    if len(path) > 1:
        assert value != derive(seed, "p", joined)


def test_derive_is_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(b"int:1:7str:7:shuffleint:1:3int:1:5").digest()
    assert derive(7, "shuffle", 3, 5) == int.from_bytes(digest[:8], "little") // 2 == 5882150759065443081


def test_seeding_torch_leaves_no_trace() -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch_seeded(5, "x"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with torch_seeded(5, "x"):
        assert torch.equal(torch.rand(3), inside)
    assert not torch.equal(torch.rand(3, generator=torch_generator(5, "x")), expected)
