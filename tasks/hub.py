"""Data of the Hugging Face hub, or in its form in a local folder, through flwr-datasets (the optional extra `hub`)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.errors import UserError
from config.schema import Task
from tasks.data import Part, Raw
from tasks.decoding import pixels
from tasks.tables import Table
from tasks.tabular import labelled, tabular_raw
from tasks.text import text_raw

HUB = "hub"


def hub(task: Task) -> Raw:
    """The data set `hub:NAME`; NAME may be a local folder. `task.train` and `task.test` name its splits (default: train, and
    test if there is one).

    What `task.inputs` names decides what it is: one column of images gives bytes (n, channels, height, width), which must
    be of one size unless `task.image_size` is set; one column of texts tokens (`tasks.text`); other columns inputs as in a
    table (`tasks.tabular`). Raises UserError for a package, a data set, a split or a column that is not there.
    """
    name = task.dataset.partition(":")[2]
    data = _load(name)
    train_name = task.train or "train"
    test_name = task.test or ("test" if "test" in data else "")
    for setting, split in (("train", train_name), ("test", test_name)):
        if split and split not in data:
            raise UserError(f'task.{setting} = "{split}": the data set {name} has the splits {", ".join(data)}')
    train, test = data[train_name], data[test_name] if test_name else None
    only = task.inputs[0] if len(task.inputs) == 1 else ""
    if only and only not in train.column_names:
        only = ""
    kind = type(train.features[only]).__name__ if only else ""
    tables = _table(name, train), None if test is None else _table(name, test)
    if kind == "Image":
        held = None if tables[1] is None else _images(task, name, test, tables[1], clients=False)
        return Raw(name, _images(task, name, train, tables[0], clients=True), held, _class_kinds(train), images=True)
    text = kind == "Value" and train.features[only].dtype in ("string", "large_string")
    raw = (text_raw if text else tabular_raw)(task, None, *tables)
    return Raw(name, raw.train, raw.test, _class_kinds(train), raw.tokens)


def _load(name: str) -> Any:
    try:
        import datasets
        from flwr_datasets import FederatedDataset
    except ImportError:
        raise UserError(f"task.dataset = \"hub:{name}\" needs flwr-datasets: pip install -e '.[hub]'") from None
    if name.startswith((".", "/", "~")):
        place = Path(name).expanduser()
        if not place.is_dir():
            raise UserError(f'task.dataset = "hub:{name}": there is no such folder')
        name = str(place.resolve())
    try:
        federated = FederatedDataset(dataset=name, partitioners={}, shuffle=False)
        splits = datasets.get_dataset_split_names(name)
        return {split: federated.load_split(split) for split in splits}
    except Exception as error:
        # What the hub's library raises is not documented; whatever it is, the data set could not be opened.
        raise UserError(f'task.dataset = "hub:{name}" could not be opened: {str(error).splitlines()[0]}') from None


def _table(name: str, split: Any) -> Table:
    """The split's columns of texts and numbers as text."""
    plain = [c for c in split.column_names if type(split.features[c]).__name__ in ("Value", "ClassLabel")]
    columns = {
        c: np.array(["" if v is None else str(v) for v in split.with_format(None)[c]], dtype=object) for c in plain
    }
    return Table(name, columns, np.arange(1, len(split) + 1, dtype=np.int64))


def _class_kinds(split: Any) -> dict[str, str]:
    labels = {c: f for c, f in split.features.items() if type(f).__name__ == "ClassLabel"}
    return {column: f"class {feature.num_classes}" for column, feature in labels.items()}


def _images(task: Task, name: str, split: Any, table: Table, clients: bool) -> Part:
    column = task.inputs[0]
    found = []
    for row, image in enumerate(split[column]):
        try:
            found.append(pixels(image, task.image_size, task.channels))
        except ValueError as error:
            raise UserError(f'task.dataset = "hub:{name}", row {row + 1}, column "{column}": {error}') from None
        if found[row].shape != found[0].shape:
            raise UserError(
                f'task.dataset = "hub:{name}", row {row + 1}: the image is of another size than the first: write the size '
                "that all are to have (for example task.image_size = 224)"
            )
    return labelled(task, table, torch.from_numpy(np.stack(found)), clients)
