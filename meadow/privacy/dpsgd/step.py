"""Example-level DP-SGD (Abadi et al. 2016, algorithm 1): gives the training loop Poisson samples and private gradients.

    with Privatiser(model, mechanism, sampling, noise) as private:
        for _ in range(mechanism.steps):
            index = private.sample(n)
            private.gradients(index, losses)     # p.grad = (sum of clipped gradients + noise) / denominator
            ...                                  # proximal terms, control variates: change p.grad here
            optimizer.step()

Formal guarantee
----------------
Let an example's loss depend on no other example. Then the clipped sums of two data sets that differ by one added example are
at most `ClippedSum.sensitivity("add-remove")` = `clip` apart. The Gaussian noise on a sum has a standard deviation of
`noise_multiplier` times that, and each example is in a step's sample independently with probability `sample_rate`. So the
`steps` steps compose as many Poisson-sampled Gaussian mechanisms, and `meadow.privacy.accounting.epsilon` of
[(sample_rate, noise_multiplier, steps)] holds against anyone who sees every noisy gradient, but neither the samples drawn
nor the noise. Both streams must therefore be secret: amplification by sampling holds only against those who do not know
who was drawn. Floating-point numbers are treated as real numbers.

The code checks what the guarantee needs: no module computes statistics over a batch, no buffer changes, no sample's loss
depends on another sample's inputs (`book`), the first sample's gradient is autograd's (`hooks`), and no more steps are taken
than were charged (`Permit`).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from meadow.privacy.dpsgd.book import modules_of
from meadow.privacy.dpsgd.choose import SUMS, GradSample, chosen_mode
from meadow.privacy.dpsgd.mechanism import Mechanism, gaussian, poisson
from meadow.privacy.noise import Stream
from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import cached

Losses = Callable[[Tensor], Tensor]
"""Indices, int64 (k,) -> losses, float (k,). Each loss may depend only on its own sample."""

VALUES_AT_ONCE = 2**26
"""Scalars of per-example gradients kept at once; a larger batch is processed in pieces."""


def refuse_what_mixes_samples(model: nn.Module) -> None:
    """Raise UserError if a module computes or keeps statistics over the batch.

    These are batch normalisations, frozen or not, unless in `eval()` with stored statistics (a sample's output depends on
    the others, and running statistics are released), and instance normalisations that track statistics.
    """
    for name, module in cached(model, "normalising", lambda: _normalising(model)).items():
        tracks = bool(getattr(module, "track_running_stats", True))
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not tracks)
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and tracks
        if batch or instance:
            raise UserError(
                f'task.model: "{name}" ({type(module).__name__}) mixes the samples of a batch, so that clipping bounds '
                'nothing, and its statistics would leave unprotected: write task.norm = "group", or freeze it in eval mode'
            )


@dataclass
class Privatiser:
    """A context manager that makes samples and private gradients, for one round of one client.

    Inside it the model has hooks, no activation works in place and, with Opacus, recurrent layers are replaced by Opacus's,
    which have the same parameters; the exit restores the model. Set `requires_grad` and the modes of modules before, and
    do not change them inside.

    Consumes `sampling` and `noise` step by step. Raises UserError on entry for a model that mixes samples, and on exit if
    a buffer changed, because a buffer that depends on the data would leave unprotected.
    """

    model: nn.Module
    mechanism: Mechanism
    sampling: Stream
    noise: Stream
    grad_sample: GradSample = "auto"
    values_at_once: int = VALUES_AT_ONCE
    _opened: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Self:
        refuse_what_mixes_samples(self.model)
        parameters = cached(self.model, "parameters", lambda: dict(self.model.named_parameters()))
        self._learning = {name: p for name, p in parameters.items() if p.requires_grad}
        if not self._learning:
            raise UserError("local.trainable: no parameter of the model learns, so there is nothing to make private")
        self._buffers = {name: buffer.clone() for name, buffer in _buffers(self.model).items()}
        learning, wanted = frozenset(self._learning), self.grad_sample
        mode = cached(self.model, ("private mode", learning, wanted), lambda: chosen_mode(self.model, wanted))
        # Allocated once: new memory in every step would cost more than the noise.
        self._drawing, self._shares = cached(self.model, ("shares", learning), lambda: _shares(self._learning))
        with self._opened as opened:
            self._disable_in_place(opened)
            self._sum = SUMS[mode](self.model, self._learning, self.mechanism)
            opened.callback(self._sum.close)
            self._opened = opened.pop_all()
        most = self.values_at_once // max(1, self._sum.numbers_per_sample)
        self._piece = self._sum.at_once or max(1, min(4096, most))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()
        if kind is None:
            for name, buffer in _buffers(self.model).items():
                if not torch.equal(buffer, self._buffers[name]):
                    raise UserError(
                        f'task.model: the buffer "{name}" changed in private training, so it holds statistics of private '
                        'data: write task.norm = "group", or freeze its module'
                    )

    def sample(self, n: int) -> Tensor:
        """The next step's Poisson sample of n samples: ascending indices, int64; may be empty."""
        return poisson(n, self.mechanism.sample_rate, self.sampling)

    def gradients(self, index: Tensor, losses: Losses) -> None:
        """Set every learning parameter's `grad` to (sum of the samples' clipped gradients + noise) / denominator.

        An empty index gives noise alone; a gradient that is not finite counts as zero. A parameter on which the loss does
        not depend gets noise too. Calls `losses` with pieces of the index, and again with the rest of a piece if a gradient
        in it is not finite. Raises TypeError unless it returns one loss per sample, and UserError if a parameter is used
        outside its own module, so that a part of its gradient is missing.
        """
        self._drawn = False
        first = int(self._sum.begins_alone)
        for begin, end in pairwise([*range(first), *range(first, len(index), self._piece), len(index)]):
            if begin < end:
                self._add(index if end - begin == len(index) else index[begin:end], losses)
        for name, share in self._noisy().items():
            self._learning[name].grad = share

    def _noisy(self) -> dict[str, Tensor]:
        """The tensors that become the gradients, filled with this step's noise; drawn late, so it is still in the cache."""
        plan = self.mechanism
        deviation = plan.noise_multiplier * self._sum.sensitivity("add-remove") / plan.denominator
        for flat in () if self._drawn else self._drawing:
            if deviation > 0:
                gaussian(flat, deviation, self.noise)
            else:
                flat.zero_()
        self._drawn = True
        return self._shares

    def _add(self, piece: Tensor, losses: Losses) -> None:
        self._sum.forget()
        values = losses(piece)
        if values.shape != (len(piece),):
            raise TypeError(
                f"losses gave shape {tuple(values.shape)} for {len(piece)} samples: one loss each is needed"
            )
        again = self._sum.add(values, self._noisy)
        if again is not None and again.any():
            self._add(piece[again.to(piece.device)], losses)
        self._sum.forget()

    def _disable_in_place(self, opened: ExitStack) -> None:
        modules = modules_of(self.model).values()
        for module in cached(self.model, "may work in place", lambda: [m for m in modules if hasattr(m, "inplace")]):
            if getattr(module, "inplace", None) is True:
                module.inplace = False  # type: ignore[assignment]
                opened.callback(setattr, module, "inplace", True)


