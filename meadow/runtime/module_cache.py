"""Per-model cache of structural facts (module lists, parameter dicts), for models whose modules will not change."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import nn

T = TypeVar("T")
_FOUND = "found_once"


def enable_cache(model: nn.Module) -> nn.Module:
    """Turn the cache on: the model's modules and tensors will not change. For a small model, finding these facts takes
    as long as training it on a client's samples. Copies inherit the cache."""
    model.__dict__[_FOUND] = {}
    return model


def cached(model: nn.Module, what: Hashable, find: Callable[[], T]) -> T:
    """Return `find()`, cached under the key `what` if the model's cache is on."""
    found: dict[Hashable, T] | None = model.__dict__.get(_FOUND)
    if found is None:
        return find()
    if what not in found:
        found[what] = find()
    return found[what]
