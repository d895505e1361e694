"""What no experiment needs is refused before it costs time or memory: sizes, depths, names that no file has."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from helpers.refusals import refused
from meadow.config.load import DEEPEST, LARGEST_FILE, flatten, read_tree, to_tree
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.strategies.check import load, resolve

WHOLE = sorted(key for key, value in flatten(to_tree(Experiment())) if type(value) is int)


@pytest.mark.parametrize("key", WHOLE)
def test_every_number_of_things_has_a_limit(key: str) -> None:
    section, _, name = key.partition(".")
    for number in (2**63, 10**300):
        with refused(key):
            resolve({section: {name: number}})
    with refused(key):
        load("fedavg", [f"{key}={'9' * 5000}"])


def test_the_limits_are_in_the_schema() -> None:
    def limited(model: type[BaseModel], key: str) -> bool:
        schema = model.model_json_schema()["properties"][key]
        return "maximum" in schema or "exclusiveMaximum" in schema

    sections: dict[str, Any] = {name: field.annotation for name, field in Experiment.model_fields.items()}
    assert [key for key in WHOLE if not limited(sections[key.partition(".")[0]], key.partition(".")[2])] == []


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 500 + "]" * 500,
        "[task]\nroot = " + "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1),
        "[task]\n" + ".".join("a" * 1900) + " = 1",
        ".".join("a" * 50_000) + " = 1",
        "#" * (LARGEST_FILE + 1),
        f"[run]\nrounds = {'9' * 5000}",
        "".join(f"run.k{i} = 1\n" for i in range(4000)),
    ],
    ids=["brackets", "lists", "a dotted key", "a long dotted key", "a large file", "digits", "unknown keys"],
)
def test_what_would_exhaust_a_parser_is_refused_in_a_few_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "e.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "e.toml")
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("value", ["a" * 300, "x/" + "a" * 256 + "/y", "a\0b", "b/" * 2500])
@pytest.mark.parametrize(
    "key", ["task.root", "task.vocabulary", "cohort.schedule", "anchor.teacher", "task.pretrained"]
)
def test_a_name_that_no_file_has_is_refused(key: str, value: str) -> None:
    section, _, name = key.partition(".")
    with refused(key):
        resolve({section: {name: value}})


@pytest.mark.parametrize(
    "override", ["task.root=\udcff", "task.\x1b[2J=1", ".".join("a" * 50_000) + "=1", "run.name=.."]
)
def test_an_override_that_is_no_text_or_no_setting_is_refused(override: str) -> None:
    with refused():
        load("fedavg", [override])


def test_an_experiment_is_a_regular_file(tmp_path: Path) -> None:
    for place in ("/dev/zero", "/dev/null", "/proc/self/mem", str(tmp_path), "a" * 300, "a" * 300 + ".toml"):
        with refused(place[:200]):
            read_tree(place)
