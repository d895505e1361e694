"""Reads pretrained trunks: published weights, or a .safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from meadow.arrays.files import DamagedFile, read_arrays
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.runtime.limits import is_file, opened, user_path
from meadow.tasks.models.backbones import TRANSFORMERS, torchvision_names, transformers_weights
from meadow.tasks.models.vision import torchvision

TRUNK = "trunk."
PUBLISHED = "DEFAULT"


def pretrained_trunk(task: Task, trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights `task.pretrained` for a trunk's state (names "trunk.*"), as float32.

    "DEFAULT": the model's published weights, downloaded by torchvision or transformers if necessary. Else a .safetensors
    file, whose names are Meadow's ("trunk.*"; others are ignored) or the model's own; then the classifier and batch
    counters are ignored. Half precision is read as float32. Raises UserError for arrays that are missing, unreadable or
    do not fit.
    """
    if task.pretrained == PUBLISHED:
        arrays, origin = {TRUNK + n: t for n, t in _published(task).items()}, f'the published weights of "{task.model}"'
    else:
        arrays, origin = _from_file(task.pretrained), f'task.pretrained = "{task.pretrained}"'
    if not any(name.startswith(TRUNK) for name in arrays):
        arrays = {TRUNK + name: tensor for name, tensor in arrays.items()}
    arrays = {n: t for n, t in arrays.items() if n.startswith(TRUNK) and not n.endswith("num_batches_tracked")}
    for part in ("classifier.", "fc.", "head.", "heads.", "aux1.", "aux2.", "AuxLogits."):
        if not any(name.startswith(TRUNK + part) for name in trunk):
            arrays = {n: t for n, t in arrays.items() if not n.startswith(TRUNK + part)}
    return {name: _fitting(name, arrays, trunk, origin) for name in sorted(trunk.keys() | _needed(arrays, trunk))}


def _needed(arrays: Mapping[str, Tensor], trunk: Mapping[str, Tensor]) -> set[str]:
    """The arrays that the trunk must have: all but those of layers that it has in part (VGG's classifier)."""
    partly = {name.split(".")[1] for name in trunk} & {"classifier", "head", "heads", "fc"}
    return {name for name in arrays if name in trunk or name.split(".")[1] not in partly}


def _fitting(name: str, arrays: Mapping[str, Tensor], trunk: Mapping[str, Tensor], origin: str) -> Tensor:
    way_out = "set task.model, task.hidden and task.norm as they were when the weights were made"
    if name not in arrays:
        raise UserError(f'{origin} has no array "{name}", which the trunk needs: {way_out}')
    if name not in trunk:
        raise UserError(f'{origin} has an array "{name}", which the trunk does not have: {way_out}')
    array = arrays[name]
    if array.shape != trunk[name].shape:
        raise UserError(
            f'{origin}: array "{name}" has shape {tuple(array.shape)}, the trunk\'s has {tuple(trunk[name].shape)}: '
            f"{way_out}"
        )
    if not array.is_floating_point() or not array.isfinite().all():
        raise UserError(
            f'{origin}: array "{name}" has no finite floating-point numbers: use the file of a trained model'
        )
    return array.to(torch.float32)


def _from_file(place: str) -> dict[str, Tensor]:
    path = user_path(place)
    if not is_file(path):
        raise UserError(
            f'task.pretrained = "{place}": there is no such file; write "source", "{PUBLISHED}", the path of a '
            ".safetensors file, or an empty string for a random start"
        )
    try:
        return read_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f'task.pretrained = "{place}" cannot be read as a .safetensors file: {error}') from None


def read_file(path: Path) -> dict[str, Tensor]:
    """Read a run's checkpoint or any .safetensors file. Raises SafetensorError or OSError."""
    try:
        return {name: torch.from_numpy(value) for name, value in read_arrays(path).items()}
    except DamagedFile:
        with opened(path):  # the library would wait for a pipe
            return load_file(path)


def _published(task: Task) -> dict[str, Tensor]:
    if task.model.startswith(TRANSFORMERS):
        return transformers_weights(task)
    if task.model not in torchvision_names():
        raise UserError(
            f'task.pretrained = "{PUBLISHED}": task.model = "{task.model}" has no published weights; torchvision\'s models '
            'have. Write "source", a .safetensors file or an empty string'
        )
    weights: Any = torchvision().models.get_model_weights(task.model).DEFAULT
    try:
        return cast(dict[str, Tensor], weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f'task.pretrained = "{PUBLISHED}": {weights.url} cannot be downloaded ({error}); put that file in '
            f"{torch.hub.get_dir()}/checkpoints, or write the path of a .safetensors file"
        ) from None
