"""Meadow's own small trunks, for tables, images, sensor windows and text.

A trunk maps prepared samples (n, *shape) to features (n, width); the character LSTM to features per token,
(n, length, width). Normalisation is GroupNorm (Wu and He 2018), so there are no running statistics to share or leak.
Pooling comes before ReLU: the maximum of ReLUs is the ReLU of the maximum, at a quarter of the cost.
"""

import math
from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.tasks.data import Inputs

FEATURE_NORM_SQUARED = 8.0


class BoundedFeatures(nn.Module):
    """Centre each sample's features (n, hidden) and scale them to squared length 8: layer normalisation (Ba et al.
    2016) without parameters, times sqrt(8 / hidden).

    This bounds the curvature of a head's loss by 2 (8 + 1) for any trunk: gradient descent on a value head is stable for
    lr < 2 / 18, and with momentum 0.9 for lr < 3.8 / 18. Without it a source model's features have squared length 300,
    and a value head diverges at lr = 0.05.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.shape[-1]
        return F.layer_norm(x, (hidden,)) * math.sqrt(FEATURE_NORM_SQUARED / hidden)


def _sequence(**layers: nn.Module) -> nn.Sequential:
    """The layers one after another, by name."""
    return nn.Sequential(OrderedDict(layers))


def mlp(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """Flatten, two hidden layers of `hidden` units with ReLU, `BoundedFeatures`."""
    if inputs.tokens:
        raise UserError(f'task.model = "{task.model}" cannot take tokens: use "bilstm", or "charlstm" for characters')
    hidden = task.hidden
    trunk = _sequence(
        flatten=nn.Flatten(),
        linear1=nn.Linear(math.prod(inputs.shape), hidden),
        relu1=nn.ReLU(),
        linear2=nn.Linear(hidden, hidden),
        relu2=nn.ReLU(),
        bounded=BoundedFeatures(),
    )
    return trunk, hidden


def cnn(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """Twice 3x3 convolution, GroupNorm, ReLU and 2x2 pooling, then a linear layer with ReLU, and `BoundedFeatures`.

    The convolutions have hidden // 2 (at least 1) and `hidden` channels. Pooling is not adaptive, because the gradient of
    adaptive pooling has no deterministic GPU kernel.
    """
    channels, height, width = _image(task, inputs, smallest=2)
    hidden = task.hidden
    narrow = max(1, hidden // 2)
    pooled = hidden * math.ceil(math.ceil(height / 2) / 2) * math.ceil(math.ceil(width / 2) / 2)
    trunk = _sequence(
        conv1=nn.Conv2d(channels, narrow, 3, padding=1),
        norm1=nn.GroupNorm(math.gcd(8, narrow), narrow),
        pool1=nn.MaxPool2d(2, ceil_mode=True),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(narrow, hidden, 3, padding=1),
        norm2=nn.GroupNorm(math.gcd(8, hidden), hidden),
        pool2=nn.MaxPool2d(2, ceil_mode=True),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        linear=nn.Linear(pooled, hidden),
        relu3=nn.ReLU(),
        bounded=BoundedFeatures(),
    )
    return trunk, hidden


def lenet(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """LeNet-5's layers (LeCun et al. 1998) with ReLU and max pooling: 61,706 parameters for 28x28x1 and 10 classes."""
    channels, height, width = _image(task, inputs, smallest=12)
    trunk = _sequence(
        conv1=nn.Conv2d(channels, 6, 5, padding=2),
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 16, 5),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        linear1=nn.Linear(16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2), 120),
        relu3=nn.ReLU(),
        linear2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
    )
    return trunk, 84


