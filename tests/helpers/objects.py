"""A model and a data set as a user would name them: `module:object`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meadow.config.schema import Task
from meadow.tasks.data import Part, Raw


class Rows(torch.nn.Module):
    """An LSTM over the rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x.reshape(len(x), -1, 8))[0]
        return states[:, -1]


def rows(task: Any, inputs: Any) -> tuple[torch.nn.Module, int]:
    """A user's trunk, for task.model = "helpers.objects:rows"."""
    return Rows(), 4


def everything(task: Task) -> Raw:
    """A data set with a target of every kind, each a function of the samples, two thirds of the labels missing."""
    random = np.random.default_rng(0)
    x = random.normal(size=(900, 6)).astype(np.float32)
    gone = random.random(900) < 2 / 3
    total = x.sum(1).astype(np.float64)
    columns = {
        "side": np.where(gone, "", np.where(total > 0.5, "right", "left")),
        "signs": np.where(gone[:, None], np.nan, x[:, :3] > 0),
        "total": np.where(gone, np.nan, 40 * total + 100),
        "stay": np.where(gone, np.nan, 40 * total + 100),
    }
    return Raw("everything", Part(torch.from_numpy(x), columns), None)


def tokens(task: Task) -> Raw:
    """Forty texts of six tokens, of two digits."""
    part = Part(torch.ones(40, 6, dtype=torch.int64), {"digit": np.arange(40) % 2})
    return Raw("tokens", part, part, tokens=2)


def texts(task: Task) -> Raw:
    """Sixty texts of one to six tokens, padded with 0, of two digits."""
    draw = np.random.default_rng(0)
    words, lengths = draw.integers(1, 9, (60, 6)), draw.integers(1, 7, (60, 1))
    words = np.where(np.arange(6) < lengths, words, 0)
    part = Part(torch.from_numpy(words), {"digit": words[:, 0] % 2})
    return Raw("texts", part, part, tokens=9)


def characters(task: Task) -> Raw:
    """The same, with a digit at every token: the next one's, none where there is none."""
    words = texts(task).train.x.numpy()
    after = np.concatenate([words[:, 1:], np.zeros((len(words), 1), np.int64)], 1)
    part = Part(torch.from_numpy(words), {"digit": np.where(after > 0, after, -1)})
    return Raw("characters", part, part, {"digit": "class 9"}, 9)


def owners(task: Task) -> Raw:
    """Small images of two digits: 40 of client a, 4 of b, 36 of c, mixed; and as many for the test."""
    owner = np.array(["a"] * 40 + ["b"] * 4 + ["c"] * 36)[np.random.default_rng(0).permutation(80)]
    x, y = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {"digit": np.arange(80) % 2}
    return Raw("owners", Part(x, y, owner), Part(x, y), images=True)
