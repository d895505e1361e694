"""Parts shared by several algorithms: corrections of gradients, and access to the current batch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.strategies.protocol import Batch, ClientContext, Correction, Term


def tensors(arrays: Arrays, like: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The arrays that have a namesake in `like`, as tensors on its device."""
    return {n: torch.from_numpy(arrays[n]).to(p.device) for n, p in like.items() if n in arrays}


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; zeros if the batch gave none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def pull(context: ClientContext, towards: Arrays, strength: float) -> Correction:
    """Add the gradient of strength/2 |w - v|^2 for the names in `towards`, which is v."""
    anchors = tensors(towards, dict(context.model.named_parameters()))

    def correct(learning: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in learning.items():
            if name in anchors:
                gradient_of(parameter).add_(parameter.detach() - anchors[name], alpha=strength)

    return correct


class Shift:
    """Adds fixed arrays to the gradients with their names; `moved` collects these names."""

    def __init__(self, context: ClientContext, by: Arrays) -> None:
        self._by = tensors(by, dict(context.model.named_parameters()))
        self.moved: set[str] = set()

    def __call__(self, learning: Mapping[str, nn.Parameter]) -> None:
        for name in learning.keys() & self._by.keys():
            gradient_of(learning[name]).add_(self._by[name])
            self.moved.add(name)


def watch(batches: list[Batch]) -> Term:
    """A term that adds nothing to the loss, but puts the current batch into `batches` for a correction."""

    def see(model: nn.Module, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        batches[:] = [batch]
        return torch.zeros((), device=batch.x.device)

    return see
