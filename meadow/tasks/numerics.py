"""Faster CPU arithmetic: the memory layout of images, and the library that multiplies large matrices.

Both change a result's last bits, so they depend only on the model and the processor: engines, server and clients agree.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

LARGE = 2**18
"""Linear layers with at least this many weights go to oneDNN; smaller ones do not repay the overhead."""


def channels_last(model: nn.Module) -> nn.Module:
    """The model with 2-D convolutions in `channels_last` layout, in which oneDNN's convolutions and torch's pooling are
    vectorised; activations follow.

    A model with a GroupNorm is unchanged: torch 2.13 crashes (segmentation fault) where a GroupNorm trains after frozen
    layers on such activations (`native_group_norm_backward` without the input's gradient).
    """
    modules = list(model.modules())
    if any(isinstance(m, nn.Conv2d) for m in modules) and not any(isinstance(m, nn.GroupNorm) for m in modules):
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return model


def placed(model: nn.Module, device: str, exact: bool) -> nn.Module:
    """The model on the device for training and evaluation.

    On a GPU with `exact` torch uses deterministic kernels, and raises RuntimeError for an operation that has none
    (`torch.use_deterministic_algorithms`): the same bits each time on the same GPU, but not those of a CPU.
    """
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for a deterministic cuBLAS
        torch.use_deterministic_algorithms(exact)
    return model.to(device)


@contextmanager
def kernels(model: nn.Module) -> Iterator[None]:
    """Inside the block, oneDNN computes the float32 products of a CPU model that has a large linear layer.

    torch enables this by "medium" precision, which also permits bfloat16. Processors with bfloat16 matrix units make use
    of that (`keeps_float32`); on these nothing is changed.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    large = any(weight.numel() >= LARGE and weight.device.type == "cpu" for weight in weights)
    if not large or not keeps_float32():
        yield
        return
    with _medium_precision():
        yield


@contextmanager
def _medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.lru_cache(maxsize=1)
def keeps_float32() -> bool:
    """Whether "medium" precision gives float32 products on this processor, measured on random matrices: the relative
    error of bfloat16 (8 bits) is about 1e-3, that of float32 1e-7."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, 512, generator=draw), torch.rand(512, 512, generator=draw))
    with _medium_precision():
        found = a @ b
    exact = a.double() @ b.double()
    return bool(((found - exact).abs() / exact).max() < 1e-5)
