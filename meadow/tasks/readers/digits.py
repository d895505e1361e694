"""The default task and its source task: 1,797 real handwritten digits, and any number of generated printed ones.

Both are 8x8 grey images in 0..1: the share of ink in each 4x4 block of a 32x32 bitmap (Alpaydin and
Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI). Both have two targets: the digit, and its slant.
"""

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, features

from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.data import Data, Part, Raw

KINDS = {"digit": "class 10", "slant": "value scale 0.25"}
"""The digit 0..9, and its slant in radians. The slant's scale is a public constant: twice its spread in both."""

_DATA_SEED = 0  # The data do not depend on the experiment's seed.
_TEST_A_DIGIT = 27
_PRINTED_TEST = 1000


@functools.lru_cache(maxsize=1)
def digits() -> Raw:
    """scikit-learn's handwritten digits: x float32 (n, 1, 8, 8) in 0..1; digit int64; slant float32, radians.

    The global test set has 270 images, 27 of each digit, always the same; the clients have the other 1,527.
    """
    # Reads scikit-learn's file without importing scikit-learn, which takes 0.6 s in each process.
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    x = (table[:, :-1].reshape(-1, 8, 8) / 16).astype(np.float32)
    digit = table[:, -1].astype(np.int64)
    draw = numpy_generator(_DATA_SEED, "digits", "test")
    held_out = np.concatenate([draw.permutation(np.flatnonzero(digit == d))[:_TEST_A_DIGIT] for d in range(10)])
    is_test = np.zeros(len(digit), dtype=bool)
    is_test[held_out] = True
    train, test = (_part(_data(x[where], digit[where])) for where in (~is_test, is_test))
    return Raw("digits", train, test, KINDS)


@functools.lru_cache(maxsize=2)
def printed_dataset(samples: int) -> Raw:
    """Printed digits as a data set: a training pool of `samples` and a global test set of 1,000."""
    everything = printed_digits(samples + _PRINTED_TEST, _DATA_SEED)
    train, test = torch.arange(samples), torch.arange(samples, samples + _PRINTED_TEST)
    return Raw("printed-digits", _part(everything.take(train)), _part(everything.take(test)), KINDS)


