"""Opens the data set that `task.dataset` names, with one reader per format.

A reader takes the settings of `[task]` and returns a `meadow.tasks.data.Raw`. This module does what all formats share:
encoding targets, holding out a global test set, and natural clients. A user's `module:object` is a reader (docs/data.md).
"""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from meadow.arrays import memory
from meadow.config import schema
from meadow.config.load import nearest
from meadow.runtime.errors import UserError
from meadow.runtime.limits import is_folder, user_path
from meadow.runtime.objects import user_object
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.data import Dataset, Raw, make_dataset
from meadow.tasks.readers.arrays import arrays
from meadow.tasks.readers.digits import digits, printed_dataset
from meadow.tasks.readers.hub import hub
from meadow.tasks.readers.images import TORCHVISION, image_folder, image_table, torchvision_data
from meadow.tasks.readers.stars import stars
from meadow.tasks.readers.tabular import tabular
from meadow.tasks.readers.text import characters, text
from meadow.tasks.targets import encode

_DATA_SEED = 0  # The held-out test set is part of the data: it does not depend on the experiment's seed.

Reader = Callable[[schema.Task], Raw]
_READERS: dict[str, Reader] = {
    "digits": lambda task: digits(),
    "printed-digits": lambda task: printed_dataset(task.source_samples),
    "arrays": lambda task: arrays(task, folder(task)),
    "text": lambda task: text(task, folder(task)),
    "characters": lambda task: characters(task, folder(task)),
    "tabular": lambda task: tabular(task, folder(task)),
    "hub": lambda task: hub(task),
    "stars": lambda task: stars(task.image_size, task.channels),
    "image-table": lambda task: image_table(task, folder(task)),
    "ImageFolder": lambda task: image_folder(task, folder(task)),
    **dict.fromkeys(TORCHVISION, lambda task: torchvision_data(task, folder(task))),
}


# The settings of [task] on which the data depends; a process caches data sets by them.
_DATA_KEYS = (
    "dataset", "root", "download", "train", "test", "test_fraction", "inputs", "targets", "kinds", "client", "public",
    "image_size", "channels", "tokens", "vocabulary", "vocabulary_size", "length", "source_samples",
)  # fmt: skip


def open_dataset(task: schema.Task) -> Dataset:
    """The data set that `task.dataset` names, with `task.targets`; the same object for the same settings.

    Raises UserError for an unknown data set, missing or malformed files, and unknown targets.
    """
    own = data_settings(task)
    return memory.common(own, lambda: _open(own))


def data_settings(task: schema.Task) -> schema.Task:
    """The settings, with those that do not affect the data at their defaults."""
    defaults = schema.Task().model_dump()
    return task.model_copy(update={key: v for key, v in defaults.items() if key not in _DATA_KEYS})


def forget_datasets() -> None:
    """Drop all cached data sets that are not in shared memory."""
    _open.cache_clear()


@functools.lru_cache(maxsize=4)
def _open(task: schema.Task) -> Dataset:
    raw = _reader(task)(task)
    if raw.test is None:
        raw = _hold_out(raw, task.test_fraction)
    targets, train, test = encode(raw, task.targets, dict(zip(task.targets, task.kinds, strict=False)))
    if len(train) == 0 or len(test) == 0:
        raise UserError(f'task.dataset = "{task.dataset}": it has {len(train)} training and {len(test)} test samples')
    owner: npt.NDArray[np.int64] | None = None
    clients: tuple[str, ...] = ()
    if raw.train.client is not None:
        names, codes = np.unique(raw.train.client.astype(str), return_inverse=True)
        owner, clients = codes.astype(np.int64), tuple(str(n) for n in names)
    return make_dataset(
        raw.name, train, test, targets, owner=owner, clients=clients, tokens=raw.tokens, images=raw.images
    )


def folder(task: schema.Task) -> Path:
    """The folder `task.root`, with "~" and "$NAME" expanded. Raises UserError if it does not exist."""
    if not task.root:
        raise UserError(
            f'task.root is empty: task.dataset = "{task.dataset}" reads files; write their folder '
            '(for example root = "$MEADOW_DATA/heart")'
        )
    path = user_path(task.root)
    if not is_folder(path):
        raise UserError(f'task.root = "{task.root}": there is no such folder{_unset(task.root)}')
    if path.samefile("/"):
        raise UserError(f'task.root = "{task.root}": this is the whole file system; write the folder of the data')
    return path


def _reader(task: schema.Task) -> Reader:
    if ":" in task.dataset and task.dataset.partition(":")[0] not in _READERS:
        found = user_object("task.dataset", task.dataset)
        if not callable(found):
            raise UserError(f'task.dataset = "{task.dataset}": it is not a function; docs/data.md says what it must be')
        return found
    reader = _READERS.get(task.dataset.partition(":")[0])
    if reader is None:
        raise UserError(
            f'task.dataset = "{task.dataset}": there is no such data set{nearest(task.dataset, _READERS)}; write one of '
            f"{', '.join(_READERS)}, or your own module:object"
        )
    return reader


def _hold_out(raw: Raw, fraction: float) -> Raw:
    """Move a random share of the training pool, at least one sample, to the global test set."""
    n = len(raw.train.x)
    order = numpy_generator(_DATA_SEED, "hold-out").permutation(n)
    count = min(max(1, round(fraction * n)), max(n - 1, 0))
    return replace(
        raw,
        train=raw.train.take(np.sort(order[count:])),
        test=replace(raw.train.take(np.sort(order[:count])), client=None),
    )


def _unset(root: str) -> str:
    left = [part for part in os.path.expandvars(root).split("/") if part.startswith("$")]
    return f" ({left[0]} is not set in the environment)" if left else ""
