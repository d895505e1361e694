"""Reads data sets from the Hugging Face hub, or a local folder in its format, with flwr-datasets (extra `hub`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from meadow.config.load import nearest
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.tasks.data import Part, Raw
from meadow.tasks.readers.decoding import convert_images
from meadow.tasks.readers.tables import Table
from meadow.tasks.readers.tabular import labelled, tabular_raw
from meadow.tasks.readers.text import text_raw


def hub(task: Task) -> Raw:
    """Read `hub:NAME` or `hub:NAME:SUBSET`; NAME may be a local folder. `task.train` and `task.test` name its splits
    (default: train, and test if there is one), `task.public` a public split.

    `task.inputs`: one column of images gives uint8 (n, channels, height, width), of `task.image_size` and
    `task.channels`; one column of texts gives tokens (`meadow.tasks.readers.text`); other columns are read as a table
    (`meadow.tasks.readers.tabular`). A ClassLabel column has the data set's number of classes, and -1 is missing. Raises
    UserError for a missing package, data set, split or column.
    """
    name = task.dataset.partition(":")[2]
    splits = _load(name)
    train_name = task.train or "train"
    test_name = task.test or ("test" if "test" in splits else "")
    train = _split(name, splits, "task.train", train_name)
    test = _split(name, splits, "task.test", test_name) if test_name else None
    tables = _table(name, train_name, train), None if test is None else _table(name, test_name, test)
    kinds = _class_kinds(train)
    if _feature(train, task.inputs) == "Image":
        held_out = None if test is None or tables[1] is None else _images(task, test, tables[1], clients=False)
        return Raw(name, _images(task, train, tables[0], clients=True), held_out, kinds, images=True)
    public = None
    if task.public:
        public = _table(name, task.public, _split(name, splits, "task.public", task.public))
    if _feature(train, task.inputs) == "string":
        raw = text_raw(task, None, *tables, public)
    else:
        raw = tabular_raw(task, *tables, public)
    return Raw(name, raw.train, raw.test, kinds, raw.tokens)


def _load(name: str) -> dict[str, Any]:
    """The splits of the data set by name, in its order."""
    try:
        import datasets
        from flwr_datasets import FederatedDataset
    except ImportError:
        raise UserError(f"task.dataset = \"hub:{name}\" needs flwr-datasets: pip install -e '.[hub]'") from None
    place, _, subset = name.partition(":")
    if place.startswith((".", "/", "~")):
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise UserError(f'task.dataset = "hub:{name}": there is no such folder')
        place = str(folder.resolve())
    try:
        splits = datasets.get_dataset_split_names(place, subset or None)
        federated = FederatedDataset(dataset=place, subset=subset or None, shuffle=False, partitioners={})
        return {split: federated.load_split(split) for split in splits}
    except Exception as error:
        # The library does not document what it raises; any error means that the data set cannot be opened.
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f'task.dataset = "hub:{name}" cannot be opened: {why}') from None


def _split(name: str, splits: dict[str, Any], setting: str, split: str) -> Any:
    if split not in splits:
        raise UserError(
            f'{setting} = "{split}": the data set {name} has no such split{nearest(split, splits)}; it has '
            f"{', '.join(splits)}"
        )
    if len(splits[split]) == 0:
        raise UserError(f'{setting} = "{split}": this split of {name} is empty')
    return splits[split]


def _feature(split: Any, inputs: tuple[str, ...]) -> str:
    """The type of the only input column: "Image", "string" or another."""
    feature: Any = split.features.get(inputs[0]) if len(inputs) == 1 else None
    if type(feature).__name__ == "Value":
        return "string" if feature.dtype in ("string", "large_string") else str(feature.dtype)
    return type(feature).__name__


def _table(name: str, split_name: str, split: Any) -> Table:
    """The split's columns of texts, numbers and class labels, as text; "" if missing."""
    kinds = {column: type(feature).__name__ for column, feature in split.features.items()}
    columns = {
        column: np.array([_cell(value, kind) for value in split.with_format(None)[column]], dtype=object)
        for column, kind in kinds.items()
        if kind in ("Value", "ClassLabel")
    }
    return Table(f"hub:{name}, split {split_name}", columns, np.arange(1, len(split) + 1, dtype=np.int64))


def _cell(value: Any, kind: str) -> str:
    gone = value is None or value != value or (kind == "ClassLabel" and value == -1)  # null, NaN, the hub's "no label"
    return "" if gone else str(value)


def _class_kinds(split: Any) -> dict[str, str]:
    labels = {c: f for c, f in split.features.items() if type(f).__name__ == "ClassLabel"}
    return {column: f"class {feature.num_classes}" for column, feature in labels.items()}


def _images(task: Task, split: Any, table: Table, clients: bool) -> Part:
    (column,) = task.inputs

    def images() -> Iterator[Any]:
        for i, image in enumerate(split[column]):
            if image is None:
                raise UserError(f"{table.cell(i, column)}: this cell is empty; expected an image")
            yield image

    x = convert_images(images(), lambda i: table.cell(i, column), task.image_size, task.channels)
    return labelled(task, table, x, clients)
