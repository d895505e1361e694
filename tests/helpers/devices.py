"""A device that is none: tensors that are elsewhere, by which a test sees whether all of a computation takes place there.

Inside `elsewhere()` a tensor that is made on, or moved to, the device "meta" holds its numbers after all, and computes; but
an operation that takes one tensor from there and one from here is refused, as a GPU refuses it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

AWAY = torch.device("meta")
_PACK = "aten::_pack_padded_sequence"
_BETWEEN = {
    "aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense",
    _PACK, "aten::_pack_padded_sequence_backward", "aten::_pad_packed_sequence",
}  # fmt: skip
"""Operations that may have tensors from both: copies, and those of packed sequences, whose lengths are always on the CPU."""


class Away(Tensor):
    """A tensor on the device that is none. `here`: its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        made: Away = Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=AWAY
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares what it is where nothing overrides it
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(function, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        """As a GPU's tensor: only if asked to come here."""
        if not force:
            raise TypeError("the tensor is elsewhere: .numpy(force=True)")
        return self.here.numpy(force=True)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # what torch leaves without types
        return f"Away({self.here!r})"


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes what is asked for on the device that is none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


def _computed(function: Any, args: Any, kwargs: Any) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    away = [value for value in tensors if isinstance(value, Away)]
    name = function._schema.name
    if away and name not in _BETWEEN:
        strangers = [tuple(t.shape) for t in tensors if not isinstance(t, Away) and t.dim() > 0]
        if strangers:
            raise RuntimeError(f"{name}: tensors {strangers} are not where the others are")
    asked = kwargs.get("device")
    goes = torch.device(asked) if asked is not None else (AWAY if away else None)
    inner_args, inner_kwargs = tree_map(lambda v: v.here if isinstance(v, Away) else v, (args, kwargs))
    if asked is not None:
        inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
    found = function(*inner_args, **inner_kwargs)
    if name == "aten::copy_":
        return args[0]
    if goes is None or goes.type != AWAY.type:
        return found
    known = {id(value.here): value for value in away}  # what was changed in place is itself

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Away(value)

    if name == _PACK:
        return wrapped(found[0]), found[1]
    return tree_map(wrapped, found)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, while it is there."""
    with _Factories():  # type: ignore[no-untyped-call]
        yield AWAY