def mcmahan_cnn(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """The CNN of McMahan et al. 2017, section 3: two 5x5 convolutions (32 and 64 channels), each with 2x2 max pooling,
    and a layer of 512 units with ReLU. 1,663,370 parameters for 28x28x1 and 10 classes."""
    channels, height, width = _image(task, inputs, smallest=4)
    trunk = _sequence(
        conv1=nn.Conv2d(channels, 32, 5, padding=2),
        pool1=nn.MaxPool2d(2),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, 5, padding=2),
        pool2=nn.MaxPool2d(2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        linear=nn.Linear(64 * (height // 4) * (width // 4), 512),
        relu3=nn.ReLU(),
    )
    return trunk, 512


def cnn1d(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """For sensor windows (n, channels, steps): three 1-D convolutions (9, 5 and 3 wide) with GroupNorm and ReLU, the first
    two with pooling, then the mean and the maximum over time: 2 x hidden features."""
    if len(inputs.shape) != 2 or inputs.shape[1] < 4 or inputs.tokens:
        raise UserError(
            f'task.model = "cnn1d" needs windows (channels, steps) of at least 4 steps, not {_form(inputs)}: '
            'use "cnn" for images, "bilstm" for text, "mlp" for tables'
        )
    hidden, groups = task.hidden, math.gcd(8, task.hidden)
    layers: dict[str, nn.Module] = {}
    before = inputs.shape[0]
    for number, width in enumerate((9, 5, 3), start=1):
        layers[f"conv{number}"] = nn.Conv1d(before, hidden, width, padding=width // 2)
        layers[f"norm{number}"] = nn.GroupNorm(groups, hidden)
        if number < 3:
            layers[f"pool{number}"] = HalfOfTime()
        layers[f"relu{number}"] = nn.ReLU()
        before = hidden
    layers["over_time"] = MeanAndMaximum()
    return _sequence(**layers), 2 * hidden


class HalfOfTime(nn.Module):
    """(n, channels, steps) -> (n, channels, steps // 2): the maximum of every two steps, as `nn.MaxPool1d(2)`, but
    three times as fast, because channels are the innermost dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x.unsqueeze(2).contiguous(memory_format=torch.channels_last), (1, 2)).squeeze(2)


class MeanAndMaximum(nn.Module):
    """(n, channels, steps) -> (n, 2 channels): the mean and the maximum over time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(-1), x.amax(-1)], 1)


EMBEDDING = 64


class BiLSTM(nn.Module):
    """Tokens int64 (n, length), padded with 0 at the end -> the maximum over time of both directions' states,
    (n, 2 hidden). Padding has no effect. A text without tokens counts as one padding token."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, EMBEDDING, padding_idx=0)
        self.lstm = nn.LSTM(EMBEDDING, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x != 0).sum(1).clamp(min=1)
        x = x[:, : int(lengths.max())]
        states = self._both_ways(x, lengths) if type(self.lstm) is nn.LSTM else self._packed(x, lengths)
        beyond = torch.arange(x.shape[1], device=x.device)[None, :, None] >= lengths[:, None, None]
        return states.masked_fill(beyond, -math.inf).amax(1)

    def _both_ways(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The states of a padded batch: each direction separately, the second over the reversed texts, so that padding
        comes last and does not affect them. oneDNN's LSTM runs such a batch at once; torch runs packed ones stepwise."""
        step = torch.arange(x.shape[1], device=x.device)
        back = lengths[:, None] - 1 - step
        turned = torch.where(back >= 0, back, step)
        own, embedded = self.lstm, self.embedding(x)
        none = embedded.new_zeros(1, len(x), own.hidden_size)

        def run(inputs: Tensor, suffix: str) -> Tensor:
            weights = [getattr(own, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            return torch.lstm(inputs, (none, none), weights, True, 1, 0.0, self.training, False, True)[0]

        ahead = run(embedded, "")
        behind = run(embedded.gather(1, turned[:, :, None].expand_as(embedded)), "_reverse")
        return torch.cat([ahead, behind.gather(1, turned[:, :, None].expand_as(behind))], -1)

    def _packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The same with a module that replaces the LSTM, as Opacus's does."""
        packed = pack_padded_sequence(self.embedding(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states: Tensor = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
        return states


def bilstm(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """`BiLSTM` with 64-dimensional embeddings: 2 x hidden features."""
    return BiLSTM(_tokens(task, inputs), task.hidden), 2 * task.hidden


class CharacterLSTM(nn.Module):
    """Tokens int64 (n, length) -> the states of a two-layer LSTM at each token, (n, length, hidden)."""

    def __init__(self, tokens: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 8)
        self.lstm = nn.LSTM(8, hidden, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.lstm(self.embedding(x))[0])


def charlstm(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """`CharacterLSTM`, as in McMahan et al. 2017: 8-dimensional embeddings, two layers (theirs have 256 units)."""
    return CharacterLSTM(_tokens(task, inputs), task.hidden), task.hidden


def _image(task: Task, inputs: Inputs, smallest: int) -> tuple[int, int, int]:
    if len(inputs.shape) != 3 or min(inputs.shape[1:]) < smallest or inputs.tokens:
        raise UserError(
            f'task.model = "{task.model}" needs images (channels, height, width) of at least {smallest} pixels a side, not '
            f'{_form(inputs)}: use "mlp", or set task.image_size'
        )
    channels, height, width = inputs.shape
    return channels, height, width


def _tokens(task: Task, inputs: Inputs) -> int:
    if not inputs.tokens:
        raise UserError(
            f'task.model = "{task.model}" needs tokens, not {_form(inputs)}: use it with text or characters, '
            'or "mlp" for tables and "cnn" for images'
        )
    return inputs.tokens


def _form(inputs: Inputs) -> str:
    return f"texts of {inputs.shape[0]} tokens" if inputs.tokens else f"samples of shape {inputs.shape}"
