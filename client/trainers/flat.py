"""The common part of the CPU kernels: keep all parameters of a network in one vector, train clients in turn, and add up.

`client/trainers/direct.py` and `client/trainers/fused.py` train the single client.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.client.trainers.kernel import Member, Result, Sums
from meadow.client.trainers.network import Network
from meadow.native.sums import add_up, models_at_once

LANES = 16
"""Arrays are aligned to this many float32 (64 bytes), as torch's are: torch's operations choose their path by alignment, and
a SIMD vector across two cache lines takes two loads."""


class FlatKernel(ABC):
    """A `meadow.client.trainers.kernel.Kernel` that trains one client after another, each in a vector of its own.

    strides: of arrays that are not contiguous in the vector, in numbers of float32.
    """

    blocks_at_once = 1

    def __init__(self, network: Network, strides: Mapping[str, tuple[int, ...]]) -> None:
        self.network = network
        usual = {name: torch.empty(shape, device="meta").stride() for name, shape in network.shapes.items()}
        self._strides = usual | dict(strides)
        self._begins: dict[str, int] = {}
        size = 0
        for name, shape in network.shapes.items():
            self._begins[name] = size
            size += padded(1 + sum((n - 1) * by for n, by in zip(shape, self._strides[name], strict=True)))
        self._start, self._received = torch.zeros(size), Arrays()
        self._start_views = self._views(self._start)
        self._works = list[tuple[Tensor, dict[str, Tensor]]]()

    @abstractmethod
    def _begin(self, members: Sequence[Member], rates: Mapping[str, float]) -> None:
        """Prepare to train these clients at these rates from the parameters in `_start`."""

    @abstractmethod
    def _train_one(self, member: Member, work: Tensor, parameters: dict[str, Tensor]) -> list[float]:
        """Train a client from `_start` into `work`, of which `parameters` are views. Returns each target's loss, summed
        over the samples seen."""

    def train(
        self,
        start: Arrays,
        blocks: Sequence[Sequence[Member]],
        rates: Mapping[str, float],
        weights: Sequence[Sequence[Mapping[str, float]]] | None = None,
    ) -> Result:
        if start is not self._received:  # the blocks of a node start from the same arrays
            for name, view in self._start_views.items():
                view.copy_(torch.from_numpy(start[name]))
            self._received = start
        self._begin([member for block in blocks for member in block], rates)
        losses, arrays, totals = list[list[float]](), list[Arrays](), list[Sums | None]()
        for number, block in enumerate(blocks):
            if weights is None:
                for member in block:
                    losses.append(self._train_one(member, *self._work(0)))
                    arrays.append({name: view.numpy().copy() for name, view in self._works[0][1].items()})
                continue
            total, finite = np.empty(len(self._start)), True
            at_once = models_at_once(len(self._start))
            for begin in range(0, len(block), at_once):
                some = block[begin : begin + at_once]
                losses += [self._train_one(member, *self._work(place)) for place, member in enumerate(some)]
                works = [work.numpy() for work, _ in self._works[: len(some)]]
                theirs = weights[number][begin : begin + at_once]
                finite &= add_up(total, works, theirs, self._begins, first=begin == 0)
            views = self._views(torch.from_numpy(total))
            totals.append({n: np.ascontiguousarray(v.numpy()) for n, v in views.items()} if finite else None)
        return Result(losses, arrays, totals)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat.as_strided(self.network.shapes[name], self._strides[name], begin)
            for name, begin in self._begins.items()
        }

    def _work(self, place: int) -> tuple[Tensor, dict[str, Tensor]]:
        while len(self._works) <= place:
            work = torch.zeros_like(self._start)
            self._works.append((work, self._views(work)))
        return self._works[place]


def padded(count: int) -> int:
    """The next multiple of LANES."""
    return -(-count // LANES) * LANES
