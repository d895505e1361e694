"""How the same arithmetic is done faster on a CPU: where images lie in memory, and whose kernels multiply large matrices.

Both change the last bits of a result, so they are a function of the model and of the processor alone, and every engine, the
server and the clients have them alike.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LARGE = 2**18
"""Weights of a linear layer from which on its products are oneDNN's: below, handing them over costs as much as it saves."""


def laid_out(model: nn.Module) -> nn.Module:
    """The model with the weights of 2-D convolutions by pixels, not by channels (`channels_last`), in which oneDNN's
    convolutions and torch's pooling are vectorised; activations follow them.

    A model with a GroupNorm stays as it is: torch 2.13 ends the process with a segmentation fault where a GroupNorm learns
    behind frozen layers, on activations that lie by pixels (`native_group_norm_backward` without the input's gradient).
    """
    modules = list(model.modules())
    if any(isinstance(m, nn.Conv2d) for m in modules) and not any(isinstance(m, nn.GroupNorm) for m in modules):
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return model


def placed(model: nn.Module, device: str, exact: bool) -> nn.Module:
    """The model on the device where it is to train and be evaluated.

    On a GPU with `exact` torch takes kernels whose results are the same each time, and raises RuntimeError where it has
    none (`torch.use_deterministic_algorithms`): the same bits on the same GPU, not those of a CPU.
    """
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without
        torch.use_deterministic_algorithms(exact)
    return model.to(device)


@contextmanager
def kernels(model: nn.Module) -> Iterator[None]:
    """Inside the block, oneDNN computes the float32 products of a model on the CPU that has a large linear layer, where it
    computes them in float32.

    torch lets it by "medium" precision, which lets it round to bfloat16 too: it does on processors with bfloat16 matrix
    units (`keeps_float32`), and there nothing is changed.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    large = any(weight.numel() >= LARGE and weight.device.type == "cpu" for weight in weights)
    if not large or not keeps_float32():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.lru_cache(maxsize=1)
def keeps_float32() -> bool:
    """Whether "medium" precision gives float32 products on this processor. A product of random matrices tells: bfloat16 has
    8 bits, and errs by 1e-3 where float32 errs by 1e-7."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, 512, generator=draw), torch.rand(512, 512, generator=draw))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return bool(((found - exact).abs() / exact).max() < 1e-5)
