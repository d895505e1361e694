"""Readers of images: torchvision's data sets, folders with one sub-folder per class, and tables with image paths.

Each takes the settings of `[task]` and the folder `task.root`, and returns a `meadow.tasks.data.Raw` with uint8 images
(n, channels, height, width). docs/data-images.md shows the settings for each.
"""

import contextlib
import fcntl
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meadow.config import schema
from meadow.config.load import nearest
from meadow.runtime.errors import UserError
from meadow.runtime.limits import is_file, is_folder
from meadow.tasks.data import Part, Raw
from meadow.tasks.models.vision import torchvision
from meadow.tasks.readers.decoding import decode_files, resize_arrays
from meadow.tasks.readers.tables import Table, read_table
from meadow.tasks.readers.tabular import labelled, read_train_and_test
from meadow.tasks.targets import is_number

TORCHVISION = ("MNIST", "FashionMNIST", "EMNIST", "CIFAR10", "CIFAR100", "SVHN")
LABEL = "label"
"""The only target of torchvision's data sets and of image folders."""


def torchvision_data(task: schema.Task, root: Path) -> Raw:
    """Read one of `TORCHVISION` by name, in torchvision's layout under `root`.

    EMNIST is its split "balanced"; "EMNIST:letters" and so on name others. Downloaded only with `task.download`. The target
    "label" is torchvision's class number, but letters count from 0. `task.client` = FILE:COLUMN takes the client of each
    training sample from a CSV file under `root` that also has a column "index". Raises UserError for missing or damaged
    files.
    """
    _refuse_unused(task, "train", "test", "inputs")
    name, _, split = task.dataset.partition(":")
    if name == "EMNIST":
        split = split or "balanced"
        splits = torchvision().datasets.EMNIST.splits
        if split not in splits:
            raise UserError(
                f'task.dataset = "{task.dataset}": EMNIST has no such split{nearest(split, splits)}; '
                f"it has {', '.join(splits)}"
            )
    elif split:
        raise UserError(f'task.dataset = "{task.dataset}": only EMNIST has splits; write "{name}"')
    parts = []
    for training in (True, False):
        found = _open_torchvision(task, root, name, split, training)
        images, labels, classes = _arrays(found, name, split)
        parts.append(Part(resize_arrays(images, task.image_size, task.channels), {LABEL: labels}))
    train, test = parts
    if task.client:
        train = Part(train.x, train.columns, _owners(task, root, len(train.x)))
    return Raw(task.dataset, train, test, {LABEL: f"class {classes}"}, images=True)


def image_folder(task: schema.Task, root: Path) -> Raw:
    """Read images from one sub-folder per class, whose name is the target "label".

    `task.train` is the folder of the training pool under `root` (default: "train", else `root` itself), `task.test` that
    of the test set (default: "val" or "test"; else a share of the training pool is held out). Other files than images are
    ignored. Raises UserError for folders that are missing, empty or have other classes.
    """
    _refuse_unused(task, "inputs", "client")
    train = task.train or ("train" if is_folder(root / "train") else ".")
    defaults = [name for name in ("val", "test") if is_folder(root / name) and train != "."]
    test = task.test or next(iter(defaults), "")
    pool, classes = _folder_part(task, "train", root / train)
    if not test:
        return Raw("ImageFolder", pool, None, images=True)
    held_out, others = _folder_part(task, "test", root / test)
    if unknown := sorted(set(others) - set(classes)):
        raise UserError(
            f'{root / test}: the folder "{unknown[0]}" is not a class of {root / train}, which has {", ".join(classes)}'
        )
    return Raw("ImageFolder", pool, held_out, images=True)


def image_table(task: schema.Task, root: Path) -> Raw:
    """Read a table (`meadow.tasks.readers.tables`) with an image path, relative to `root`, and any labels in each row.

    `task.train` and `task.test` are files under `root`; empty: train.csv and, if there is one, test.csv (or another table
    format). `task.inputs` names the column of paths (default: the first), `task.client` that of clients. All other
    columns may be targets: numbers if every cell is a number or empty, else text. Raises UserError with file, line and
    column of what is missing or malformed.
    """
    if len(task.inputs) > 1:
        raise UserError(f"task.inputs = {list(task.inputs)}: give the one column that holds the images' paths")
    train, test = read_train_and_test(task, root)
    pool = _table_part(task, root, train, client=True)
    if test is None:
        return Raw("image-table", pool, None, images=True)
    held_out = _table_part(task, root, test, client=False)
    for name, column in pool.columns.items():
        other = held_out.columns.get(name)
        if column.dtype.kind == "f" and other is not None and other.dtype.kind != "f":
            row = next(i for i, cell in enumerate(other) if not is_number(cell or "0"))
            raise UserError(
                f'{test.cell(row, name)}: "{other[row]}" is not a number, but the column "{name}" of {train.source} has '
                "only numbers"
            )
    return Raw("image-table", pool, held_out, images=True)


