"""Image pipelines: from images as they are stored to samples as a model takes them, with torchvision.transforms.v2.

    flip                mirror left and right, with probability 1/2
    vflip               mirror top and bottom, with probability 1/2
    crop PADDING        pad by so many black pixels on each side, and cut a square of the old size at random
    resized-crop LOW    cut an area of LOW..1 of the image, 3/4 to 4/3 as wide as tall, and resize it to the old size
    rotate DEGREES      turn by an angle in -DEGREES..DEGREES, bilinear, black outside
    jitter STRENGTH     brightness, contrast and saturation, each times a factor in 1-STRENGTH..1+STRENGTH
    erase P             with probability P, paint a rectangle of 2% to 33% of the area in the mean colour (`task.mean`)

`task.augment` lists these in the order in which they are done, on training samples only; each sample has its own draw.
Every draw comes from torch's global generator, which the training loop seeds by (run.seed, round, client): the same seed
gives the same augmentation. No step changes an image's shape.
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

# Of the augmentations that take a number above 0: the most it may be, and an example of it.
_NUMBERS = {
    "crop": (math.inf, "4"),
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
        """Images (n, channels, height, width), uint8 or float32 in 0..1, as float32 of the same shape.

        0..255 becomes 0..1; then the augmentations, if `training`, one sample after another; then (x - mean) / std for
        each channel. `x` itself is never changed.
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
    """The pipeline for the data set's images; None for samples that are no images, which models take as they are stored.

    Raises UserError for an entry of `task.augment` that is not understood, for as many means and deviations as the
    images have no channels, and for any of them where the samples are no images.
    """
    if not dataset.images:
        for name, value in (("augment", task.augment), ("mean", task.mean)):
            if value:
                raise UserError(
                    f"task.{name} = {list(value)}: the samples of {dataset.name} are no images: leave task.{name} empty"
                )
        return None
    channels, height, width = dataset.train.x.shape[1:]
    if len(task.mean) not in (0, 1, channels):
        raise UserError(
            f"task.mean = {list(task.mean)}: the images of {dataset.name} have {channels} "
            f"{'channel' if channels == 1 else 'channels'}: give task.mean and task.std one value, or one a channel"
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
            if task.channels == "bgr":  # its grey is a weighted mean of red, green and blue, in this order
                step = v2.Compose([_reversed, step, _reversed])
        case _:
            step = v2.RandomErasing(p=value, value=list(task.mean) or 0)
    return step


def _reversed(image: Tensor) -> Tensor:
    return image.flip(-3)


def _read(task: schema.Task, text: str) -> tuple[str, float]:
    """One entry of `task.augment`: its name, and its number (0 if it takes none)."""

    def wrong(why: str) -> UserError:
        return UserError(f'task.augment = {list(task.augment)}: "{text}": {why}')

    name, *words = text.split() or [""]
    if name not in _NAMES:
        raise wrong(f"there is no such augmentation{nearest(name, _NAMES)}; there are {', '.join(_NAMES)}")
    if name not in _NUMBERS:
        if words:
            raise wrong(f'"{name}" takes no number')
        return name, 0.0
    most, example = _NUMBERS[name]
    form = "a whole number of pixels" if name == "crop" else f"a number, {most:g} at most,"
    try:
        value = float(words[0]) if len(words) == 1 else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value <= most or (name == "crop" and not value.is_integer()):
        raise wrong(f'"{name}" takes {form} above 0, for example "{name} {example}"')
    return name, value
