"""Arrays, tables, the hub's data sets and a user's own: what they become, and what is said of those that are malformed."""

import gzip
import lzma
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.refusals import refused
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.strategies.check import resolve
from meadow.tasks.data import MISSING, Dataset
from meadow.tasks.readers.datasets import open_dataset

HEADER = "age,kind,gap,who,y\n"
ROWS = "40,a,1,x,0\n50,b,,x,1\n60,a,3,z,1\n"
REAL = pytest.mark.skipif("MEADOW_DATA" not in os.environ, reason="needs MEADOW_DATA")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEADOW_CACHE", str(tmp_path / "cache"))


def opened(folder: Path, dataset: str, **settings: Any) -> Dataset:
    return open_dataset(Task(**({"dataset": dataset, "root": str(folder), "targets": ("y",)} | settings)))


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}


def test_a_table_of_numbers_and_categories(tmp_path: Path) -> None:
    write(tmp_path, train__csv=HEADER + ROWS, test__csv=HEADER + "70,c,,q,0\n")
    data = opened(
        tmp_path,
        "tabular",
        inputs=("age mean 50 std 10", "kind among a b", "gap mean 2 std 0.5 gaps"),
        client="who",
    )
    expected = [[-1, 1, 0, 0, -2, 0], [0, 0, 1, 0, 0, 1], [1, 1, 0, 0, 2, 0]]
    assert data.train.x.tolist() == expected and data.train.x.dtype == torch.float32
    assert data.test.x.tolist() == [[2, 0, 0, 0, 0, 1]]  # the category c is unknown
    assert data.clients == ("x", "z") and data.owner is not None and data.owner.tolist() == [0, 0, 1]
    assert data.train.y["y"].tolist() == [0, 1, 1]


