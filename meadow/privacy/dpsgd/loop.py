"""The clipped sum by one pass per example: slow, and correct for any model."""

import math

import torch
from torch import Tensor

from meadow.privacy.dpsgd.mechanism import ClippedSum, Sums


class LoopSum(ClippedSum):
    """Takes one example at a time, so autograd's gradient is the example's."""

    at_once = 1

    def add(self, values: Tensor, into: Sums) -> Tensor | None:
        if not values.requires_grad:
            return None
        values.sum().backward()  # type: ignore[no-untyped-call]
        own = {name: p.grad for name, p in self.learning.items() if p.grad is not None}
        norms = torch.stack([gradient.norm() for gradient in own.values()]).norm().reshape(1)
        if math.isfinite(norms):
            weight = self.weights(norms)
            for name, gradient in own.items():
                into()[name].addcmul_(gradient, weight)
        return None

    def forget(self) -> None:
        for parameter in self.learning.values():
            parameter.grad = None
