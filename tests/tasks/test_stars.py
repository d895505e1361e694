"""The stars: what is drawn is what the labels say."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from meadow.config.schema import Task
from meadow.tasks.readers.datasets import open_dataset
from meadow.tasks.readers.stars import INNER, star, stars

TASK = Task(dataset="stars", targets=("points", "size"))


def area(points: int, size: float) -> float:
    """Of 2p triangles with sides R and 0.45 R that meet at the centre at an angle of pi / p."""
    return 2 * points * (size * INNER * size * math.sin(math.pi / points) / 2)


def perimeter(points: int, size: float) -> float:
    """2p edges, each opposite to the centre in such a triangle."""
    return 2 * points * size * math.sqrt(1 + INNER**2 - 2 * INNER * math.cos(math.pi / points))


@pytest.mark.parametrize("points", range(3, 9))
@pytest.mark.parametrize("size", [6.0, 9.7, 14.0])
def test_ink_is_the_polygon_s_area(points: int, size: float) -> None:
    """A corner is rounded by half a fine pixel at most, and Pillow fills the pixels that an edge runs through: the
    drawn outline is within one fine pixel, an eighth of a pixel, of the true one."""
    for turn in (0.0, 0.3, 1.1):
        image = star(points, size, 16.2, 15.9, turn)
        rounded_down = 32 * 32 / 255  # each pixel loses less than one level
        ink = image.sum(dtype=np.int64) / 255
        assert -perimeter(points, size) / 8 - rounded_down <= ink - area(points, size) <= perimeter(points, size) / 8


@pytest.mark.parametrize("points", range(3, 9))
def test_a_ring_between_inner_and_outer_corners_crosses_every_point(points: int) -> None:
    image = star(points, 100, 128, 128, 0.37, side=256)
    angle = np.linspace(0, 2 * math.pi, 3600, endpoint=False)
    for radius in (60, 75, 90):
        ring = image[(128 + radius * np.sin(angle)).astype(int), (128 + radius * np.cos(angle)).astype(int)] > 127
        assert np.count_nonzero(ring & ~np.roll(ring, 1)) == points
    # The middle of the first arc from the right is the first tip: 0.37 clockwise, as y grows downwards.
    tips = np.flatnonzero(image[(128 + 97 * np.sin(angle)).astype(int), (128 + 97 * np.cos(angle)).astype(int)] > 127)
    first = angle[tips][angle[tips] < 0.37 + math.pi / points].mean()
    assert first == pytest.approx(0.37, abs=0.01)
    assert not image[:27].any() and not image[:, :27].any() and not image[229:].any() and not image[:, 229:].any()


def test_the_data_set_and_its_law() -> None:
    data = open_dataset(TASK)
    assert data.images and data.train.x.shape == (4000, 1, 32, 32) and data.test.x.shape == (1000, 1, 32, 32)
    assert data.train.x.dtype == torch.uint8
    points, size = data.targets
    assert (points.kind, points.names) == ("class", ("3", "4", "5", "6", "7", "8"))
    assert (size.kind, size.scale, size.offset) == ("value", 4.0, 10.0)
    counts, sizes = data.train.y["points"].bincount(minlength=6).numpy(), data.train.y["size"].double().numpy()
    assert (counts.sum(), sizes.min() >= 6, sizes.max() <= 14) == (4000, True, True)
    # Chi-squared with 5 degrees of freedom is above 20.5 once in a thousand; a mean of 4,000 has deviation 2.31 / 63.2.
    assert ((counts - 4000 / 6) ** 2 / (4000 / 6)).sum() < 20.5
    assert abs(sizes.mean() - 10) < 3.3 * 8 / math.sqrt(12 * 4000)
    seen = {x.numpy().tobytes() for x in data.train.x}
    assert len(seen) == 4000 and not any(x.numpy().tobytes() in seen for x in data.test.x)


def test_labels_are_those_of_the_drawn_stars() -> None:
    """The ink of every image, less the dark level, is its own star's area within outline, rounding and noise.

    The noise of 1,024 pixels, each of -24..24 evenly, has deviation 32 sqrt((49^2 - 1) / 12) = 453 levels, 2.26 pixels
    of ink; five deviations are exceeded by none of 5,000 with a chance of 0.997.
    """
    data = open_dataset(TASK)
    for part in (data.train, data.test):
        ink = (part.x.double().sum((1, 2, 3)).numpy() - 28 * 1024) / 200
        for found, label, size in zip(ink, part.y["points"].tolist(), part.y["size"].tolist(), strict=True):
            slack = perimeter(label + 3, size) / 8 + 1024 / 255 + 1024 / 200 + 5 * 453 / 200
            assert abs(found - area(label + 3, size)) < slack


def test_the_points_of_the_small_noisy_stars_can_be_counted() -> None:
    """Around the centre of a star's ink, the strongest harmonic of a ring's profile is the number of its points."""
    data = open_dataset(TASK).train
    angle = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    wrong = 0
    for image, label, size in zip(data.x[:, 0].double().numpy(), data.y["points"], data.y["size"], strict=True):
        ink = np.clip((image - 128) / 100, 0, 1)
        centre = [(ink * axis).sum() / ink.sum() for axis in np.mgrid[:32, :32]]
        profile = np.zeros(96)
        for share in (0.6, 0.7, 0.8):
            place = [centre[0] + share * float(size) * np.sin(angle), centre[1] + share * float(size) * np.cos(angle)]
            profile += map_coordinates(image, place, order=1)
        wrong += 3 + int(np.abs(np.fft.rfft(profile))[3:9].argmax()) != int(label) + 3
    assert wrong == 0


def test_the_same_call_gives_the_same_bytes() -> None:
    first = stars()
    stars.cache_clear()
    again = stars()
    assert again is not first
    for a, b in ((first.train, again.train), (first.test, again.test)):
        assert b is not None and a is not None and torch.equal(a.x, b.x)
        assert all(np.array_equal(a.columns[name], b.columns[name]) for name in ("points", "size"))


def test_stars_can_be_larger_and_coloured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEADOW_CACHE", str(tmp_path))
    small, large = stars().test, stars(48, "rgb").test
    assert small is not None and large is not None and large.x.shape == (1000, 3, 48, 48)
    assert torch.equal(large.x[:, 0], large.x[:, 2])
    # Resizing keeps the mean level within the rounding of a pixel.
    difference = small.x.double().mean((1, 2, 3)) - large.x[:, :1].double().mean((1, 2, 3))
    assert difference.abs().max() < 1
