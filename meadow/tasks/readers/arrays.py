"""Reads arrays from an .npz file, never pickles: x, one or more targets, and optionally the clients."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from meadow.config.load import nearest
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.runtime.limits import check_fits, check_ratio, is_file, opened
from meadow.tasks.data import Part, Raw
from meadow.tasks.readers.decoding import resize_arrays
from meadow.tasks.targets import missing

_TRAIN, _TEST = "_train", "_test"


def arrays(task: Task, folder: Path) -> Raw:
    """Read the arrays of `task.train` (default: the only .npz file of the folder).

    `x_train`, `y_train`, ... and `x_test`, `y_test`, ...; or `x`, `y`, ... without a test set. x: numbers (n, *shape), read
    as float32, or images: uint8 (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w), converted to `task.image_size` and
    `task.channels`. Every other array with n rows may be a target; `task.client` names the array of clients. Raises
    UserError for shapes and types that do not fit.
    """
    path = _file(task, folder)
    found = _load(path)
    split = f"x{_TRAIN}" in found
    train = _part(task, path, found, _TRAIN if split else "")
    test = _part(task, path, found, _TEST) if f"x{_TEST}" in found else None
    if test is not None and (test.x.shape[1:], test.x.dtype) != (train.x.shape[1:], train.x.dtype):
        name = f"x{_TRAIN}" if split else "x"
        raise UserError(f"{path}: {name} has samples of {_form(train.x)}, x{_TEST} of {_form(test.x)}")
    return Raw(path.stem, train, test, images=train.x.dtype == torch.uint8)


def _file(task: Task, folder: Path) -> Path:
    names = [task.train] if task.train else sorted(p.name for p in folder.glob("*.npz"))
    if len(names) != 1:
        raise UserError(
            f'task.train = "{task.train}": {folder} has {len(names)} .npz files; name the one to read'
            f"{': ' if names else ''}{', '.join(names)}"
        )
    if not is_file(folder / names[0]):
        raise UserError(f'task.train = "{task.train}": there is no file {folder / names[0]}')
    return folder / names[0]


def _load(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with opened(path) as file, zipfile.ZipFile(file) as found:
            members = found.infolist()
            size = sum(each.file_size for each in members)
            check_ratio(str(path), size, path.stat().st_size)
            check_fits(str(path), size)
            return {each.filename.removesuffix(".npy"): _array(path, found, each) for each in members}
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise exceptions of many kinds for damaged files
        raise UserError(
            f"{path}: this is not an .npz file, or it is damaged ({error}); write one by numpy.savez(path, x=..., y=...)"
        ) from None


def _array(path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """Read one array, after its header has shown that the file contains as much as it claims."""
    with file.open(member) as content:
        version = np.lib.format.read_magic(content)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, kind = read_header[version](content) if version in read_header else ((), False, np.dtype(object))
        if kind.hasobject:
            raise UserError(
                f"{path}: the array {member.filename} contains Python objects, which are not unpickled; save it as numbers "
                'or text (array.astype("U"))'
            )
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize > member.file_size:
            raise ValueError(f"{member.filename} has {member.file_size:,} bytes, which is no array of shape {shape}")
    with file.open(member) as content:
        return np.asarray(np.lib.format.read_array(content, allow_pickle=False))


def _part(task: Task, path: Path, found: dict[str, npt.NDArray[Any]], suffix: str) -> Part:
    name = f"x{suffix}"
    if name not in found:
        raise UserError(f'{path}: there is no array "{name}"; it has {", ".join(found) or "nothing"}')
    others = {n: a for n, a in found.items() if n != name and n.endswith(suffix)}
    if not suffix:
        others = {n: a for n, a in others.items() if not n.endswith((_TRAIN, _TEST))}
    rows = found[name].shape[0] if found[name].ndim else 0
    columns = {n.removesuffix(suffix): _column(a) for n, a in others.items()}
    wanted = (*task.targets, task.client)
    for other, column in columns.items():
        if other in wanted and column.shape[:1] != (rows,):
            raise UserError(f'{path}: "{other}{suffix}" has shape {column.shape}, but "{name}" has {rows} rows')
    columns = {n: column for n, column in columns.items() if column.shape[:1] == (rows,)}
    client = None
    if task.client and suffix != _TEST:
        if task.client not in columns:
            raise UserError(
                f'task.client = "{task.client}": {path} has no array "{task.client}{suffix}"'
                f"{nearest(task.client, columns)}; it has {', '.join(columns)}"
            )
        client = columns[task.client]
        if client.ndim != 1 or missing(client).any():
            raise UserError(f'task.client = "{task.client}": {path}: each sample has one client, and none is missing')
    return Part(
        _samples(task, path, name, found[name]),
        columns,
        client,
        source=f"{path}, arrays *{suffix}" if suffix else str(path),
    )


def _column(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.reshape(len(array)) if array.ndim == 2 and array.shape[1] == 1 else array


def _samples(task: Task, path: Path, name: str, array: npt.NDArray[Any]) -> Tensor:
    if array.ndim < 2 or not array.size:
        raise UserError(f'{path}: "{name}" has shape {array.shape}; expected samples in rows, (n, ...)')
    shape = array.shape
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        if array.ndim == 3:
            array = array[:, None]
        elif array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1] not in (1, 3):
            raise UserError(f'{path}: "{name}": bytes are images of 1 or 3 channels, not of shape {shape}')
        return resize_arrays(array, task.image_size, task.channels)
    if array.dtype.kind not in "fiub":
        raise UserError(f'{path}: "{name}" is of type {array.dtype}; expected numbers')
    for setting in ("image_size", "channels"):
        if value := getattr(task, setting):
            raise UserError(
                f'task.{setting} = {value!r}: "{name}" of {path} is {array.dtype} of shape {array.shape}, but images are '
                "uint8 of shape (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w)"
            )
    check_fits(f'{path}: "{name}" as float32', 4 * array.size)
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and are refused below
        samples = array.astype(np.float32)
    if not np.isfinite(samples).all():
        row = int(np.flatnonzero(~np.isfinite(samples.reshape(len(samples), -1)).all(1))[0]) + 1
        raise UserError(f'{path}: "{name}", row {row}, has a number that is not finite; fill in or remove such samples')
    return torch.from_numpy(samples)


def _form(x: Tensor) -> str:
    return f"{'bytes' if x.dtype == torch.uint8 else 'numbers'} {tuple(x.shape[1:])}"