def slant(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The slant of each image in radians, from upright, positive if the top leans to the right.

    images: (n, height, width) of ink >= 0. With x to the right and y *upwards*, m the total ink and (X, Y) its centre,
    the second central moments are mu11 = sum ink (x - X)(y - Y) and mu02 = sum ink (y - Y)^2, and
    slant = arctan(mu11 / mu02). A shear x' = x + t y turns mu11 into mu11 + t mu02 and leaves mu02 unchanged, so it gives
    a figure with mu11 = 0 the slant arctan(t): the angle that deslanting removes (LeCun et al. 1998, section III.A). An
    image without ink, or with all its ink in one row, has slant 0. Result: float32 (n,), in -pi/2..pi/2.
    """
    ink = images.astype(np.float64)
    height, width = ink.shape[1:]
    x, y = np.arange(width) - (width - 1) / 2, (height - 1) / 2 - np.arange(height)
    # Sums, because the summation order of matrix products depends on the processor.
    rows, columns = ink.sum(2), ink.sum(1)
    mass = rows.sum(1)
    safe = np.where(mass > 0, mass, 1)
    centre_x, centre_y = (columns * x).sum(1) / safe, (rows * y).sum(1) / safe
    mu11 = (ink * (y[:, None] * x[None, :])).sum((1, 2)) - mass * centre_x * centre_y
    mu02 = (rows * y**2).sum(1) - mass * centre_y**2
    flat = mu02 <= 1e-9 * safe
    return np.arctan(np.where(flat, 0.0, mu11 / np.where(flat, 1.0, mu02))).astype(np.float32)


def printed_digits(samples: int, seed: int) -> Data:
    """Generate `samples` printed digits with random distortion and noise, equally many of each digit (within 1).

    Pillow bundles two fonts, Aileron and a small bitmap font. For each sample a large digit of either is scaled, sheared,
    rotated and shifted (an affine map), bent (offsets drawn on a 5x5 grid and interpolated), thresholded to a bolder or
    lighter 32x32 bitmap in which some pixels flip, and averaged to 8x8. All draws are uniform. The same (samples, seed)
    gives the same bits: after Pillow's raster all arithmetic is elementwise, in float64. x: float32 (n, 1, 8, 8) in
    multiples of 1/16; digit int64; slant float32, radians, measured on the final image. 4,000 take 0.25 s.
    """
    draw = numpy_generator(seed, "printed-digits")
    digit = draw.permutation(np.arange(samples, dtype=np.int64) % 10)
    glyphs = _glyphs()
    images = np.concatenate([_render(glyphs, digit[i : i + 1000], draw) for i in range(0, samples, 1000)])
    return _data(images, digit)


_SIDE = 32  # side of the bitmap, in pixels
_GLYPH = 128  # side of a glyph's raster; the ink has half this height
_BLUR = 3  # half width of the blur, in pixels of that raster: limits how bold or light a print can be
_NODES = 5  # side of the grid of bending offsets


def _render(
    glyphs: npt.NDArray[np.float64], digit: npt.NDArray[np.int64], draw: np.random.Generator
) -> npt.NDArray[np.float32]:
    n = len(digit)

    def uniform(low: float, high: float) -> npt.NDArray[np.float64]:
        return draw.uniform(low, high, n)[:, None, None]

    # Lengths are in half sides of the bitmap. The ranges were tuned for transfer to a client with 45 handwritten digits.
    wide, tall = uniform(0.6, 1.05), uniform(0.9, 1.05)
    shear, half_turn = uniform(-0.15, 0.15), uniform(-0.04, 0.04)
    right, up = uniform(-0.15, 0.15), uniform(-0.1, 0.1)
    lightness, flips = uniform(0.2, 0.55), uniform(0.0, 0.01)
    bend_x, bend_y = (_between_nodes(draw.uniform(-0.2, 0.2, (n, _NODES, _NODES))) for _ in range(2))
    # The rotation by 2 arctan(half_turn), without sines, whose last bits differ between machines.
    cosine, sine = (1 - half_turn**2) / (1 + half_turn**2), 2 * half_turn / (1 + half_turn**2)
    # Each bitmap pixel's centre in -1..1, y upwards, mapped back through shift, rotation, bend, shear and scale.
    grid = (2 * np.arange(_SIDE) + 1 - _SIDE) / _SIDE
    x, y = grid[None, None, :] - right, -grid[None, :, None] - up
    x, y = cosine * x + sine * y + bend_x, cosine * y - sine * x + bend_y
    y = y / tall
    x = (x - shear * y) / wide
    column = np.clip((x + 2) * (_GLYPH / 4), 0, _GLYPH - 1).astype(np.int64)
    row = np.clip((2 - y) * (_GLYPH / 4), 0, _GLYPH - 1).astype(np.int64)
    font = draw.integers(len(glyphs), size=n)
    ink = glyphs[font[:, None, None], digit[:, None, None], row, column] > lightness
    ink ^= draw.random(ink.shape) < flips
    shares: npt.NDArray[np.float32] = (ink.reshape(n, 8, 4, 8, 4).sum((2, 4)) / 16).astype(np.float32)
    return shares


def _between_nodes(nodes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bilinear interpolation of values on an even grid (n, 5, 5) to (n, 32, 32)."""
    place = np.arange(_SIDE) * ((_NODES - 1) / (_SIDE - 1))
    low = np.minimum(place.astype(np.int64), _NODES - 2)
    part = place - low
    tall = nodes[:, low] * (1 - part)[None, :, None] + nodes[:, low + 1] * part[None, :, None]
    full: npt.NDArray[np.float64] = tall[:, :, low] * (1 - part) + tall[:, :, low + 1] * part
    return full


@functools.lru_cache(maxsize=1)
def _glyphs() -> npt.NDArray[np.float64]:
    """The ten digits of both fonts, blurred, float64 (2, 10, 128, 128) in 0..1: upright, centred, 64 pixels tall."""
    if not features.check("freetype2"):
        raise UserError(
            "the printed digits need Pillow's bundled font, and this Pillow was built without FreeType: install "
            "Pillow's wheel (pip install --force-reinstall --only-binary :all: pillow)"
        )
    fonts = (
        (ImageFont.load_default(size=4 * _GLYPH), "L", Image.Resampling.BOX),
        (ImageFont.load_default_imagefont(), "1", Image.Resampling.BICUBIC),  # 7 pixels tall: smoothed on enlarging
    )
    glyphs = np.empty((len(fonts), 10, _GLYPH, _GLYPH))
    height = _GLYPH // 2
    for f, (font, mode, resampling) in enumerate(fonts):
        for d in range(10):
            left, top, right, bottom = (int(v) for v in font.getbbox(str(d)))
            large = Image.new(mode, (right - left, bottom - top))
            ImageDraw.Draw(large).text((-left, -top), str(d), fill=255, font=font)
            large = large.crop(large.getbbox()).convert("L")
            width = round(large.width * height / large.height)
            canvas = Image.new("L", (_GLYPH, _GLYPH))
            canvas.paste(large.resize((width, height), resampling), ((_GLYPH - width) // 2, (_GLYPH - height) // 2))
            glyphs[f, d] = _box_blur(_box_blur(np.asarray(canvas, dtype=np.int64)))
    return glyphs / (255 * (2 * _BLUR + 1) ** 4)


def _box_blur(image: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The sum over the square of 2 _BLUR + 1 pixels around each pixel; in integers, so it is exact."""
    padded = np.pad(image, _BLUR)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * _BLUR + 1, 2 * _BLUR + 1))
    sums: npt.NDArray[np.int64] = windows.sum((2, 3))
    return sums


def _data(images: npt.NDArray[np.float32], digit: npt.NDArray[np.int64]) -> Data:
    x = torch.from_numpy(np.ascontiguousarray(images[:, None]))
    return Data(x, {"digit": torch.from_numpy(digit), "slant": torch.from_numpy(slant(images))})


def _part(data: Data) -> Part:
    return Part(data.x, {name: y.numpy() for name, y in data.y.items()})
