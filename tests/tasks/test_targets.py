"""The grammar of task.kinds, and the numbers that raw columns become."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers.refusals import refused
from meadow.runtime.errors import UserError
from meadow.tasks.data import MISSING, Data, Part, Raw, Target
from meadow.tasks.targets import encode, read_kind

NAN = float("nan")


def of(column: Any, kind: str = "", test: Any = None, tokens: int = 0, reader: str = "") -> tuple[Target, Data]:
    """The target "t" of this column (a list of texts becomes one of objects, as a table gives it) and its pool."""

    def part(values: Any) -> Part:
        values = np.array(values, dtype=object) if isinstance(values, list) and isinstance(values[0], str) else values
        array = np.asarray(values)
        x = torch.zeros(array.shape if tokens else (len(array), 2))
        return Part(x, {"t": array}, source="file.csv", lines=np.arange(len(array)) * 10 + 20)

    raw = Raw("raw", part(column), part(column if test is None else test), {"t": reader} if reader else {}, tokens)
    (target,), train, _ = encode(raw, ("t",), {"t": kind} if kind else {})
    return target, train


def numbers(column: Any, kind: str = "", **more: Any) -> list[Any]:
    return of(column, kind, **more)[1].y["t"].tolist()


def test_every_word_of_the_grammar_is_read() -> None:
    kind = read_kind("t", "class no yes above 0.5 weights 1 2.5")
    assert (kind.kind, kind.words, kind.above, kind.weights, kind.balanced) == (
        "class", ("no", "yes"), 0.5, (1.0, 2.5), False,
    )  # fmt: skip
    assert read_kind("t", "labels balanced").balanced and not read_kind("t", "labels").balanced
    value = read_kind("t", "value offset -4 scale 1e2")
    assert (value.scale, value.offset, value.words) == (100.0, -4.0, ())
    assert (read_kind("t", "value").scale, read_kind("t", "value").offset) == (1.0, 0.0)
    levels = read_kind("t", "quantiles 0.1 0.5 0.9 scale 2")
    assert (levels.words, levels.scale) == (("0.1", "0.5", "0.9"), 2.0)


WRONG = (
    "",
    "klass 5",
    "class above",
    "class above 1 2",
    "class above high",
    "class above nan",
    "class 3 above 0",
    "class a a",
    "class 2 weights",
    "class 2 weights 1 two",
    "class 2 weights 1 0",
    "class 2 weights 1 2 weights 1 2",
    "class 2 weights 1 2 balanced",
    "class balanced 3",
    "class scale 2",
    "labels above 0",
    "value weights 1",
    "quantiles 0.5 balanced",
    "value scale",
    "value scale 0",
    "value scale -1",
    "value offset 1 2",
    "value 5",
    "quantiles",
    "quantiles 0.5 0.1",
    "quantiles 0.5 0.5",
    "quantiles 0 0.5",
    "quantiles 0.5 1",
    "quantiles half",
)


@pytest.mark.parametrize("text", WRONG)
def test_a_kind_that_is_wrong_is_told_with_its_target(text: str) -> None:
    with refused(f'task.kinds = "{text}"', "age"):
        read_kind("age", text)


# classes


def test_classes_are_the_distinct_values_in_order() -> None:
    target, data = of(["b", "", "a", "B"], "class", test=["a", "c"])
    assert target.names == ("B", "a", "b", "c") and target.size == 4 and target.kind == "class"
    assert data.y["t"].tolist() == [2, MISSING, 1, 0] and data.y["t"].dtype == torch.int64


def test_numbers_are_ordered_by_size_and_text_by_code_point() -> None:
    assert of(["10", "9", "-1"], "class")[0].names == ("-1", "9", "10")
    assert of(["10", "9", "x"], "class")[0].names == ("10", "9", "x")
    assert of(np.array([10.0, NAN, 2.5, 9.0]), "class")[0].names == ("2.5", "9", "10")
    assert numbers(np.array([10.0, NAN, 2.5, 9.0]), "class") == [2, MISSING, 0, 1]
    assert of(np.array([True, False]), "class")[0].names == ("0", "1")
    assert of(["1.0", "1", "2"], "class")[0].names == ("1", "1.0", "2")  # a tie in size: by code point


def test_a_count_of_classes_needs_not_all_of_them_to_occur() -> None:
    target, data = of(["3", "", "0"], "class 5")
    assert target.names == ("0", "1", "2", "3", "4") and data.y["t"].tolist() == [3, MISSING, 0]
    assert numbers(["3.0", "", "0.0"], "class 5") == [3, MISSING, 0]  # whole numbers with gaps, as often saved
    assert numbers(np.array([2, 1], dtype=np.uint8), "class 5") == [2, 1]


def test_names_give_the_classes_their_order() -> None:
    target, data = of(["no", "yes", "", "no"], "class yes no weights 1 3")
    assert (target.names, target.weights, target.balanced) == (("yes", "no"), (1.0, 3.0), False)
    assert data.y["t"].tolist() == [1, 0, MISSING, 1]
    assert of(["no", "yes"], "class no yes balanced")[0].balanced


def test_a_number_above_a_bound_is_the_second_of_two_classes() -> None:
    target, data = of(["0", "0.5", "", "3", "-2"], "class above 0")
    assert target.names == ("at most 0", "above 0")
    assert data.y["t"].tolist() == [0, 1, MISSING, 1, 0] and data.y["t"].dtype == torch.int64
    assert of(["0", "1"], "class well ill above 0")[0].names == ("well", "ill")
    assert numbers(np.array([NAN, 2.0, 1.0]), "class above 1") == [MISSING, 1, 0]


def test_minus_one_among_whole_numbers_is_missing_unless_it_is_a_class() -> None:
    assert numbers(np.array([-1, 1, 0]), "class 2") == [MISSING, 1, 0]
    assert numbers(np.array([-1, 1, 1]), "class -1 1") == [0, 1, 1]
    assert numbers(np.array([-1, 1, 1]), "class") == [0, 1, 1]
    with refused("-1"):
        numbers(["-1", "1", "0"], "class 2")


def test_classes_of_tokens_have_one_entry_at_each() -> None:
    column = np.array([[2, 3], [4, -1]])
    assert numbers(column, "class 5", tokens=5) == [[2, 3], [4, MISSING]]


# labels


def test_labels_are_names_between_bars_or_rows_of_zero_and_one() -> None:
    target, data = of(["red|dry", "", "dry", " red | red "], "labels")
    assert (target.kind, target.names, target.size) == ("labels", ("dry", "red"), 2)
    np.testing.assert_array_equal(data.y["t"], [[1, 1], [NAN, NAN], [1, 0], [0, 1]])
    assert data.y["t"].dtype == torch.float32
    np.testing.assert_array_equal(numbers(["b", "a|b"], "labels b c a"), [[1, 0, 0], [1, 0, 1]])
    assert of(["b", "a|b"], "labels b c a weights 1 2 3")[0].weights == (1.0, 2.0, 3.0)


def test_rows_of_labels_keep_their_gaps() -> None:
    rows = np.array([[0, 1, NAN], [1, 0, 0]])
    target, data = of(rows, "labels")
    assert target.names == ("0", "1", "2")
    np.testing.assert_array_equal(data.y["t"], rows.astype(np.float32))
    assert of(np.eye(2, dtype=np.int64), "labels dry red")[0].names == ("dry", "red")


# numbers


@pytest.mark.parametrize(("kind", "size", "levels"), [("value", 1, ()), ("quantiles 0.1 0.9", 2, (0.1, 0.9))])
def test_values_stay_in_their_own_unit(kind: str, size: int, levels: tuple[float, ...]) -> None:
    target, data = of(["61.5", "", "-7"], f"{kind} scale 50 offset 20")
    assert (target.kind, target.size, target.quantiles) == (kind.split()[0], size, levels)
    assert (target.scale, target.offset) == (50.0, 20.0)
    assert data.y["t"].dtype == torch.float32
    np.testing.assert_array_equal(data.y["t"], np.array([61.5, NAN, -7], dtype=np.float32))
    np.testing.assert_array_equal(numbers(np.array([2, 3]), kind), [2.0, 3.0])


def test_what_a_column_is_without_a_kind() -> None:
    assert of(["a", "1"])[0].kind == "class"
    assert of(["2", "", "1"])[0].kind == "class"
    assert of(["2", "", "1.5"])[0].kind == "value"
    assert of(np.array([1.0, NAN, 2.0]))[0].kind == "class"
    assert of(np.arange(101.0))[0].kind == "value" and of(np.arange(100.0))[0].kind == "class"
    assert of(np.arange(101))[0].kind == "class"  # an array of whole numbers
    assert of(np.array([NAN, NAN]))[0].kind == "value"
    assert of(["2", "1"], reader="class 7")[0].size == 7  # as the reader knows
    assert of(["2", "1"], "value", reader="class 7")[0].kind == "value"  # the user knows better


FAULTS = {
    "no number": (["1", "", "tall"], "value", 'file.csv, line 40, has "tall"'),
    "no number to compare": (["1", "x"], "class above 0", 'file.csv, line 30, has "x"'),
    "endless": (np.array([1.0, np.inf]), "value", "file.csv, line 30"),
    "unknown class": (["no", "maybe"], "class no yes", r"file.csv, line 30, has \"maybe\""),
    "class beyond": (np.array([0, 5]), "class 5", 'file.csv, line 30, has "5"'),
    "endless class": (np.array([0.0, np.inf]), "class 5", 'file.csv, line 30, has "inf"'),
    "unknown label": (["a", "a|c"], "labels a b", r"file.csv, line 30, has \"c\""),
    "one class": (["a", "a"], "class", "1 distinct"),
    "no class": (["0", "0"], "class 0", "0 distinct"),
    "weights": (["a", "b"], "class weights 1 2 3", r"3 weights for 2 classes \['a', 'b'\]"),
    "label rows": (np.eye(3), "labels a b", "3"),
    "label numbers": (np.eye(2) * 2, "labels", "0 and 1"),
    "rows of a class": (np.eye(3), "class", r'\(3, 3\).*labels'),
    "rows of a value": (np.eye(3), "value", r"\(3, 3\)"),
    "cubes": (np.zeros((3, 2, 2)), "labels", r"\(3, 2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_value_that_does_not_fit_is_told_with_file_and_line(case: str) -> None:
    column, kind, where = FAULTS[case]
    with pytest.raises(UserError, match=f'^task.kinds = "{kind}" for the target "t": .*{where}'):
        of(column, kind)


def test_a_column_that_is_not_there_is_told_with_the_nearest() -> None:
    part = Part(torch.zeros(2, 1), {"grade": np.array([0, 1]), "age": np.array([1.0, 2.5])})
    with refused("grad", "grade, age"):
        encode(Raw("clinic", part, part), ("grad",), {})
    bare = Part(torch.zeros(2, 1), {"age": np.array([1.0, 2.5])})
    with refused("clinic", "grade"):
        encode(Raw("clinic", part, bare), ("grade",), {})


def test_weights_are_read() -> None:
    assert read_kind("y", "class 3 weights 1 2 5").weights == (1.0, 2.0, 5.0)
    assert read_kind("y", "labels a b balanced").balanced
    assert of([0, 1, 2], "class 3 weights 1 2 5")[0].weights == (1.0, 2.0, 5.0)


def test_a_class_that_only_the_test_set_has_is_a_class() -> None:
    assert of(["a", "b"], test=["c"])[0].names == ("a", "b", "c")
