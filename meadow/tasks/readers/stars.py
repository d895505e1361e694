"""Stars: made images with two things to tell at once, how many points a star has and how large it is.

One star an image, 32x32, grey, white on dark. Its law, all draws independent and uniform unless said otherwise:

- points p: one of 3, 4, ..., 8. Target "points", a class of 6.
- size R in 6..14 pixels: the distance of its tips from its centre. Target "size", a value in pixels, of scale 4 and
  offset 10, so that it lies in -1..1 for a model.
- its centre, wherever the whole star fits: each coordinate in R + 1 .. 31 - R.
- its turn, in 0..2 pi.
- the star is the polygon of 2p corners at even angles, in turn R and 0.45 R from the centre; its area is
  0.45 p R^2 sin(pi / p).
- noise: to each pixel, -24..24 of 255 levels is added; the dark is at level 28, the star at 228.

4,000 of them are the training pool and 1,000 the global test set, always the same ones.
"""

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from meadow.runtime.seeds import numpy_generator
from meadow.tasks.data import Part, Raw
from meadow.tasks.readers.decoding import resize_arrays

KINDS = {"points": "class 3 4 5 6 7 8", "size": "value scale 4 offset 10"}
SIDE = 32
INNER = 0.45
"""The inner corners' distance from the centre, as a share of the tips'."""

_DATA_SEED = 0  # The data are the data: they do not depend on the experiment's seed.
_TRAIN, _TEST = 4000, 1000
_FINE = 8  # the polygon is drawn so many times as large, and each pixel is the share of ink in its square
_DARK, _BRIGHT, _NOISE = 28, 200, 24


@functools.lru_cache(maxsize=1)
def stars(image_size: int = 0, channels: str = "") -> Raw:
    """The data set: x uint8 (n, 1, 32, 32); columns points (int64, 3..8) and size (float64, pixels of 32, 6..14).

    `image_size` and `channels` resize and colour the images (`meadow.tasks.readers.decoding.resize_arrays`); the sizes stay.
    """
    parts = (_part(_TRAIN, "train"), _part(_TEST, "test"))
    train, test = (Part(resize_arrays(x, image_size, channels), columns) for x, columns in parts)
    return Raw("stars", train, test, KINDS, images=True)


def star(points: int, size: float, x: float, y: float, turn: float, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """A clean star on (side, side) pixels: 255 times the share of each pixel that is ink.

    `size`, the tips' distance from the centre (x, y), in pixels; (0, 0) is the corner at the top left. `turn`, radians
    clockwise, is the angle of a tip from the direction to the right.
    """
    corners = []
    for k in range(2 * points):
        radius, angle = size * (INNER if k % 2 else 1.0), turn + math.pi * k / points
        # Whole numbers: a cosine's last bit, which differs between machines, does not move a corner.
        corners.append((round(_FINE * (x + radius * math.cos(angle))), round(_FINE * (y + radius * math.sin(angle)))))
    canvas = Image.new("1", (_FINE * side, _FINE * side))
    ImageDraw.Draw(canvas).polygon(corners, fill=1)
    ink = np.asarray(canvas).reshape(side, _FINE, side, _FINE).sum((1, 3), dtype=np.int64)
    levels: npt.NDArray[np.uint8] = (ink * 255 // _FINE**2).astype(np.uint8)
    return levels


def _part(n: int, purpose: str) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[Any]]]:
    """n stars of their own draw: images (n, 1, 32, 32) and the two columns."""
    draw = numpy_generator(_DATA_SEED, "stars", purpose)
    points = draw.integers(3, 9, size=n)
    size = draw.uniform(6, 14, n)
    x, y = (draw.uniform(size + 1, SIDE - 1 - size) for _ in range(2))
    turn = draw.uniform(0, 2 * math.pi, n)
    noise = draw.integers(-_NOISE, _NOISE + 1, size=(n, SIDE, SIDE))
    ink = np.stack([star(*law) for law in zip(points.tolist(), size, x, y, turn, strict=True)]).astype(np.int64)
    images = (_DARK + ink * _BRIGHT // 255 + noise).astype(np.uint8)
    return images[:, None], {"points": points, "size": size}
