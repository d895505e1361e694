"""Choose how a model's per-example gradients are clipped and summed."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from meadow.privacy.dpsgd.book import BookSum, covers
from meadow.privacy.dpsgd.hooks import HooksSum
from meadow.privacy.dpsgd.mechanism import ClippedSum, Sums
from meadow.runtime.errors import UserError


class LoopSum(ClippedSum):
    """The clipped sum by one pass per example, whose gradient autograd gives: slow, and correct for any model."""

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


GradSample = Literal["auto", "book", "hooks", "loop"]
Mode = Literal["book", "hooks", "loop"]

SUMS: dict[Mode, type[ClippedSum]] = {"book": BookSum, "hooks": HooksSum, "loop": LoopSum}


def chosen_mode(model: nn.Module, mode: GradSample = "auto") -> Mode:
    """The way to clip and sum per-example gradients: "book", one pass with our book-keeping, by far the fastest; "hooks",
    Opacus; "loop", one pass per example, slow and correct for any model.

    "auto": "book" if it covers every parameter that learns. Else "loop" if a module with submodules has learning parameters
    of its own, as in attention and vision transformers, where Opacus cannot separate examples. Else "hooks". Raises
    UserError if "book" is set and does not cover the model.
    """
    if mode in ("hooks", "loop"):
        return mode
    if covers(model):
        return "book"
    if mode == "book":
        raise UserError(
            'privacy.grad_sample = "book": it covers linear layers, convolutions, embeddings, group and layer '
            "normalisations without shared parameters, and something else learns in this model: write "
            'privacy.grad_sample = "auto"'
        )
    return "loop" if any(_learns_itself(m) and any(True for _ in m.children()) for m in model.modules()) else "hooks"


def _learns_itself(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
