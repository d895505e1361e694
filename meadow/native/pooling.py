"""Max pooling of channels-last images (`pooling.c`), forward and backward, bit-identical to torch."""

import ctypes
import functools
from collections.abc import Sequence

from torch import Tensor

from meadow.native.build import COUNT, POINTER, NotCompiled, declared


def pool_forward(x: Tensor, out: Tensor, places: Tensor, sizes: Sequence[int], relu: bool) -> None:
    """Write the maximum of each window of x to out, with ReLU if `relu`, and its position in the window to places
    (int32).

    x: float32 (n, h, w, c); out, places: (n, oh, ow, c). sizes: h, w, c, oh, ow and the window's height and width.
    """
    _found().pool_forward(x.data_ptr(), out.data_ptr(), places.data_ptr(), len(x), *sizes, relu)


def pool_backward(back: Tensor, places: Tensor, found: Tensor, sizes: Sequence[int]) -> None:
    """Write the gradient of the input to `found` (n, h, w, c), from `back`, that of the output (n, oh, ow, c)."""
    _found().pool_backward(back.data_ptr(), places.data_ptr(), found.data_ptr(), len(back), *sizes)


def available() -> bool:
    """Whether `pooling.c` can be used here."""
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load `pooling.c`, or return None."""
    pointers = [POINTER] * 3
    functions = {"pool_forward": (None, [*pointers, *[COUNT] * 9]), "pool_backward": (None, [*pointers, *[COUNT] * 8])}
    try:
        return declared("pooling.c", functions)
    except NotCompiled:
        return None


def _found() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask `available` first"
    return found
