"""Stars: generated images with two targets, the number of points of a star and its size.

Each image, 32x32 and grey, has one light star on a dark background. All draws are independent and uniform:

- points p: one of 3, 4, ..., 8. Target "points", 6 classes.
- size R in 6..14 pixels: the distance of the tips from the centre. Target "size", a value in pixels, with scale 4 and
  offset 10, so that models see -1..1.
- centre: each coordinate in R + 1 .. 31 - R, so that the whole star fits.
- rotation: in 0..2 pi.
- shape: the polygon of 2p corners at even angles, alternately R and 0.45 R from the centre; its area is
  0.45 p R^2 sin(pi / p).
- noise: -24..24 of 255 levels for each pixel; the background has level 28, the star 228.

The training pool has 4,000 stars and the global test set 1,000, always the same.
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
"""The inner corners' distance from the centre divided by the tips'."""

_DATA_SEED = 0  # The data do not depend on the experiment's seed.
_TRAIN, _TEST = 4000, 1000
_FINE = 8  # oversampling: each pixel is the share of ink in a square of 8x8
_DARK, _BRIGHT, _NOISE = 28, 200, 24


@functools.lru_cache(maxsize=1)
def stars(image_size: int = 0, channels: str = "") -> Raw:
    """The data set: x uint8 (n, 1, 32, 32); columns points (int64, 3..8) and size (float64, pixels of 32, 6..14).

    `image_size` and `channels` convert the images (`meadow.tasks.readers.decoding.resize_arrays`) but not the sizes.
    """
    parts = (_part(_TRAIN, "train"), _part(_TEST, "test"))
    train, test = (Part(resize_arrays(x, image_size, channels), columns) for x, columns in parts)
    return Raw("stars", train, test, KINDS, images=True)


def star(points: int, size: float, x: float, y: float, turn: float, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Draw a star without noise, uint8 (side, side): 255 times the share of ink in each pixel.

    `size`: the tips' distance from the centre (x, y), in pixels; (0, 0) is the top left corner. `turn`: the angle of a
    tip, in radians clockwise from the right.
    """
    corners = []
    for k in range(2 * points):
        radius, angle = size * (INNER if k % 2 else 1.0), turn + math.pi * k / points
        # Rounded, because a cosine's last bit differs between machines.
        corners.append((round(_FINE * (x + radius * math.cos(angle))), round(_FINE * (y + radius * math.sin(angle)))))
    canvas = Image.new("1", (_FINE * side, _FINE * side))
    ImageDraw.Draw(canvas).polygon(corners, fill=1)
    ink = np.asarray(canvas).reshape(side, _FINE, side, _FINE).sum((1, 3), dtype=np.int64)
    levels: npt.NDArray[np.uint8] = (ink * 255 // _FINE**2).astype(np.uint8)
    return levels


def _part(n: int, purpose: str) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[Any]]]:
    """Generate n stars: images (n, 1, 32, 32) and the two columns."""
    draw = numpy_generator(_DATA_SEED, "stars", purpose)
    points = draw.integers(3, 9, size=n)
    size = draw.uniform(6, 14, n)
    x, y = (draw.uniform(size + 1, SIDE - 1 - size) for _ in range(2))
    turn = draw.uniform(0, 2 * math.pi, n)
    noise = draw.integers(-_NOISE, _NOISE + 1, size=(n, SIDE, SIDE))
    ink = np.stack([star(*values) for values in zip(points.tolist(), size, x, y, turn, strict=True)]).astype(np.int64)
    images = (_DARK + ink * _BRIGHT // 255 + noise).astype(np.uint8)
    return images[:, None], {"points": points, "size": size}
