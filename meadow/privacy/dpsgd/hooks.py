"""The clipped sum by Opacus's hooks, which compute per-example gradients, for any model in which only a module's own
forward() uses its parameters."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meadow.privacy.dpsgd.mechanism import ClippedSum, Mechanism, Sums
from meadow.runtime.errors import UserError


class HooksSum(ClippedSum):
    """Computes every sample's gradient. The first sample goes alone, to compare its gradient with autograd's.

    Raises UserError for a model that Opacus does not support, and if its hooks miss a part of a gradient.
    """

    def __init__(self, model: nn.Module, learning: Mapping[str, nn.Parameter], mechanism: Mechanism) -> None:
        super().__init__(model, learning, mechanism)
        self._checked = False
        self._order: dict[nn.Parameter, Tensor] = {}
        self._passed: set[nn.Parameter] = set()
        try:
            self._hook()
        except BaseException:
            self.undo.close()
            raise

    @property
    def begins_alone(self) -> bool:
        """True until the first sample's gradient was compared with autograd's."""
        return not self._checked

    def add(self, values: Tensor, into: Sums) -> Tensor | None:
        try:
            values.sum().backward()  # type: ignore[no-untyped-call]
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            raise UserError(
                f"task.model: Opacus cannot take it apart into single samples ({type(error).__name__}: {error}): write "
                'privacy.grad_sample = "loop", which is slow and always works'
            ) from None
        samples = {}
        for name, parameter in self._taking_part():
            samples[name] = parameter.grad_sample
            if parameter in self._order:
                samples[name] = samples[name][self._order[parameter]]
            if parameter in self._padding:
                samples[name][:, self._padding[parameter]] = 0  # Opacus gives padding a gradient, autograd none
        if not samples:
            return None
        self._compare_with_autograd({name: s[0] for name, s in samples.items()}, len(next(iter(samples.values()))))
        norms = torch.stack([s.reshape(len(s), -1).norm(2, dim=-1) for s in samples.values()], dim=1).norm(2, dim=1)
        finite = torch.isfinite(norms)
        factors = self.weights(norms)
        for name, sample in samples.items():
            if not finite.all():
                sample = sample[finite]
            into()[name] += torch.einsum("i,i...", factors[finite].to(sample.dtype), sample)
        return None

    def forget(self) -> None:
        self._order.clear()
        self._passed.clear()
        for module in self.model.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)
        for parameter in self.learning.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            if hasattr(parameter, "_current_grad_sample"):
                del parameter._current_grad_sample

    def _taking_part(self) -> Iterator[tuple[str, Any]]:
        """The learning parameters on which the loss depends, with the attributes that the hooks set."""
        for name, parameter in self.learning.items():
            if getattr(parameter, "grad_sample", None) is not None:
                yield name, parameter
            elif parameter.grad is not None:
                self._refuse_unless(False, name)

    def _compare_with_autograd(self, first: dict[str, Tensor], n: int) -> None:
        if self._checked or n != 1:
            return
        true = {name: p.grad for name, p in self.learning.items() if p.grad is not None}
        error = torch.stack([(first[name] - true[name]).norm() for name in true]).norm()
        size = torch.stack([g.norm() for g in true.values()]).norm()
        if torch.isfinite(size):
            self._refuse_unless(bool(error <= 1e-3 * size + 1e-6))

    def _refuse_unless(self, good: bool, name: str = "") -> None:
        if not good:
            raise UserError(
                "task.model: Opacus sees only a part of the gradient of single samples"
                + (f' (of the parameter "{name}")' if name else "")
                + ": every parameter must be used by the forward() of its own module and nowhere else, or write "
                'privacy.grad_sample = "loop"'
            )
        self._checked = True

    def _hook(self) -> None:
        from opacus.grad_sample import GradSampleHooks  # half a second to import

        self.undo.enter_context(warnings.catch_warnings())
        # The first layer's input needs no gradient; the gradients of its parameters are right, as tests show.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for parent, name, layer in list(_recurrent(self.model)):
            new = _opacus_recurrent(layer)
            new.register_forward_pre_hook(self._note_order)
            setattr(parent, name, new)
            self.undo.callback(setattr, parent, name, layer)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and any(p.requires_grad for p in module.parameters()):
                raise UserError(
                    f'task.model: "{name}" is an nn.MultiheadAttention, for which Opacus has no per-example gradients: '
                    'write privacy.grad_sample = "loop", or freeze it'
                )
        self._padding = {
            m.weight: m.padding_idx
            for m in self.model.modules()
            if isinstance(m, nn.Embedding) and m.padding_idx is not None
        }
        try:
            hooks = GradSampleHooks(self.model, loss_reduction="sum", strict=False)
        except NotImplementedError as error:
            for handle in getattr(self.model, "autograd_grad_sample_hooks", []):
                handle.remove()
            del self.model.autograd_grad_sample_hooks
            raise UserError(
                f'task.model: Opacus cannot take it apart into single samples ({error}): write task.norm = "group", or '
                "freeze the layer that it names"
            ) from None
        self.undo.callback(hooks.cleanup)

    def _note_order(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note how to restore the batch's order: Opacus sorts the samples of a packed sequence by length.

        Otherwise a sample would be clipped by parts of other samples' norms.
        """
        order = getattr(inputs[0], "unsorted_indices", None)
        for parameter in layer.parameters():
            known = self._order.get(parameter)
            if parameter in self._passed and not _same(known, order):
                raise UserError(
                    "task.model: a recurrent layer is used twice with samples in different orders, which Opacus would "
                    "mix up: pack once, or use two layers"
                )
            self._passed.add(parameter)
            if order is not None:
                self._order[parameter] = order


def _recurrent(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.RNNBase]]:
    """Yield (parent, name, layer) of every recurrent layer that learns."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.RNNBase) and any(p.requires_grad for p in child.parameters()):
                yield parent, name, child


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _opacus_recurrent(layer: nn.RNNBase) -> nn.Module:
    """Opacus's layer of the same kind with the same parameter objects."""
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