@dataclass
class Permit:
    """The right to take the private steps that were charged for one release.

    Several models or phases of training may share a permit; together they take at most its steps.
    """

    mechanism: Mechanism
    sampling: Stream
    noise: Stream
    grad_sample: GradSample = "auto"
    _taken: int = 0

    def on(self, model: nn.Module) -> Privatiser:
        """The context manager that makes private gradients of this model."""
        return Privatiser(model, self.mechanism, self.sampling, self.noise, self.grad_sample)

    def sample(self, n: int) -> Tensor:
        """The next step's Poisson sample of n samples. Raises UserError if no charged step is left."""
        if self._taken >= self.mechanism.steps:
            raise UserError(
                f'privacy.unit = "example": training needs more than the {self.mechanism.steps} steps a round that are '
                "charged; use a strategy that trains body and head together, once a round"
            )
        self._taken += 1
        return poisson(n, self.mechanism.sample_rate, self.sampling)


def _shares(learning: dict[str, nn.Parameter]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Allocate tensors for the gradients. Returns flat tensors, each filled in one draw, and views of them by name; there is
    one flat tensor if all parameters have the same dtype and device."""
    kinds = {(p.dtype, p.device) for p in learning.values()}
    whole = [list(learning.values())] if len(kinds) == 1 else [[p] for p in learning.values()]
    pieces = [torch.empty(sum(p.numel() for p in some), dtype=some[0].dtype, device=some[0].device) for some in whole]
    shares = [
        part.view(p.shape)
        for piece, some in zip(pieces, whole, strict=True)
        for p, part in zip(some, torch.split(piece, [p.numel() for p in some]), strict=True)
    ]
    return pieces, dict(zip(learning, shares, strict=True))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return cached(model, "buffers", lambda: dict(model.named_buffers()))


def _normalising(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
    return {name: module for name, module in modules_of(model).items() if isinstance(module, kinds)}
