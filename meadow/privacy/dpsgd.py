"""Example-level DP-SGD (Abadi et al. 2016, algorithm 1) for one training loop: it asks for indices and for gradients.

    with Privatiser(model, mechanism, sampling, noise) as private:
        for _ in range(mechanism.steps):
            index = private.sample(n)
            private.gradients(index, losses)     # p.grad = (sum of clipped gradients + noise) / denominator
            ...                                  # proximal terms, control variates: change p.grad here
            optimizer.step()

Whoever adds or removes one example changes the sum before the noise by at most `clip`, given that an example's loss
depends on no other example. Single samples' gradients are had by `meadow.privacy.bookkeeping` for the layers that it
covers, and by Opacus for any other model; sampling, clipping, noise and accounting are ours, because Opacus's engine
ties them to a data loader, to one round, and to the private size. Sampling and noise both come from streams that must
be secret where the privacy is to be real: amplification by sampling holds only against those who do not know who was drawn.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meadow.privacy.bookkeeping import Book, covers, modules_of
from meadow.privacy.noise import Stream
from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import once

Losses = Callable[[Tensor], Tensor]
"""The losses, float (k,), of the samples at the indices int64 (k,). Each may depend on its own sample only."""

GradSample = Literal["auto", "book", "ghost", "hooks", "loop"]

_VALUES_AT_ONCE = 2**26
"""Per-sample gradients held at once, in numbers; a larger batch is taken in pieces."""
_OPACUS_STABILISER = 1e-6


@dataclass(frozen=True)
class Mechanism:
    """The public constants of a client's DP-SGD in one round. None of them may be a function of private data.

    Each example takes part in each of `steps` steps with probability `sample_rate` on its own. Gradients are clipped to
    norm `clip`; the noise has standard deviation `noise_multiplier * clip`; the noisy sum is divided by `denominator`.
    Its part of a history (`meadow.privacy.accounting`) is (sample_rate, noise_multiplier, steps). Raises ValueError for
    a value out of range; a noise multiplier of 0 is allowed, and its epsilon is infinity.
    """

    sample_rate: float
    noise_multiplier: float
    clip: float
    denominator: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"Expected 0 < sample_rate={self.sample_rate} <= 1.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"Expected 0 <= noise_multiplier={self.noise_multiplier} < infinity.")
        for name in ("clip", "denominator"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Expected 0 < {name}={getattr(self, name)} < infinity.")
        if self.steps < 1:
            raise ValueError(f"Expected steps={self.steps} >= 1.")


def poisson(n: int, rate: float, stream: Stream) -> Tensor:
    """Indices, int64 and rising, of a Poisson sample: each of 0..n-1 with probability `rate` on its own; may be empty."""
    return torch.from_numpy(np.flatnonzero(stream.uniform(n).numpy() < rate))


def gaussian(out: Tensor, deviation: float, stream: Stream) -> None:
    """Fill a contiguous tensor with Gaussian noise, drawn on the CPU in float32 so that it is the same on every device."""
    if out.device.type == "cpu" and out.dtype == torch.float32:
        stream.fill(out.view(-1).numpy(), deviation)
    else:
        out.copy_(stream.normal(out.numel()).mul_(deviation).view(out.shape))


def refuse_what_mixes_samples(model: nn.Module) -> None:
    """Raise UserError if a module would compute statistics over the batch, or keep such statistics.

    That is every batch normalisation that is not in `eval()` with stored statistics, frozen or not (its output for one
    sample depends on the others, and its running statistics are released), and instance normalisation that tracks.
    """
    for name, module in once(model, "normalising", lambda: _normalising(model)).items():
        tracks = bool(getattr(module, "track_running_stats", True))
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not tracks)
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and tracks
        if batch or instance:
            raise UserError(
                f'task.model: "{name}" ({type(module).__name__}) mixes the samples of a batch, so that clipping bounds '
                'nothing and its statistics leave unprotected: write task.norm = "group", or keep it frozen in eval mode'
            )


def chosen_mode(model: nn.Module, mode: GradSample = "auto") -> Literal["book", "ghost", "hooks", "loop"]:
    """How the clipped sum is had: "book" keeps books of one pass, and is the fastest by far
    (`meadow.privacy.bookkeeping`); "ghost" and "hooks" are Opacus's: norms alone and then a second, weighted pass, or
    every sample's gradient; "loop" is a pass for each sample, slow and right for any model.

    "auto": book-keeping where it covers all that learns. Else the loop if a module that has modules in it learns itself, as
    in attention and vision transformers: nothing shows what one sample did there. Else ghost clipping (Li et al. 2022) if
    most of what learns is in linear layers and embeddings, where norms cost next to nothing; hooks otherwise, and where
    ghosts cannot be (recurrent layers, shared parameters). Raises UserError for book or ghost where it cannot be.
    """
    covered = covers(model)
    if mode in ("hooks", "loop"):
        return mode
    if covered and mode in ("auto", "book"):
        return "book"
    if mode == "auto" and any(_learns_itself(m) and any(True for _ in m.children()) for m in model.modules()):
        return "loop"
    if mode == "book":
        raise UserError(
            'privacy.grad_sample = "book": something that learns is no parameter of a linear layer, a convolution, an '
            'embedding, a group or a layer normalisation, or is shared between two: write privacy.grad_sample = "auto"'
        )
    learning = [p for p in model.parameters() if p.requires_grad]
    named = [id(p) for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    shared = len(named) != len(set(named))
    if shared or any(True for _ in _recurrent(model)):
        if mode == "ghost":
            raise UserError(
                'privacy.grad_sample = "ghost": the model shares a parameter between layers or has recurrent layers, '
                'which ghost clipping cannot take: write privacy.grad_sample = "hooks" or "auto"'
            )
        return "hooks"
    if mode == "ghost":
        return "ghost"
    return "ghost" if 2 * _ghosts(model) > sum(p.numel() for p in learning) else "hooks"


@dataclass
class Privatiser:
    """Gives the loop its samples and its private gradients, for one round of one client. A context manager.

    While it is open, hooks hang on the model. For Opacus's recurrent layers are replaced by Opacus's (which hold the very
    same parameters: an `nn.LSTM` shows no gradients of single samples), and no activation works in place; all that is
    undone at its end. What learns (`requires_grad`) and which modules are in `eval()` must be set before and stay so.

    `sampling` and `noise` are consumed step by step. Raises UserError on entry for a model that mixes samples, and
    at the end if a buffer has changed, because a buffer that follows the data would leave unprotected.
    """

    model: nn.Module
    mechanism: Mechanism
    sampling: Stream
    noise: Stream
    grad_sample: GradSample = "auto"
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _checked: bool = False

    def __enter__(self) -> Self:
        refuse_what_mixes_samples(self.model)
        parameters = once(self.model, "parameters", lambda: dict(self.model.named_parameters()))
        self._learning = {name: p for name, p in parameters.items() if p.requires_grad}
        if not self._learning:
            raise UserError("local.trainable: nothing of the model learns, so there is nothing to make private")
        self._buffers = {name: buffer.clone() for name, buffer in _buffers(self.model).items()}
        learning, wanted = frozenset(self._learning), self.grad_sample
        self._mode = once(self.model, ("private mode", learning, wanted), lambda: chosen_mode(self.model, wanted))
        # Made once, as fresh memory for every step would cost more than the noise.
        self._drawing, self._shares = once(self.model, ("shares", learning), lambda: _shares(self._learning))
        try:
            self._prepare()
        except BaseException:
            self._restore()
            raise
        held = sum(p.numel() for p in self._learning.values())
        if self._mode in ("book", "ghost"):
            held -= once(self.model, ("ghosts", learning), lambda: _ghosts(self.model))
        self._piece = max(1, min(4096, _VALUES_AT_ONCE // max(1, held)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None:
            for name, buffer in _buffers(self.model).items():
                if not torch.equal(buffer, self._buffers[name]):
                    raise UserError(
                        f'task.model: the buffer "{name}" changed in private training, so it holds statistics of private '
                        'data: write task.norm = "group", or freeze the module that has it'
                    )

    def sample(self, n: int) -> Tensor:
        """The indices of the next step's Poisson sample of the client's n samples, int64 and rising; may be empty."""
        return poisson(n, self.mechanism.sample_rate, self.sampling)

    def gradients(self, index: Tensor, losses: Losses) -> None:
        """Set every learning parameter's `grad` to (sum of clipped gradients of the samples + noise) / denominator.

        An empty sample gives noise alone; so does a sample whose gradient is not finite. A parameter that had no part in
        the loss gets noise too. `losses` is called with pieces of the index, each sample once or, where another sample
        of its piece is not finite, twice. Raises TypeError if it does not give one loss for each sample, and UserError
        if the hooks miss a part of the gradient, because a parameter is used outside of its own module.
        """
        self._drawn = False
        # With Opacus the first sample goes alone: of one sample, autograd knows the true gradient.
        first = 0 if self._checked or self._mode in ("book", "loop") else 1
        piece = 1 if self._mode == "loop" else self._piece
        for begin, end in pairwise([*range(first), *range(first, len(index), piece), len(index)]):
            if begin < end:
                self._add_clipped(index if end - begin == len(index) else index[begin:end], losses)
        for name, share in self._noisy().items():
            self._learning[name].grad = share

    def _noisy(self) -> dict[str, Tensor]:
        """What becomes of the gradients, with this step's noise in it: drawn late, so that it is still in the cache."""
        plan = self.mechanism
        deviation = plan.noise_multiplier * plan.clip / plan.denominator
        for flat in () if self._drawn else self._drawing:
            if deviation > 0:
                gaussian(flat, deviation, self.noise)
            else:
                flat.zero_()
        self._drawn = True
        return self._shares

    def _add_clipped(self, piece: Tensor, losses: Losses) -> None:
        self._forget()
        values = losses(piece)
        if values.shape != (len(piece),):
            raise TypeError(
                f"losses gave shape {tuple(values.shape)} for {len(piece)} samples: one loss each is needed"
            )
        if self._mode == "book":
            self._add_from_book(piece, values, losses)
        elif self._mode == "loop":
            self._add_alone(values)
        else:
            try:
                values.sum().backward(retain_graph=self._mode == "ghost")  # type: ignore[no-untyped-call]
            except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"task.model: Opacus cannot take it apart into single samples ({type(error).__name__}: {error}): write "
                    'privacy.grad_sample = "loop", which is slow and right'
                ) from None
            if self._mode == "hooks":
                self._add_from_hooks()
            else:
                self._add_from_norms(piece, values, losses)
        self._forget()

    def _add_from_book(self, piece: Tensor, values: Tensor, losses: Losses) -> None:
        norms = self._book.norms(values)
        if math.isfinite(norms.sum()):
            self._book.add(self._weights(norms), self._noisy())
        elif (finite := torch.isfinite(norms)).any():
            self._add_clipped(piece[finite.to(piece.device)], losses)

    def _add_alone(self, value: Tensor) -> None:
        if not value.requires_grad:
            return
        value.sum().backward()  # type: ignore[no-untyped-call]
        own = {name: p.grad for name, p in self._learning.items() if p.grad is not None}
        norms = torch.stack([gradient.norm() for gradient in own.values()]).norm().reshape(1)
        if math.isfinite(norms):
            weight = self._weights(norms)
            for name, gradient in own.items():
                self._noisy()[name].addcmul_(gradient, weight)

    def _add_from_hooks(self) -> None:
        samples = {}
        for name, parameter in self._taking_part("grad_sample"):
            samples[name] = parameter.grad_sample
            if parameter in self._order:
                samples[name] = samples[name][self._order[parameter]]
            if parameter in self._padding:
                samples[name][:, self._padding[parameter]] = 0  # Opacus gives padding a gradient, autograd none
        if not samples:
            return
        self._hold_against_autograd({name: s[0] for name, s in samples.items()}, len(next(iter(samples.values()))))
        norms = torch.stack([s.reshape(len(s), -1).norm(2, dim=-1) for s in samples.values()], dim=1).norm(2, dim=1)
        finite = torch.isfinite(norms)
        factors = self._weights(norms)
        for name, sample in samples.items():
            if not finite.all():
                sample = sample[finite]
            self._noisy()[name] += torch.einsum("i,i...", factors[finite].to(sample.dtype), sample)

    def _add_from_norms(self, piece: Tensor, values: Tensor, losses: Losses) -> None:
        norms = [p._norm_sample for _, p in self._taking_part("_norm_sample")]
        if not norms:
            return
        norm = torch.stack(norms).norm(2, dim=0)
        finite = torch.isfinite(norm)
        if not finite.all():
            if finite.any():
                self._add_clipped(piece[finite.to(piece.device)], losses)
            return
        if len(piece) == 1 and not self._checked:
            true = torch.stack([p.grad.norm() for p in self._learning.values() if p.grad is not None]).norm()
            # Padding of an embedding is counted in the hooks' norm, so that may be larger; never smaller.
            self._refuse_unless(bool(norm[0] >= 0.999 * true - 1e-6))
        for parameter in self._learning.values():
            parameter.grad = None
        self._hooks.disable_hooks()
        try:
            (self._weights(norm).to(values.dtype) * values).sum().backward()  # type: ignore[no-untyped-call]
        finally:
            self._hooks.enable_hooks()
        for name, parameter in self._learning.items():
            if parameter.grad is not None:
                self._noisy()[name] += parameter.grad

    def _weights(self, norms: Tensor) -> Tensor:
        """What each sample's gradient counts in the result."""
        return torch.from_numpy(self._factors(norms.cpu().numpy()) / self.mechanism.denominator).to(norms.device)

    def _factors(self, norms: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """min(1, clip / norm) with Opacus's stabiliser, so that a clipped gradient is never longer than the clip."""
        return np.minimum(self.mechanism.clip / (norms + _OPACUS_STABILISER), 1.0)

    def _taking_part(self, attribute: str) -> Iterator[tuple[str, Any]]:
        """The learning parameters that had a part in the loss, each with what the hooks left on it."""
        for name, parameter in self._learning.items():
            if getattr(parameter, attribute, None) is not None:
                yield name, parameter
            elif parameter.grad is not None:
                self._refuse_unless(False, name)

    def _hold_against_autograd(self, first: dict[str, Tensor], n: int) -> None:
        if self._checked or n != 1:
            return
        true = {name: p.grad for name, p in self._learning.items() if p.grad is not None}
        error = torch.stack([(first[name] - true[name]).norm() for name in true]).norm()
        size = torch.stack([g.norm() for g in true.values()]).norm()
        if torch.isfinite(size):
            self._refuse_unless(bool(error <= 1e-3 * size + 1e-6))

    def _refuse_unless(self, good: bool, name: str = "") -> None:
        if not good:
            raise UserError(
                "task.model: Opacus sees only a part of the gradient of single samples"
                + (f' (of the parameter "{name}")' if name else "")
                + ": every parameter must be used by the forward() of its own module and nowhere else; or write "
                'privacy.grad_sample = "loop"'
            )
        self._checked = True

    def _prepare(self) -> None:
        modules = modules_of(self.model).values()
        for module in once(self.model, "may work in place", lambda: [m for m in modules if hasattr(m, "inplace")]):
            if getattr(module, "inplace", None) is True:
                module.inplace = False  # type: ignore[assignment]
                self._undo.append(functools.partial(setattr, module, "inplace", True))
        if self._mode == "book":
            self._book = Book(self.model)
            self._undo.append(self._book.close)
        elif self._mode != "loop":
            self._hook()

    def _hook(self) -> None:
        from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping  # half a second to import

        quiet = warnings.catch_warnings()
        quiet.__enter__()
        self._undo.append(lambda: quiet.__exit__(None, None, None))
        # The first layer's input needs no gradient; its parameters' are right all the same, as the tests hold.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self._order: dict[nn.Parameter, Tensor] = {}
        self._passed: set[nn.Parameter] = set()
        for parent, name, layer in list(_recurrent(self.model)):
            new = _opacus_recurrent(layer)
            new.register_forward_pre_hook(self._note_order)
            setattr(parent, name, new)
            self._undo.append(functools.partial(setattr, parent, name, layer))
        for name, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and any(p.requires_grad for p in module.parameters()):
                raise UserError(
                    f'task.model: "{name}" is an nn.MultiheadAttention, which shows no gradients of single samples: '
                    'write privacy.grad_sample = "loop", or freeze it'
                )
        self._padding = {
            m.weight: m.padding_idx
            for m in self.model.modules()
            if isinstance(m, nn.Embedding) and m.padding_idx is not None
        }
        kind = GradSampleHooks if self._mode == "hooks" else GradSampleHooksFastGradientClipping
        try:
            self._hooks = kind(self.model, loss_reduction="sum", strict=False)
        except NotImplementedError as error:
            for handle in getattr(self.model, "autograd_grad_sample_hooks", []):
                handle.remove()
            del self.model.autograd_grad_sample_hooks
            raise UserError(
                f'task.model: Opacus cannot take it apart into single samples ({error}): write task.norm = "group", or '
                "freeze the layer that it names"
            ) from None
        self._undo.append(self._hooks.cleanup)

    def _note_order(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Opacus leaves the samples of a packed sequence in the order of their lengths, all other layers in the batch's.

        Left so, a sample would be clipped by parts of other samples' norms, and one record more would move all of them.
        """
        order = getattr(inputs[0], "unsorted_indices", None)
        for parameter in layer.parameters():
            known = self._order.get(parameter)
            if parameter in self._passed and not _same(known, order):
                raise UserError(
                    "task.model: a recurrent layer is used twice with samples in another order, so Opacus would mix them "
                    "up: pack once, or use a layer for each"
                )
            self._passed.add(parameter)
            if order is not None:
                self._order[parameter] = order

    def _restore(self) -> None:
        if self._mode == "loop" or hasattr(self, "_hooks") or hasattr(self, "_book"):
            self._forget()
        while self._undo:
            self._undo.pop()()

    def _forget(self) -> None:
        """Take away all that a pass left on modules and parameters, whether it came to its end or not."""
        if self._mode == "book":
            self._book.forget()
            return
        if self._mode == "loop":
            for parameter in self._learning.values():
                parameter.grad = None
            return
        self._order.clear()
        self._passed.clear()
        for module in self.model.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)
        for parameter in self._learning.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            for name in ("_current_grad_sample", "_norm_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)


@dataclass
class Permit:
    """The right to so many private steps as were charged for one release. `on` gives what makes the gradients of a model.

    Several models, or several stretches of training, may share a permit; together they get no more than its steps.
    """

    mechanism: Mechanism
    sampling: Stream
    noise: Stream
    grad_sample: GradSample = "auto"
    _taken: int = 0

    def on(self, model: nn.Module) -> Privatiser:
        """What makes private gradients of this model."""
        return Privatiser(model, self.mechanism, self.sampling, self.noise, self.grad_sample)

    def sample(self, n: int) -> Tensor:
        """The next step's Poisson sample of n samples. Raises UserError if all steps that were charged are taken."""
        if self._taken >= self.mechanism.steps:
            raise UserError(
                f'privacy.unit = "example": training wants more than the {self.mechanism.steps} steps a round that are '
                "charged for; use a strategy that trains body and head together, once a round"
            )
        self._taken += 1
        return poisson(n, self.mechanism.sample_rate, self.sampling)


def _shares(learning: dict[str, nn.Parameter]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Room for what becomes of the gradients, by name; and the pieces, each drawn at once, of which those are parts: one
    piece if all parameters are of one kind."""
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
    return once(model, "buffers", lambda: dict(model.named_buffers()))


def _normalising(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
    return {name: module for name, module in modules_of(model).items() if isinstance(module, kinds)}


def _learns_itself(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _ghosts(model: nn.Module) -> int:
    """How many learning numbers are in layers whose per-sample norms cost no per-sample gradients."""
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)]
    return sum(p.numel() for m in layers for p in m.parameters(recurse=False) if p.requires_grad)


def _recurrent(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.RNNBase]]:
    """Every recurrent layer that learns, with its parent and its name there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.RNNBase) and any(p.requires_grad for p in child.parameters()):
                yield parent, name, child


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _opacus_recurrent(layer: nn.RNNBase) -> nn.Module:
    """Opacus's layer of the same kind that holds the same parameters."""
    from opacus.layers import DPGRU, DPLSTM, DPRNN

    if layer.proj_size:
        raise UserError("task.model: Opacus has no recurrent layer with projections (proj_size): leave them out")
    kinds = {"LSTM": DPLSTM, "GRU": DPGRU, "RNN_TANH": DPRNN, "RNN_RELU": DPRNN}
    more = {"nonlinearity": layer.mode[4:].lower()} if layer.mode.startswith("RNN") else {}
    new: nn.Module = kinds[layer.mode](
        layer.input_size,
        layer.hidden_size,
        num_layers=layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        **more,
    )
    new.train(layer.training)
    for name, parameter in layer.named_parameters():
        what, matrix, cell = name.split("_", 2)  # weight_ih_l0_reverse is the weight of l0_reverse.ih
        setattr(getattr(getattr(new, cell), matrix), what, parameter)
        setattr(new, name, parameter)
    return new
