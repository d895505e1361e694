"""Image pipelines: prepare stored images for a model, with torchvision.transforms.v2.

docs/data-images.md explains the augmentations. Each training sample is augmented by its own random numbers, which come from
torch's global generator; the training loop seeds it by (run.seed, round, client). No step changes an image's shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meadow.config import schema
from meadow.config.load import nearest
from meadow.runtime.errors import UserError
from meadow.tasks.data import Dataset
from meadow.tasks.models.vision import torchvision

# Augmentations with a number above 0: its largest value, and an example.
_NUMBERS = {
    "crop": (1024, "4"),
    "resized-crop": (1.0, "0.5"),
    "rotate": (180.0, "15"),
    "jitter": (1.0, "0.2"),
    "erase": (1.0, "0.25"),
}
_NAMES = ("flip", "vflip", *_NUMBERS)

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of one data set under `task.mean`, `task.std` and `task.augment`; see `image_pipeline`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps: tuple[Step, ...]

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """Images (n, channels, height, width), uint8 or float32 in 0..1 -> float32, same shape.

        Pixels are scaled to 0..1, augmented if `training`, then normalised: (x - mean) / std per channel.
        """
        v2 = torchvision().transforms.v2
        images: Tensor = v2.functional.to_dtype(x, torch.float32, scale=True)
        if training and self.steps:
            images = torch.stack([self._augment(image) for image in images])
        if self.std:
            images = v2.functional.normalize(images, self.mean, self.std)
        return images

    def _augment(self, image: Tensor) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


def image_pipeline(dataset: Dataset, task: schema.Task) -> Pipeline | None:
    """The pipeline for the data set's images; None if the samples are not images, which models take as stored.

    Raises UserError for an unknown entry of `task.augment`, for numbers of means that do not match the channels, and for
    either setting if the samples are not images.
    """
    if not dataset.images:
        for name, value in (("augment", task.augment), ("mean", task.mean)):
            if value:
                raise UserError(
                    f"task.{name} = {list(value)}: the samples of {dataset.name} are not images: leave task.{name} empty"
                )
        return None
    channels, height, width = dataset.train.x.shape[1:]
    if len(task.mean) not in (0, 1, channels):
        raise UserError(
            f"task.mean = {list(task.mean)}: the images of {dataset.name} have {channels} "
            f"{'channel' if channels == 1 else 'channels'}: give task.mean and task.std one value, or one per channel"
        )
    steps = tuple(_step(task, spec, height, width) for spec in task.augment)
    return Pipeline(task.mean, task.std, steps)


def _step(task: schema.Task, text: str, height: int, width: int) -> Step:
    name, value = _read(task, text)
    v2 = torchvision().transforms.v2
    step: Step
    match name:
        case "flip":
            step = v2.RandomHorizontalFlip()
        case "vflip":
            step = v2.RandomVerticalFlip()
        case "crop":
            step = v2.RandomCrop((height, width), padding=int(value))
        case "resized-crop":
            step = v2.RandomResizedCrop((height, width), scale=(value, 1.0), antialias=True)
        case "rotate":
            step = v2.RandomRotation(value, interpolation=v2.InterpolationMode.BILINEAR)
        case "jitter":
            step = v2.ColorJitter(brightness=value, contrast=value, saturation=value)
            if task.channels == "bgr":  # jitter's grey expects red, green, blue
                step = v2.Compose([_swap_channels, step, _swap_channels])
        case _:
            step = v2.RandomErasing(p=value, value=list(task.mean) or 0)
    return step


def _swap_channels(image: Tensor) -> Tensor:
    return image.flip(-3)


def _read(task: schema.Task, text: str) -> tuple[str, float]:
    """An entry of `task.augment`: its name and its number (0 if it takes none)."""

    def wrong(why: str) -> UserError:
        return UserError(f'task.augment = {list(task.augment)}: "{text}": {why}')

    name, *words = text.split() or [""]
    if name not in _NAMES:
        raise wrong(f"there is no such augmentation{nearest(name, _NAMES)}; the augmentations are {', '.join(_NAMES)}")
    if name not in _NUMBERS:
        if words:
            raise wrong(f'"{name}" takes no number')
        return name, 0.0
    most, example = _NUMBERS[name]
    form = "a whole number of pixels above 0" if name == "crop" else f"a number above 0 and at most {most:g}"
    try:
        value = float(words[0]) if len(words) == 1 else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value <= most or (name == "crop" and not value.is_integer()):
        raise wrong(f'"{name}" takes {form}, for example "{name} {example}"')
    return name, value
