"""The digits, handwritten and printed, and what their slant means."""

import hashlib
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from meadow.config.schema import Task
from meadow.strategies.check import load
from meadow.tasks.data import data_sha256
from meadow.tasks.readers.datasets import open_dataset
from meadow.tasks.readers.digits import printed_digits, slant
from meadow.tasks.source import source_state
from meadow.tasks.task import open_task

DIGITS_SHA256 = "25104659fae2e4d93dab04d1781f1591be76e5843749605b6bcd75780dd59585"


def sheared(image: np.ndarray, tangent: float) -> np.ndarray:
    """Move each row sideways by tangent times its height; a pixel's ink is shared between its two new neighbours.

    Sharing keeps every row's ink and first moment, so the moments of the result are the exact shear's.
    """
    height, width = image.shape
    result = np.zeros((height, width + 2 * height))
    for row in range(height):
        move = tangent * ((height - 1) / 2 - row) + height
        whole = math.floor(move)
        result[row, whole : whole + width] += image[row] * (1 - (move - whole))
        result[row, whole + 1 : whole + 1 + width] += image[row] * (move - whole)
    return result


@pytest.mark.parametrize("angle", [-0.6, -0.2, 0.0, 0.1, 0.45])
def test_a_sheared_upright_figure_has_the_slant_of_the_shear(angle: float) -> None:
    ring = np.zeros((9, 7))
    ring[1:8, 1:6] = 1.0
    ring[3:6, 3] = 0.0  # symmetric, so upright
    measured = slant(sheared(ring, math.tan(angle))[None].astype(np.float32))[0]
    assert measured == pytest.approx(angle, abs=1e-6)


def test_a_real_digit_s_slant_moves_by_the_shear() -> None:
    image = open_dataset(Task()).train.x[7, 0].numpy().astype(np.float64)
    before = math.tan(slant(image[None].astype(np.float32))[0])
    after = math.tan(slant(sheared(image, 0.3)[None].astype(np.float32))[0])
    assert after - before == pytest.approx(0.3, abs=1e-5)


def test_leaning_to_the_right_is_positive_and_no_height_is_zero() -> None:
    right = np.eye(8, dtype=np.float32)[::-1].copy()  # a stroke from bottom left to top right
    row = np.zeros((8, 8), dtype=np.float32)
    row[3, 2:6] = 1
    measured = slant(np.stack([right, right[:, ::-1], row, np.zeros((8, 8), dtype=np.float32)]))
    assert measured == pytest.approx([math.pi / 4, -math.pi / 4, 0, 0], abs=1e-6)


def test_the_handwritten_digits_and_their_fixed_test_set() -> None:
    data = open_dataset(Task())
    assert data.train.x.shape == (1527, 1, 8, 8) and data.test.x.shape == (270, 1, 8, 8)
    assert data.train.x.dtype == torch.float32 and data.train.x.min() == 0 and data.train.x.max() == 1
    assert data.test.y["digit"].bincount().tolist() == [27] * 10
    assert data.train.y["digit"].dtype == torch.int64 and data.train.y["slant"].dtype == torch.float32
    # Equal images would sit on both sides of the fence.
    seen = {x.numpy().tobytes() for x in data.train.x}
    assert not any(x.numpy().tobytes() in seen for x in data.test.x)
    assert data.sha256 == data_sha256(data.train, data.test) == DIGITS_SHA256


def test_data_identity_is_over_names_shapes_and_bytes() -> None:
    data = open_dataset(Task()).test.take(torch.tensor([3, 1]))
    digest = hashlib.sha256()
    for part in ("train", "test"):
        for name, array in (("x", data.x), ("digit", data.y["digit"]), ("slant", data.y["slant"])):
            kind = str(array.dtype).removeprefix("torch.")
            digest.update(f"{part}/{name}:{kind}:{tuple(array.shape)};".encode() + array.numpy().tobytes())
    assert data_sha256(data, data) == digest.hexdigest()


def test_take_always_copies() -> None:
    data = open_dataset(Task()).test
    everything = data.take(torch.arange(len(data)))
    assert torch.equal(everything.x, data.x) and everything.x.data_ptr() != data.x.data_ptr()
    assert everything.y["digit"].data_ptr() != data.y["digit"].data_ptr()


def test_printed_digits_are_balanced_repeatable_and_on_the_same_scale() -> None:
    data, again, other = printed_digits(1205, 4), printed_digits(1205, 4), printed_digits(1205, 5)
    assert data_sha256(data, data) == data_sha256(again, again) != data_sha256(other, other)
    assert sorted(data.y["digit"].bincount().tolist()) == [120] * 5 + [121] * 5
    assert data.x.shape == (1205, 1, 8, 8) and data.x.dtype == torch.float32
    assert torch.equal((data.x * 16).round() / 16, data.x) and data.x.min() >= 0 and data.x.max() <= 1
    assert np.array_equal(data.y["slant"].numpy(), slant(data.x[:, 0].numpy()))


def test_printed_digits_are_a_data_set_of_their_own() -> None:
    data = open_dataset(Task(dataset="printed-digits", source_samples=300))
    assert (len(data.train), len(data.test)) == (300, 1000)
    assert data.targets == open_dataset(Task()).targets


def test_source_features_serve_handwriting_better_than_pixels() -> None:
    """A linear probe on 50 handwritten digits, ten times drawn: 0.81 of the test set on the source's features, 0.76 on
    pixels (measured; each mean is good to 0.01). The bound is that the source helps at all."""
    experiment = load({"task": {"pretrained": "source"}})
    task, model = open_task(experiment), open_task(experiment).new_model()
    model.load_state_dict({name: torch.from_numpy(a) for name, a in source_state(experiment).items()})
    train, test = task.dataset.train, task.dataset.test
    trunk = model.get_submodule("trunk")
    with torch.inference_mode():
        views = [(trunk(train.x).numpy(), trunk(test.x).numpy())]
    views.append((train.x.flatten(1).numpy(), test.x.flatten(1).numpy()))
    accuracy = np.zeros((10, 2))
    for number in range(10):
        chosen = np.random.Generator(np.random.Philox(number)).permutation(len(train))[:50]
        for view, (x, x_test) in enumerate(views):
            probe = LogisticRegression(max_iter=2000).fit(x[chosen], train.y["digit"].numpy()[chosen])
            accuracy[number, view] = probe.score(x_test, test.y["digit"].numpy())
    assert accuracy[:, 0].mean() > accuracy[:, 1].mean()
