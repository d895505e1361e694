"""What several algorithms give the training loop: corrections of gradients, and a look at the batch in hand."""

from collections.abc import Mapping

import torch
from meadow.strategies.protocol import Batch, Correction, Term, Turn
from torch import Tensor, nn

from meadow.arrays.named import Arrays


def tensors(arrays: Arrays, like: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The arrays that have a parameter of the same name, as tensors where that parameter is."""
    return {n: torch.from_numpy(arrays[n]).to(p.device) for n, p in like.items() if n in arrays}


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient, zero where the batch gave it none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def pull(turn: Turn, towards: Arrays, strength: float) -> Correction:
    """The gradient of strength/2 |w - v|^2, v being `towards`, for the names that it has."""
    anchors = tensors(towards, dict(turn.model.named_parameters()))

    def correct(learning: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in learning.items():
            if name in anchors:
                gradient_of(parameter).add_(parameter.detach() - anchors[name], alpha=strength)

    return correct


def watch(batches: list[Batch]) -> Term:
    """A term that adds nothing: it leaves the batch in hand in `batches`, for a correction that needs it."""

    def see(model: nn.Module, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        batches[:] = [batch]
        return torch.zeros((), device=batch.x.device)

    return see
