"""Which clipped sum serves a model: what shows the gradients of its single samples."""

from typing import Literal

from torch import nn

from meadow.privacy.dpsgd.book import BookSum, covers
from meadow.privacy.dpsgd.hooks import HooksSum
from meadow.privacy.dpsgd.loop import LoopSum
from meadow.privacy.dpsgd.mechanism import ClippedSum
from meadow.runtime.errors import UserError

GradSample = Literal["auto", "book", "hooks", "loop"]
Mode = Literal["book", "hooks", "loop"]

SUMS: dict[Mode, type[ClippedSum]] = {"book": BookSum, "hooks": HooksSum, "loop": LoopSum}


def chosen_mode(model: nn.Module, mode: GradSample = "auto") -> Mode:
    """How per-example gradients are clipped and summed: "book", one pass with our own book-keeping, the fastest by far;
    "hooks", Opacus, every sample's gradient; "loop", a pass for each sample, slow and right for any model.

    "auto": book-keeping where it covers all that learns. Else the loop if a module that has modules in it learns itself, as
    in attention and vision transformers: nothing shows what one sample did there. Else hooks. Raises UserError for book
    where it cannot be.
    """
    if mode in ("hooks", "loop"):
        return mode
    if covers(model):
        return "book"
    if mode == "book":
        raise UserError(
            'privacy.grad_sample = "book": something that learns is no parameter of a linear layer, a convolution, an '
            'embedding, a group or a layer normalisation, or is shared between two: write privacy.grad_sample = "auto"'
        )
    return "loop" if any(_learns_itself(m) and any(True for _ in m.children()) for m in model.modules()) else "hooks"


def _learns_itself(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
