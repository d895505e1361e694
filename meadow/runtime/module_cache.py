"""Models that hold still: what is often asked of their modules and tensors is found once."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import nn

T = TypeVar("T")
_FOUND = "found_once"


def hold_still(model: nn.Module) -> nn.Module:
    """Declare that the model keeps its modules and tensors from now on, so that what is often asked of it (`once`) is found
    once: for a small model that takes as long as training it on a client's samples. Copies are as the model was."""
    model.__dict__[_FOUND] = {}
    return model


def once(model: nn.Module, what: Hashable, find: Callable[[], T]) -> T:
    """What `find` finds of a model's modules and tensors, under the name `what`; kept for a model that holds still."""
    found: dict[Hashable, T] | None = model.__dict__.get(_FOUND)
    if found is None:
        return find()
    if what not in found:
        found[what] = find()
    return found[what]