def _open_torchvision(task: schema.Task, root: Path, name: str, split: str, training: bool) -> Any:
    """torchvision's data set object, with all arrays loaded."""
    create = getattr(torchvision().datasets, name)
    more: dict[str, Any] = {"train": training}
    if name == "SVHN":
        more = {"split": "train" if training else "test"}
    elif split:
        more["split"] = split
    place = root / {"SVHN": "."}.get(name, getattr(create, "base_folder", f"{name}/raw"))
    try:
        try:
            return create(root, **more)
        except RuntimeError as error:
            if "not found" not in str(error):
                raise
            if not task.download:
                raise UserError(
                    f'task.dataset = "{task.dataset}": its files are not in {place}, or are not the published ones: '
                    "write task.download = true, or let task.root be the folder that torchvision keeps them under"
                ) from None
        with _download_lock(root):
            return create(root, download=True, **more)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f'task.dataset = "{task.dataset}": its files in {place} cannot be read: {error}') from None


@contextlib.contextmanager
def _download_lock(root: Path) -> Iterator[None]:
    """Hold a lock on this folder, so that only one process downloads to it."""
    with (root / ".meadow-download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _arrays(found: Any, name: str, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], int]:
    """Images (n, channels, height, width), labels (n,) and the number of classes of a torchvision data set."""
    images = np.asarray(found.data)
    if images.ndim == 3:
        images = images[:, None]
    elif name != "SVHN":
        images = images.transpose(0, 3, 1, 2)
    labels = np.asarray(found.labels if name == "SVHN" else found.targets, dtype=np.int64).reshape(-1)
    classes = 10 if name == "SVHN" else len(found.classes)
    if split == "letters":  # torchvision numbers letters from 1, and class 0 is "N/A"
        labels, classes = labels - 1, classes - 1
    return images, labels, classes


def _owners(task: schema.Task, root: Path, n: int) -> npt.NDArray[np.str_]:
    """The client of each of n training samples, from the file in `task.client`."""
    file, _, name = task.client.rpartition(":")
    setting = f'task.client = "{task.client}"'
    if not file or not is_file(root / file):
        raise UserError(
            f"{setting}: there is no file {root / file}: write FILE:COLUMN, where FILE is a CSV file under task.root with "
            'the columns "index" (of the training sample, from 0) and COLUMN (its client)'
        )
    table = read_table(root / file)
    clients, index = table.column(name, setting), table.column("index", setting)
    place = {text: row for row, text in enumerate(index)}
    missing = [i for i in range(n) if str(i) not in place]
    if missing:
        raise UserError(
            f"{setting}: no row of {table.source} has the index {missing[0]}; there are {n} training samples"
        )
    return np.array([clients[place[str(i)]] for i in range(n)])


def _folder_part(task: schema.Task, key: str, folder: Path) -> tuple[Part, list[str]]:
    """The images of a folder and the names of its classes."""
    if not is_folder(folder):
        raise UserError(f'task.{key} = "{getattr(task, key)}": there is no folder {folder}')
    reader = torchvision().datasets.folder
    try:
        classes, number = reader.find_classes(folder)
        found = reader.make_dataset(str(folder), number, extensions=reader.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {error}; expected a sub-folder of images for each class") from None
    paths = [Path(path) for path, _ in found]
    x = decode_files(paths, lambda i: str(folder), task.image_size, task.channels)
    return Part(x, {LABEL: np.array([classes[label] for _, label in found])}), classes


def _table_part(task: schema.Task, root: Path, table: Table, client: bool) -> Part:
    name = task.inputs[0] if task.inputs else next(iter(table.columns))
    cells = table.column(name, f"task.inputs = {list(task.inputs)}")
    empty = [row for row, cell in enumerate(cells) if not cell.strip()]
    if empty:
        raise UserError(f"{table.cell(empty[0], name)}: this cell is empty; expected the path of an image")
    x = decode_files([root / cell for cell in cells], lambda i: table.cell(i, name), task.image_size, task.channels)
    columns = {other: _column(values) for other, values in table.columns.items() if other != name}
    return replace(labelled(task, table, x, client), columns=columns)


def _column(values: Iterable[str]) -> npt.NDArray[Any]:
    """Cells as float64 (NaN if empty) if all are numbers or empty, else as text."""
    cells = [cell.strip() for cell in values]
    if any(cells) and all(is_number(cell or "0") for cell in cells):
        return np.array([float(cell or "nan") for cell in cells])
    return np.array(cells)


def _refuse_unused(task: schema.Task, *keys: str) -> None:
    """Raise UserError for a setting that this data set would ignore."""
    for key in keys:
        if value := getattr(task, key):
            raise UserError(f'task.{key} = {value!r}: task.dataset = "{task.dataset}" does not use it; leave it out')
