"""Arrays in an .npz file: x, one or more targets, optionally whose each sample is. Never pickled."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from config.errors import UserError
from config.schema import Task
from tasks.data import Part, Raw
from tasks.decoding import resize_arrays

_TRAIN, _TEST = "_train", "_test"


def arrays(task: Task, folder: Path) -> Raw:
    """The arrays of `task.train` (default: the only .npz file of the folder).

    `x_train`, `y_train`, ... and `x_test`, `y_test`, ...; or `x`, `y`, ... without a test set. x: (n, *shape) of numbers,
    read as float32; bytes (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w) are images, made `task.image_size` pixels large
    and of `task.channels` if these are set. Every other array with n rows may be a target; `task.client` names the one
    that says whose each sample is. Raises UserError for what does not fit.
    """
    path = _file(task, folder)
    found = _load(path)
    split = f"x{_TRAIN}" in found
    train = _part(task, path, found, _TRAIN if split else "")
    test = _part(task, path, found, _TEST) if f"x{_TEST}" in found else None
    if test is not None and test.x.shape[1:] != train.x.shape[1:]:
        raise UserError(f"{path}: x{_TRAIN} has samples of {train.x.shape[1:]}, x{_TEST} of {test.x.shape[1:]}")
    return Raw(path.stem, train, test, images=train.x.dtype == torch.uint8)


def _file(task: Task, folder: Path) -> Path:
    names = [task.train] if task.train else sorted(p.name for p in folder.glob("*.npz"))
    if len(names) != 1:
        raise UserError(
            f'task.train = "{task.train}": {folder} has {len(names)} .npz files; name one: {", ".join(names)}'
        )
    if not (folder / names[0]).is_file():
        raise UserError(f'task.train = "{task.train}": there is no file {folder / names[0]}')
    return folder / names[0]


def _load(path: Path) -> dict[str, npt.NDArray[Any]]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: this is not an .npz file; numpy.savez makes one")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path}: an array holds Python objects, which are never unpickled; save it as numbers or text "
                '(array.astype("U"))'
            ) from None
        raise UserError(f"{path}: this is not an .npz file ({error})") from None
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: this is not an .npz file ({error})") from None


def _part(task: Task, path: Path, found: dict[str, npt.NDArray[Any]], suffix: str) -> Part:
    if f"x{suffix}" not in found:
        raise UserError(f'{path}: there is no array "x{suffix}"; it has {", ".join(found) or "nothing"}')
    x = _samples(task, path, f"x{suffix}", found[f"x{suffix}"])
    others = {n: a for n, a in found.items() if n != f"x{suffix}" and n.endswith(suffix)}
    if not suffix:
        others = {n: a for n, a in others.items() if not n.endswith((_TRAIN, _TEST))}
    columns = {n.removesuffix(suffix): _column(a) for n, a in others.items()}
    client = None
    if task.client and suffix != _TEST:
        if task.client not in columns:
            raise UserError(f'task.client = "{task.client}": {path} has no such array; it has {", ".join(columns)}')
        client = columns[task.client]
    for name, column in columns.items():
        if name in (*task.targets, task.client) and len(column) != len(x):
            raise UserError(f'{path}: "{name}{suffix}" has {len(column)} rows, "x{suffix}" {len(x)}')
    return Part(x, columns, client, source=f"{path}, arrays *{suffix}")


def _column(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.reshape(len(array)) if array.ndim == 2 and array.shape[1] == 1 else array


def _samples(task: Task, path: Path, name: str, array: npt.NDArray[Any]) -> Tensor:
    if array.ndim < 2 or not len(array):
        raise UserError(f'{path}: "{name}" has shape {array.shape}; expected samples in rows, (n, ...)')
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        if array.ndim == 3:
            array = array[:, None]
        elif array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1] not in (1, 3):
            raise UserError(f'{path}: "{name}": bytes are images of 1 or 3 channels, not of shape {array.shape}')
        return resize_arrays(array, task.image_size, task.channels)
    if array.dtype.kind not in "fiub":
        raise UserError(f'{path}: "{name}" is of {array.dtype}; expected numbers')
    samples = array.astype(np.float32)
    if not np.isfinite(samples).all():
        row = int(np.flatnonzero(~np.isfinite(samples.reshape(len(samples), -1)).all(1))[0])
        raise UserError(f'{path}: "{name}", row {row}, has a number that is not finite; fill or leave out such samples')
    return torch.from_numpy(samples)
