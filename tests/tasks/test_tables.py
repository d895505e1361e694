"""Tables and arrays: what is read, and what is refused."""

import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.tasks.data import Dataset
from meadow.tasks.readers.datasets import open_dataset
from meadow.tasks.readers.decoding import resize_arrays
from meadow.tasks.readers.tables import read_table

REAL = os.environ.get("MEADOW_DATA", "")
needs_data = pytest.mark.skipif(not REAL, reason="set MEADOW_DATA to the folder of real data")
NAN = float("nan")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEADOW_CACHE", str(tmp_path / "cache"))


def opened(dataset: str, root: Path | str, *targets: str, **settings: Any) -> Dataset:
    return open_dataset(Task(dataset=dataset, root=str(root), targets=targets or ("y",), **settings))


def refused(expected: str, root: Path, action: Callable[[], object]) -> None:
    """The action must raise a UserError whose message holds this pattern, where ROOT stands for the folder."""
    with pytest.raises(UserError) as error:
        action()
    assert re.search(expected.replace("ROOT", re.escape(str(root))), str(error.value)), str(error.value)


# tables


def test_a_table_is_the_same_in_every_form(tmp_path: Path) -> None:
    rows = [{"name": "Åsa", "text": 'one, "two"\nthree', "n": "1"}, {"name": "", "text": "tab", "n": "2.5"}]
    csv = 'name,text,n\nÅsa,"one, ""two""\nthree",1\n,tab,2.5\n'
    forms = {
        "t.csv": csv.encode("utf-8-sig"),
        "t.csv.xz": lzma.compress(csv.encode()),
        "t.csv.gz": gzip.compress(csv.replace("\n", "\r\n").replace("\r\nthree", "\nthree").encode()),
        "t.tsv": csv.replace(",", "\t").replace("one\t", "one,").encode(),
        "t.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(),
        "t.jsonl.xz": lzma.compress(b"\n\n".join(json.dumps(row).encode() for row in rows)),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        table = read_table(tmp_path / name)
        assert {n: c.tolist() for n, c in table.columns.items()} == {k: [r[k] for r in rows] for k in rows[0]}, name
        assert len(table) == 2 and table.source == str(tmp_path / name)


def test_lines_are_counted_as_a_text_editor_does(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('\na,b\n1,"two\nlines"\n\n2,"and\n\nthree"\r\n3,x\n')
    assert read_table(tmp_path / "t.csv").lines.tolist() == [3, 6, 9]
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_table(tmp_path / "t.jsonl").lines.tolist() == [1, 3]


def test_json_values_become_the_text_of_a_table(tmp_path: Path) -> None:
    row = {"text": "a\u2028b\u0085c", "n": 1.5, "whole": 3, "yes": True, "gap": None, "nan": NAN, "tags": ["x", 2, "y"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert {name: column[0] for name, column in read_table(tmp_path / "t.jsonl").columns.items()} == {
        "text": "a\u2028b\u0085c", "n": "1.5", "whole": "3", "yes": "True", "gap": "", "nan": "", "tags": "x|2|y",
    }  # fmt: skip


def test_a_cell_may_be_longer_than_csv_allows_by_itself(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,n\n" + "a" * 200_000 + ",1\n")
    assert len(read_table(tmp_path / "t.csv").columns["text"][0]) == 200_000


TABLES: dict[str, tuple[str, bytes, str]] = {
    "another name": ("t.xlsx", b"a\n1\n", r"ROOT/t.xlsx: a table is a file named"),
    "another packing": ("t.csv.bz2", b"a\n1\n", r"ROOT/t.csv.bz2: a table is a file named"),
    "empty": ("t.csv", b"", "ROOT/t.csv: it has no rows; expected a header and at least one"),
    "a header alone": ("t.csv", b"a,b\n", "ROOT/t.csv: it has no rows; expected a header and at least one"),
    "no JSON lines": ("t.jsonl", b"\n", "ROOT/t.jsonl: it has no rows; expected at least one"),
    "short row": ("t.csv", b'a,b\n"1\n2",2\n3\n', "ROOT/t.csv, line 4: it has 1 cells, but the header has 2: a, b"),
    "long row": ("t.tsv", b"a\tb\n1\t2\t3\n", "ROOT/t.tsv, line 2: it has 3 cells, but the header has 2: a, b"),
    "double name": ("t.csv", b"a, a\n1,2\n", r"ROOT/t.csv, line 1: the header \['a', 'a'\] has an empty or repeated name"),
    "empty name": ("t.csv", b"\n,a\n1,2\n", r"ROOT/t.csv, line 2: the header \['', 'a'\] has an empty or repeated name"),
    "open quote": ("t.csv", b'a,b\n1,2\n3,"x\n5,6\n', "ROOT/t.csv, line 3: unexpected end of data"),
    "stray quote": ("t.csv", b'a,b\n1,"2"3\n', "ROOT/t.csv, line 2: ',' expected after"),
    "not UTF-8": ("t.csv", b"a,b\n1,2\n3,\xff\n", "ROOT/t.csv, line 3: byte 10 is not UTF-8; save the file as UTF-8"),
    "cut xz": ("t.csv.xz", lzma.compress(b"a,b\n" * 99)[:-20], "ROOT/t.csv.xz: the compressed file is damaged"),
    "no xz": ("t.csv.xz", b"a,b\n1,2\n", "ROOT/t.csv.xz: the compressed file is damaged or truncated"),
    "cut gz": ("t.csv.gz", gzip.compress(b"a,b\n" * 99)[:-12], "ROOT/t.csv.gz: the compressed file is damaged"),
    "no gz": ("t.csv.gz", b"a,b\n1,2\n", "ROOT/t.csv.gz: the compressed file is damaged or truncated"),
    "not JSON": ("t.jsonl", b'{"a": 1}\n{"a": }\n', "ROOT/t.jsonl, line 2: this is not a JSON object"),
    "no object": ("t.jsonl", b"[1, 2]\n", "ROOT/t.jsonl, line 1: expected a JSON object, found list"),
    "other keys": ("t.jsonl", b'{"a": 1, "b": 2}\n\n{"a": 1, "c": 2}\n',
                   r"ROOT/t.jsonl, line 3: the keys are \['a', 'c'\], those of the first line \['a', 'b'\]"),
    "a nested object": ("t.jsonl", b'{"a": {"b": 1}}\n',
                        'ROOT/t.jsonl, line 1, "a": expected a text, a number or a list of them, found dict'),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_what_is_wrong_with_a_table_is_said_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, expected = TABLES[case]
    (tmp_path / name).write_bytes(content)
    refused(expected, tmp_path, lambda: read_table(tmp_path / name))


# arrays


def write_arrays(root: Path, name: str = "a.npz", **arrays: Any) -> None:
    made: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
    np.savez(root / name, **made)


def test_arrays_of_two_parts(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    write_arrays(tmp_path, x_train=x, y_train=[[1], [0], [2], [-1]], age_train=[1.5, NAN, 3, 4], who_train=[9, 9, 2, 9],
                 x_test=x[:2] + 1, y_test=[0, 2], age_test=[7.5, 8], classes=["a", "b", "c"])  # fmt: skip
    data = opened("arrays", tmp_path, "y", "age", kinds=("class 3", "value scale 10"), client="who")
    assert data.name == "a" and not data.images and data.tokens == 0
    assert (
        data.train.x.dtype == torch.float32
        and np.array_equal(data.train.x, x)
        and np.array_equal(data.test.x, x[:2] + 1)
    )
    assert data.train.y["y"].tolist() == [1, 0, 2, -1] and data.test.y["y"].tolist() == [0, 2]
    np.testing.assert_array_equal(data.train.y["age"], [1.5, NAN, 3, 4])
    assert data.clients == ("2", "9") and data.owner is not None and data.owner.tolist() == [1, 1, 0, 1]


def test_arrays_of_one_part_hold_out_a_share_for_the_test(tmp_path: Path) -> None:
    x = np.arange(20).reshape(10, 2)
    write_arrays(tmp_path, x=x, y=np.arange(10) % 2, x_names=["left", "right"], labels=np.eye(10)[:, :3])
    data = opened("arrays", tmp_path, "y", "labels", kinds=("", "labels"), test_fraction=0.3)
    assert (len(data.train), len(data.test)) == (7, 3)
    both = torch.cat([data.train.x, data.test.x])
    order = both[:, 0].argsort()
    assert np.array_equal(both[order], x)
    assert torch.cat([data.train.y["y"], data.test.y["y"]])[order].tolist() == [0, 1] * 5
    assert np.array_equal(torch.cat([data.train.y["labels"], data.test.y["labels"]])[order], np.eye(10)[:, :3])


@pytest.mark.parametrize("form", ["n h w", "n h w 1", "n 1 h w", "n h w 3", "n 3 h w"])
def test_bytes_are_images_whichever_way_the_channels_lie(tmp_path: Path, form: str) -> None:
    channels = 3 if "3" in form else 1
    made = np.random.Generator(np.random.Philox(5)).integers(256, size=(4, channels, 6, 5), dtype=np.uint8)
    stored = {"n h w": made[:, 0], "n h w 1": made.transpose(0, 2, 3, 1), "n h w 3": made.transpose(0, 2, 3, 1)}
    write_arrays(tmp_path, x=stored.get(form, made), x_test=stored.get(form, made), y=[0, 1, 0, 1], y_test=[0, 1, 0, 1])
    data = opened("arrays", tmp_path)
    assert data.images and data.train.x.dtype == torch.uint8 and np.array_equal(data.train.x, made)
    small = opened("arrays", tmp_path, image_size=4, channels="grey")
    assert torch.equal(small.train.x, resize_arrays(made, 4, "grey")) and small.test.x.shape == (4, 1, 4, 4)
    assert opened("arrays", tmp_path, channels="rgb").train.x.shape == (4, 3, 6, 5)


def test_bytes_in_rows_are_numbers(tmp_path: Path) -> None:
    write_arrays(tmp_path, x=np.full((4, 3), 200, dtype=np.uint8), y=[0, 1, 0, 1])
    data = opened("arrays", tmp_path)
    assert not data.images and data.train.x.dtype == torch.float32 and torch.unique(data.train.x).tolist() == [200.0]


X, Y = np.zeros((4, 3)), [0, 1, 0, 1]
ARRAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no x": ({"features": X, "y": Y}, {}, 'ROOT/a.npz: there is no array "x"; it has features, y'),
    "no such target": ({"x": X, "lable": Y}, {"targets": ("label",)}, 'no target "label"; did you mean lable'),
    "test without it": (
        {"x_train": X, "y_train": Y, "x_test": X},
        {},
        'task.test: the test set of "a" has no column "y", which the training pool has',
    ),
    "lengths": ({"x": X, "y": [0, 1, 0]}, {}, r'ROOT/a.npz: "y" has shape \(3,\), but "x" has 4 rows'),
    "lengths in the test": (
        {"x_train": X, "y_train": Y, "x_test": X, "y_test": [0, 1]},
        {},
        r'ROOT/a.npz: "y_test" has shape \(2,\), but "x_test" has 4 rows',
    ),
    "a number as target": ({"x": X, "y": 3}, {}, r'ROOT/a.npz: "y" has shape \(\), but "x" has 4 rows'),
    "client of another length": ({"x": X, "y": Y, "who": [1]}, {"client": "who"}, r'"who" has shape \(1,\), but "x" has 4'),
    "no such client": ({"x": X, "y": Y, "who": Y}, {"client": "woh"}, r'has no array "woh"; did you mean who'),
    "client in rows": ({"x": X, "y": Y, "who": X}, {"client": "who"}, 'task.client = "who": .*each sample has one client'),
    "client missing": ({"x": X, "y": Y, "who": ["a", "", "b", "c"]}, {"client": "who"}, "none is missing"),
    "NaN": ({"x": [[0.0, 1], [2, 3], [NAN, 1]], "y": [0, 1, 0]}, {}, 'ROOT/a.npz: "x", row 3, has a number that is not fin'),
    "too large": ({"x": [[0.0, 1e300], [2, 3]], "y": [0, 1]}, {}, 'ROOT/a.npz: "x", row 1, has a number that is not fin'),
    "text": ({"x": [["a"], ["b"]], "y": [0, 1]}, {}, 'ROOT/a.npz: "x" is of type <U1'),
    "one number a sample": ({"x": [1.0, 2], "y": [0, 1]}, {}, r"shape \(2,\); expected samples in rows, \(n, ...\)"),
    "nothing in it": ({"x": np.zeros((0, 3)), "y": []}, {}, r"shape \(0, 3\); expected samples in rows"),
    "two channels": ({"x": np.zeros((2, 5, 5, 2), dtype=np.uint8), "y": [0, 1]}, {}, r"not of shape \(2, 5, 5, 2\)"),
    "other samples": (
        {"x_train": X, "y_train": Y, "x_test": X[:, :2], "y_test": Y},
        {},
        r"ROOT/a.npz: x_train has samples of numbers \(3,\), x_test of numbers \(2,\)",
    ),
    "bytes and numbers": (
        {"x": np.zeros((4, 1, 5, 5), dtype=np.uint8), "y": Y, "x_test": np.zeros((4, 1, 5, 5)), "y_test": Y},
        {},
        r"ROOT/a.npz: x has samples of bytes \(1, 5, 5\), x_test of numbers \(1, 5, 5\)",
    ),
    "objects": ({"x": X, "y": np.array([{}, 1, 2, 3], dtype=object)}, {}, "Python objects"),
    "no images": ({"x": X, "y": Y}, {"image_size": 8}, r"task.image_size = 8: \"x\" of ROOT/a.npz is float64 of shape"),
    "no colours": ({"x": X, "y": Y}, {"channels": "rgb"}, r"task.channels = 'rgb': \"x\" of ROOT/a.npz is float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_do_not_fit_are_told_by_name(tmp_path: Path, case: str) -> None:
    arrays, given, expected = ARRAYS[case]
    settings = dict(given)
    write_arrays(tmp_path, **arrays)
    refused(expected, tmp_path, lambda: opened("arrays", tmp_path, *settings.pop("targets", ()), **settings))


def test_a_file_that_holds_no_arrays_is_told(tmp_path: Path) -> None:
    refused(
        'task.train = "": ROOT has 0 .npz files; name the one to read$', tmp_path, lambda: opened("arrays", tmp_path)
    )
    write_arrays(tmp_path, "b.npz", x=X, y=Y)
    write_arrays(tmp_path, "a.npz", x=X, y=Y)
    refused("ROOT has 2 .npz files; name the one to read: a.npz, b.npz", tmp_path, lambda: opened("arrays", tmp_path))
    assert opened("arrays", tmp_path, train="b.npz").name == "b"
    gone = {"train": "c.npz"}
    refused('task.train = "c.npz": there is no file ROOT/c.npz', tmp_path, lambda: opened("arrays", tmp_path, **gone))
    whole = (tmp_path / "a.npz").read_bytes()
    with (tmp_path / "one.npy").open("wb") as file:
        np.save(file, X)
    for content in (b"", b"hello, this is text", whole[: len(whole) // 2], (tmp_path / "one.npy").read_bytes()):
        (tmp_path / "c.npz").write_bytes(content)
        refused("ROOT/c.npz: this is not an .npz file, or it is", tmp_path, lambda: opened("arrays", tmp_path, **gone))
    np.savez_compressed(tmp_path / "c.npz", x=np.random.Generator(np.random.Philox(1)).random((99, 9)))
    damaged = bytearray((tmp_path / "c.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "c.npz").write_bytes(bytes(damaged))
    refused("ROOT/c.npz: .* damaged", tmp_path, lambda: opened("arrays", tmp_path, **gone))
