"""Reads tables of numbers and categories, with missing values, as samples.

Each entry of `task.inputs` is a column and its encoding:

    NAME [scaled | mean M std S] [gaps]      a number; (value - mean) / std; 0 if missing
    NAME [category | among VALUE ...]        one input of 0 or 1 for each category, and one for a missing value

The constants are in the entry or come from the public file `task.public` (`scaled`, `category`), never from the clients'
private rows. `gaps` adds an input that is 1 if the number is missing.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.runtime.limits import check_fits, is_file
from meadow.tasks.data import Part, Raw
from meadow.tasks.readers.tables import GAPS, Table, candidates, find_file, read_table

Floats = npt.NDArray[np.float32]


def tabular(task: Task, folder: Path) -> Raw:
    """Read the rows of `task.train` (default train.csv) and `task.test` (test.csv, if any): float32 (n, inputs)."""
    train, test = read_train_and_test(task, folder)
    return tabular_raw(task, train, test, read_public(task, folder, train))


def tabular_raw(task: Task, train: Table, test: Table | None, public: Table | None) -> Raw:
    """`tabular` for tables in memory."""
    readers = [_constants(column, public) for column in read_inputs(task, train)]

    def part(table: Table, clients: bool) -> Part:
        x = np.concatenate([reader.read(table) for reader in readers], axis=1)
        return labelled(task, table, torch.from_numpy(x), clients)

    return raw_of(train, test, part)


def raw_of(train: Table, test: Table | None, part: Callable[[Table, bool], Part], **more: Any) -> Raw:
    """A data set from the parts of its tables; `part(table, clients)`: with the clients of the samples or without."""
    return Raw(Path(train.source).stem, part(train, True), part(test, False) if test else None, **more)


def read_train_and_test(task: Task, folder: Path) -> tuple[Table, Table | None]:
    """The tables of the training pool and of the global test set; None if that is to be held out."""
    train = read_table(find_file(folder, task.train, "task.train", candidates("train")))
    if task.test:
        return train, read_table(find_file(folder, task.test, "task.test", []))
    there = [name for name in candidates("test") if is_file(folder / name)]
    return train, read_table(folder / there[0]) if there and not task.train else None


def read_public(task: Task, folder: Path, train: Table) -> Table | None:
    """The table that `task.public` names: a public file, or the training pool if "train"; None if empty."""
    if task.public == "train":
        return train
    if not task.public:
        return None
    return read_table(find_file(folder, task.public, "task.public", []))


def labelled(task: Task, table: Table, x: torch.Tensor, clients: bool) -> Part:
    """Samples with the table's columns as possible targets and, if `clients`, its client column."""
    client = table.joined(task.client, f'task.client = "{task.client}"') if clients and task.client else None
    return Part(x, table.columns, client, table.source, table.lines)


@dataclass(frozen=True)
class _Column:
    """A parsed entry of task.inputs."""

    text: str
    name: str
    how: str  # "number", "scaled", "category"
    mean: float = 0.0
    std: float = 1.0
    categories: tuple[str, ...] = ()
    gaps: bool = False

    def read(self, table: Table) -> Floats:
        """Encode the column as inputs: float32 (n, 1 or more)."""
        setting = f'task.inputs = "{self.text}"'
        if self.how == "category":
            values = table.column(self.name, setting)
            check_fits(
                f"{setting}: {len(values):,} rows of {len(self.categories):,} categories",
                4 * len(values) * len(self.categories),
            )
            rows = np.zeros((len(values), len(self.categories) + 1), dtype=np.float32)
            place = {category: i for i, category in enumerate(self.categories)} | {"": len(self.categories)}
            for i, value in enumerate(values):
                if (at := place.get(_category(value))) is not None:
                    rows[i, at] = 1
            return rows
        numbers = table.numbers(self.name, setting)
        gone = np.isnan(numbers)
        scaled = np.where(gone, 0.0, (numbers - self.mean) / self.std)
        inputs = [scaled, gone] if self.gaps else [scaled]
        return np.stack(inputs, axis=1).astype(np.float32)


def read_inputs(task: Task, train: Table) -> list[_Column]:
    """The parsed `task.inputs`; if empty, every column that is neither a target nor the client, as a plain number."""
    used = {*task.targets, *task.client.split("+")}
    entries = task.inputs or tuple(shlex.quote(name) for name in train.columns if name not in used)
    if not entries:
        raise UserError(
            f"task.inputs is empty, and {train.source} has no column that is neither a target nor the client"
        )
    columns = [_entry(text) for text in entries]
    for column in columns:
        train.column(column.name, f'task.inputs = "{column.text}"')
        if column.name in task.targets:
            raise UserError(f'task.inputs = "{column.text}": this column is a target')
    return columns


def _entry(text: str) -> _Column:
    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise _wrong(text, str(error)) from None
    gaps = bool(words) and words[-1] == "gaps"
    words = words[:-1] if gaps else words
    if not words:
        return _Column(text, name, "number", gaps=gaps)
    if words == ["scaled"]:
        return _Column(text, name, "scaled", gaps=gaps)
    if words[0] == "mean" and len(words) == 4 and words[2] == "std":
        try:
            mean, std = float(words[1]), float(words[3])
        except ValueError:
            raise _wrong(text, "mean and std must be numbers") from None
        if not (np.isfinite(mean) and 0 < std < np.inf):
            raise _wrong(text, "mean must be a finite number, and std a positive one")
        return _Column(text, name, "number", mean, std, gaps=gaps)
    if gaps:
        raise _wrong(text, "categories have an input for missing values already")
    if words == ["category"]:
        return _Column(text, name, "category")
    if words[0] == "among" and len(words) > 1:
        return _Column(text, name, "category", categories=tuple(_category(w) for w in words[1:]))
    raise _wrong(text, f'"{" ".join(words)}" is unknown')


def _constants(column: _Column, public: Table | None) -> _Column:
    """The column with its constants, from public data if the entry has none."""
    wanted = column.how == "scaled" or (column.how == "category" and not column.categories)
    if not wanted:
        return column
    if public is None:
        instead = '"NAME mean M std S"' if column.how == "scaled" else '"NAME among VALUE ..."'
        raise _wrong(
            column.text,
            f"its constants must be public: name a public file in task.public, write {instead}, or declare "
            'the training rows public (task.public = "train")',
        )
    if column.how == "category":
        found = {_category(v) for v in public.column(column.name, "task.public")} - {""}
        return _Column(column.text, column.name, "category", categories=tuple(_sorted(found)))
    numbers = public.numbers(column.name, "task.public")
    known = numbers[~np.isnan(numbers)]
    if len(known) == 0 or known.std() == 0:
        raise _wrong(column.text, f"the column is constant or empty in {public.source}: write its mean and std")
    return _Column(column.text, column.name, "number", float(known.mean()), float(known.std()), gaps=column.gaps)


def _category(value: str) -> str:
    """A category in canonical form: 3.0 is "3", and missing values (`GAPS`) are ""."""
    value = value.strip()
    if value in GAPS:
        return ""
    try:
        number = float(value)
    except ValueError:
        return value
    return str(int(number)) if number.is_integer() else repr(number)


def _sorted(values: set[str]) -> Sequence[str]:
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _wrong(text: str, why: str) -> UserError:
    return UserError(
        f'task.inputs = "{text}": {why}; an entry is "NAME", "NAME scaled", "NAME mean M std S" (each may end in gaps), '
        '"NAME category" or "NAME among VALUE ..."'
    )