def test_constants_may_come_from_public_rows(tmp_path: Path) -> None:
    public = HEADER + "10,a,,x,0\n30,c,,x,0\n"
    write(tmp_path, train__csv=HEADER + ROWS, test__csv=HEADER + ROWS, public__csv=public)
    inputs = ("age scaled", "kind category")
    data = opened(tmp_path, "tabular", inputs=inputs, public="public.csv")
    assert data.train.x.tolist() == [[2, 1, 0, 0], [3, 0, 0, 0], [4, 1, 0, 0]]  # mean 20, std 10; a, c, gap
    declared = opened(tmp_path, "tabular", inputs=inputs, public="train").train.x
    torch.testing.assert_close(declared[:, 0].mean(), torch.tensor(0.0))
    assert declared[:, 1:].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_without_inputs_every_other_column_is_a_number_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, train__csv="a,b,y\n1,2.5,0\n,4,1\n", test__csv="a,b,y\n1,2.5,0\n")
    assert opened(tmp_path, "tabular").train.x.tolist() == [[1, 2.5], [0, 4]]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"inputs": ("age scaled",)}, r'"age scaled".*must be public.*"NAME mean M std S"'),
        ({"inputs": ("kind category",)}, r'"kind category".*must be public.*"NAME among'),
        ({"inputs": ("kind",)}, 'train.csv, line 2, column "kind": "a" is not a finite number'),
        ({"inputs": ("agee",)}, 'has no column "agee"; did you mean age'),
        ({"inputs": ("y",)}, "this column is a target"),
        ({"inputs": ("age mean x std 1",)}, "mean and std"),
        ({"inputs": ("age mean 1 std 0",)}, "std a positive one"),
        ({"inputs": ("age what",)}, '"what" is unknown'),
        ({"inputs": ("kind among a gaps",)}, "among a gaps"),
        ({"inputs": ("gap scaled",), "public": "flat.csv"}, "gap scaled"),
        ({"inputs": ("age",), "public": "none.csv"}, "task.public.*no file.*none.csv"),
        ({"inputs": ("age",), "train": "none.csv"}, "task.train.*none.csv.*train.csv"),
        ({"inputs": ("age",), "client": "whose"}, 'task.client = "whose".*no column "whose"; did you mean who'),
        ({"inputs": ("age",), "client": "gap"}, 'line 3, column "gap"'),
        ({"inputs": ("age",), "targets": ("z",)}, 'no target "z"'),
        ({"root": "/no/where"}, "there is no such folder"),
        ({"root": "$NO_SUCH_NAME/x"}, r"\$NO_SUCH_NAME is not set"),
        ({"root": ""}, "task.root is empty"),
        ({"dataset": "tabulr"}, "did you mean tabular"),
    ],
)
def test_what_is_wrong_with_a_tabular_task_is_told(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    write(tmp_path, train__csv=HEADER + ROWS, flat__csv="gap\n1\n1\n")
    with pytest.raises(UserError, match=why):
        opened(tmp_path, **({"dataset": "tabular"} | settings))


def test_a_test_set_is_held_out_once_and_for_all(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i % 2}\n" for i in range(50))
    write(tmp_path, train__csv="a,y\n" + rows)
    data, again = (opened(tmp_path, "tabular", test_fraction=f) for f in (0.2, 0.20000000001))
    assert (len(data.train), len(data.test)) == (40, 10)
    assert sorted(torch.cat([data.train.x, data.test.x]).flatten().tolist()) == list(range(50))
    assert torch.equal(data.test.x, again.test.x)


def save(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "a.npz", **arrays)
    return folder


X = np.arange(12, dtype=np.float16).reshape(4, 3)


def test_a_users_own_function_reads_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "own_waves.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    data = open_dataset(Task(dataset="own_waves:waves", targets=("pitch", "noisy")))
    assert data.train.x.shape == (800, 1, 64) and [t.kind for t in data.targets] == ["value", "class"]
    with pytest.raises(UserError, match="own_waves:none"):
        open_dataset(Task(dataset="own_waves:none"))
    with refused("task.dataset"):
        open_dataset(Task(dataset="own_waves:SAMPLES"))


def test_the_hubs_form_in_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    from PIL import Image

    folder = tmp_path / "things"
    folder.mkdir()
    images = [Image.fromarray(np.full((4 + i, 5, 3), 10 * i, dtype=np.uint8)) for i in range(4)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "size": datasets.Value("float64"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "who": datasets.Value("int64"),
        }
    )
    rows = {"image": images, "text": list("abcd"), "size": [1.0, 2, 3, 4], "label": [0, 1, 1, 0], "who": [5, 5, 9, 9]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(folder / "train.parquet")
    data.select([0, 1]).to_parquet(folder / "test.parquet")

    def hub(**settings: Any) -> Dataset:
        return open_dataset(Task(**({"dataset": f"hub:{folder}", "targets": ("label",), "client": "who"} | settings)))

    pictures = hub(inputs=("image",), image_size=4)
    assert (
        pictures.images
        and pictures.train.x.shape == (4, 3, 4, 4)
        and torch.unique(pictures.train.x[2]).tolist() == [20]
    )
    assert pictures.clients == ("5", "9") and pictures.train.y["label"].tolist() == [0, 1, 1, 0]
    assert len(pictures.test) == 2 and pictures.targets[0].size == 2
    texts = hub(inputs=("text",), tokens="chars", length=3)
    assert texts.tokens and (texts.train.x != 0).sum(1).tolist() == [1, 1, 1, 1]
    assert hub(inputs=("size mean 2 std 2",)).train.x.flatten().tolist() == [-0.5, 0, 0.5, 1]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"inputs": ("image",)}, "but the first is 5x4 pixels"),
        ({"inputs": ("size",), "test": "validation"}, "has no such split; it has"),
        ({"dataset": "hub:./nowhere"}, "there is no such folder"),
        ({"inputs": ("nothing",)}, 'no column "nothing"'),
    ]
    for settings, why in wrong:
        with pytest.raises(UserError, match=why):
            hub(**settings)


@REAL
def test_real_arrays_and_tables() -> None:
    root = "$MEADOW_DATA/"
    har = open_dataset(Task(dataset="arrays", root=root + "uci_har", targets=("y",), client="client"))
    assert (har.train.x.shape, len(har.test), len(har.clients)) == ((7352, 9, 128), 2947, 21)
    mnist_m = open_dataset(Task(dataset="arrays", root=root + "mnist_m", targets=("y",)))
    assert mnist_m.images and (len(mnist_m.train), len(mnist_m.test)) == (6000, 2000)
    heart = open_dataset(
        Task(dataset="tabular", root=root + "heart", train="heart.csv", targets=("num",), kinds=("class above 0",),
             client="hospital")
    )  # fmt: skip
    assert len(heart.train) + len(heart.test) == 920 and len(heart.clients) == 4
    assert MISSING not in heart.train.y["num"]


PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
BLOCKS = [(page.name, block) for page in PAGES for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.S)]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_every_block_of_toml_in_the_documents_is_an_experiment(page: str, block: str) -> None:
    experiment = resolve(tomllib.loads(block))
    if "MEADOW_DATA" in os.environ and experiment.task.root.startswith("$MEADOW_DATA"):
        assert len(open_dataset(experiment.task).train) > 0
