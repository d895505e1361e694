"""Measure and reduce the distance between the features of two domains: MMD, CORAL, a domain classifier."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mmd(source: Tensor, target: Tensor, widths: Sequence[float]) -> Tensor:
    """The squared maximum mean discrepancy of features (n, d) and (m, d), biased (Gretton et al. 2012, equation 5): a
    scalar >= 0, and 0 for equal samples.

    The kernel is the mean over w in `widths` of exp(-|a - b|^2 / (w M)). M is the median squared distance between
    different rows of both together (the median heuristic); no gradient flows through it.
    """
    both = torch.cat([source, target])
    distances = (both[:, None] - both[None, :]).pow(2).sum(-1)
    upper = torch.triu_indices(len(both), len(both), offset=1, device=both.device)
    median = distances.detach()[upper[0], upper[1]].median().clamp(min=1e-12)
    kernel = torch.stack([torch.exp(-distances / (w * median)) for w in widths]).mean(0)
    n = len(source)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def deep_coral(source: Tensor, target: Tensor) -> Tensor:
    """|C_S - C_T|^2 / (4 d^2) of the unbiased covariances of features (n, d), (m, d) (Sun and Saenko 2016, equation 1)."""
    d = source.shape[1]
    apart = _covariance(source) - _covariance(target)
    return apart.pow(2).sum() / (4 * d * d)


def coral(source: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Whiten the source samples (n, d) and colour them with the target's covariance (Sun et al. 2016, algorithm 1):
    X (C_S + ridge)^(-1/2) (C_T + ridge)^(1/2), computed in float64. The data are not centred."""
    eye = ridge * torch.eye(source.shape[1], dtype=torch.float64, device=source.device)
    whiten = _power(_covariance(source.double()) + eye, -0.5)
    colour = _power(_covariance(target.double()) + eye, 0.5)
    return (source.double() @ whiten @ colour).to(source.dtype)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / max(1, len(x) - 1)


def _power(matrix: Tensor, power: float) -> Tensor:
    """A power of a symmetric positive semidefinite matrix; eigenvalues of 0 stay 0."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.max() * 1e-12
    powers = torch.where(values > floor, values.clamp(min=floor) ** power, 0.0)
    result: Tensor = (vectors * powers) @ vectors.T
    return result


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None  # type: ignore[attr-defined]


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """The identity; its gradient is multiplied by -strength (Ganin and Lempitsky 2015, section 3.1)."""
    result: Tensor = _Reverse.apply(x, strength)  # type: ignore[no-untyped-call]
    return result


def domain_classifier(features: int, hidden: int) -> nn.Module:
    """Features (n, features) -> the logit that a sample is of the target domain, (n, 1): one hidden layer with ReLU."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def reversal_strength(progress: float, gamma: float) -> float:
    """2 / (1 + exp(-gamma p)) - 1, p the finished share of the run (Ganin and Lempitsky 2015, section 4)."""
    return 2 / (1 + math.exp(-gamma * progress)) - 1
