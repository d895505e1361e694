"""Another processor's arithmetic, emulated: every product and sum is added up in another order, and functions are off by an
ulp. With it the tests show whether their bounds follow from the arithmetic or were found on one machine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The numbers in the memory layout of another tensor: torch chooses its kernels by that."""
    return torch.empty_like(like).copy_(value)


def _reversed(*axes: tuple[int, int]) -> Callable[..., list[Any]]:
    """The operands, each (position, axis) of them turned round: the same sum from its other end."""

    def turned(args: tuple[Any, ...]) -> list[Any]:
        found = list(args)
        for position, axis in axes:
            found[position] = _laid_out(found[position].flip(axis), found[position])
        return found

    return turned


TURNED = {
    "mm": _reversed((0, 1), (1, 0)),
    "addmm": _reversed((1, 1), (2, 0)),
    "bmm": _reversed((0, 2), (1, 1)),
    "baddbmm": _reversed((1, 2), (2, 1)),
    "convolution": _reversed((0, 1), (1, 1)),
}
"""Products, by what is summed over: of a convolution its input's channels, where it has no groups and is not transposed."""
MOVED = {
    "exp", "log", "tanh", "sigmoid", "erf", "sqrt", "rsqrt", "pow", "gelu", "gelu_backward", "log_sigmoid_forward",
    "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm",
    "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward", "native_batch_norm",
    "native_batch_norm_backward", "convolution_backward", "sum", "mean", "linalg_vector_norm", "norm", "softplus",
    "logsumexp", "var", "std", "binary_cross_entropy_with_logits", "mse_loss", *TURNED,
}  # fmt: skip
"""Whose results differ in the last bit from one kernel to another."""


def beside(value: Any) -> Any:
    """Each float32 number moved up or down by an ulp or left, by its own bits: the same number always in the same way."""
    if isinstance(value, tuple | list):
        return type(value)(beside(part) for part in value)
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.numel():
        return value
    hashed = (value.contiguous().view(torch.int32).long() * 2654435761 >> 9) % 3 - 1
    moved = torch.nextafter(value, torch.where(hashed > 0, torch.inf, -torch.inf).to(value.dtype))
    return _laid_out(torch.where((hashed == 0) | (value == 0) | ~value.isfinite(), value, moved), value)


class _Other(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name, more = func.overloadpacket.__name__, kwargs or {}
        if name not in MOVED:
            return func(*args, **more)
        operands: Any = args
        if name in TURNED and not (name == "convolution" and (args[6] or args[8] != 1)):
            operands = TURNED[name](args)
        result = func(*operands, **more)
        if "out" in more:
            more["out"].copy_(beside(more["out"]))
            return result
        return beside(result)


@contextmanager
def other_kernels() -> Iterator[None]:
    """Inside the block, this thread's torch rounds as another processor might."""
    with _Other():  # type: ignore[no-untyped-call]
        yield
