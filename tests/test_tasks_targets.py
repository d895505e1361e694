"""The grammar of task.kinds, and the numbers that raw columns become."""

from typing import Any

import numpy as np
import pytest
import torch

from config.errors import UserError
from tasks.data import MISSING, Part, Raw, Target
from tasks.targets import encode, read_kind


def column(values: list[Any], kind: str = "", test: list[Any] | None = None) -> tuple[Target, list[Any]]:
    """A target of these raw values, and its numbers, of a data set whose test set has the same values."""
    array = np.array(values) if isinstance(values[0], list | int | float) else np.array(values, dtype=object)
    others = array if test is None else np.array(test, dtype=object)
    raw = Raw(
        "name",
        Part(torch.zeros(len(values), 1), {"y": array}, source="a.csv", lines=np.arange(2, len(values) + 2)),
        Part(torch.zeros(len(others), 1), {"y": others}, source="b.csv"),
    )
    (target,), train, _ = encode(raw, ("y",), {"y": kind} if kind else {})
    return target, train.y["y"].tolist()


@pytest.mark.parametrize(
    ("values", "kind", "names", "numbers"),
    [
        (["b", "a", "", "b"], "", ("a", "b"), [1, 0, MISSING, 1]),
        (["10", "9", "9.5"], "class", ("9", "9.5", "10"), [2, 0, 1]),
        ([3, 1, 3], "", ("1", "3"), [1, 0, 1]),
        ([2.0, float("nan"), 0.0], "", ("0", "2"), [1, MISSING, 0]),
        ([1, -1, 2], "class 3", ("0", "1", "2"), [1, MISSING, 2]),
        ([1, -1, 1], "class", ("-1", "1"), [1, 0, 1]),
        (["yes", "no", "no"], "class no yes", ("no", "yes"), [1, 0, 0]),
        (["3", "0", "", "1"], "class above 0", ("at most 0", "above 0"), [1, 0, MISSING, 1]),
        ([0.2, 0.9], "class above 0.5", ("at most 0.5", "above 0.5"), [0, 1]),
    ],
)
def test_classes_are_numbered_in_order(
    values: list[Any], kind: str, names: tuple[str, ...], numbers: list[int]
) -> None:
    target, found = column(values, kind)
    assert (target.kind, target.size, target.names, found) == ("class", len(names), names, numbers)


def test_a_class_that_only_the_test_set_has_is_a_class() -> None:
    target, _ = column(["a", "b"], test=["c"])
    assert target.names == ("a", "b", "c")


def test_classes_at_each_token_keep_their_shape() -> None:
    target, found = column([[0, 1, -1], [2, 2, 0]], "class 3")
    assert target.size == 3 and found == [[0, 1, MISSING], [2, 2, 0]]


def test_labels_from_cells_and_from_rows() -> None:
    target, found = column(["a|b", "b", "", "c | a"], "labels")
    assert target.kind == "labels" and target.names == ("a", "b", "c")
    assert found[0] == [1, 1, 0] and found[1] == [0, 1, 0] and found[3] == [1, 0, 1]
    assert all(np.isnan(found[2]))
    target, found = column([[0, 1], [1, 1]], "labels rain snow")
    assert target.names == ("rain", "snow") and found == [[0, 1], [1, 1]]


def test_values_and_quantiles_keep_their_unit() -> None:
    target, found = column(["1.5", "", "-2"], "value scale 4 offset 10")
    assert (target.kind, target.size, target.scale, target.offset) == ("value", 1, 4.0, 10.0)
    assert found[0] == 1.5 and np.isnan(found[1]) and found[2] == -2
    target, found = column([0.25, 1.0], "quantiles 0.1 0.5 0.9 scale 2")
    assert (target.kind, target.size, target.quantiles, target.scale) == ("quantiles", 3, (0.1, 0.5, 0.9), 2.0)
    assert found == [0.25, 1.0]
    assert column([0.25, 1.75])[0].kind == "value"  # numbers that are not whole are values by themselves


def test_weights_are_read() -> None:
    assert read_kind("y", "class 3 weights 1 2 5").weights == (1.0, 2.0, 5.0)
    assert read_kind("y", "labels a b balanced").balanced
    assert column([0, 1, 2], "class 3 weights 1 2 5")[0].weights == (1.0, 2.0, 5.0)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("number", "begins with one of class, labels, value, quantiles"),
        ("", "begins with one of"),
        ("class scale 2", '"scale" does not go with class'),
        ("value above 2", '"above" does not go with value'),
        ("value 3", '"3" is not understood'),
        ("value scale", '"scale" takes one number'),
        ("value scale 1 2", '"scale" takes one number'),
        ("value scale 0", "positive"),
        ("value scale x", '"x" is not a number'),
        ("value scale 1 scale 2", "stands twice"),
        ("class weights 1 -2", "positive"),
        ("class weights 1 2 balanced", "not both"),
        ("quantiles", "rising order"),
        ("quantiles 0.5 0.1", "rising order"),
        ("quantiles 0 0.5", "rising order"),
        ("quantiles 0.5 0.5", "rising order"),
    ],
)
def test_a_kind_that_is_not_understood_is_told(kind: str, why: str) -> None:
    with pytest.raises(UserError, match=f'task.kinds = "{kind}" for the target "y".*{why}'):
        read_kind("y", kind)


@pytest.mark.parametrize(
    ("values", "kind", "why"),
    [
        (["a", "b", "x"], "class a b", 'a.csv, line 4, has "x"'),
        ([0, 1, 7], "class 3", 'a.csv, line 4, has "7"'),
        (["a", "a"], "class", "1 distinct values"),
        (["1", "two"], "value", 'a.csv, line 3, has "two", which is not a number'),
        (["1", "two"], "class above 1", 'a.csv, line 3, has "two"'),
        (["a", "a|z"], "labels a b", 'a.csv, line 3, has "z"'),
        ([[0, 2], [1, 1]], "labels", "0 and 1"),
        ([[0, 1], [1, 1]], "labels a b c", "rows have 2 entries, not 3"),
        ([0, 1], "class 2 weights 1 2 3", "3 weights for 2 classes"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_its_place(values: list[Any], kind: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        column(values, kind)


def test_a_target_that_the_data_has_not_is_told() -> None:
    part = Part(torch.zeros(1, 1), {"a": np.array([0]), "b": np.array([1])})
    with pytest.raises(UserError, match='no target "y"; it has a, b'):
        encode(Raw("name", part, part), ("y",), {})
    with pytest.raises(UserError, match=r'task\.test: the test set of "name" has no column "a"'):
        encode(Raw("name", part, Part(part.x, {"b": part.columns["b"]})), ("a",), {})
