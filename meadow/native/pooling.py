"""Maximum pooling of images that lie by pixels (`pooling.c`), forward and back, to the bits of torch's."""

import ctypes
import functools
from collections.abc import Sequence

from torch import Tensor

from meadow.native.build import NotCompiled, compiled


def pool_forward(x: Tensor, out: Tensor, places: Tensor, sizes: Sequence[int], relu: bool) -> None:
    """Write the maximum of each window of x, after ReLU if asked for, to out, and its place in the window to places (int32).

    x: float32 (n, h, w, c) in memory; out, places: (n, oh, ow, c). sizes: h, w, c, oh, ow and the window's height and width.
    """
    _found().pool_forward(x.data_ptr(), out.data_ptr(), places.data_ptr(), len(x), *sizes, relu)


def pool_backward(back: Tensor, places: Tensor, found: Tensor, sizes: Sequence[int]) -> None:
    """Write to `found` (n, h, w, c) the gradient by what went in, from `back` (n, oh, ow, c), that by what came out."""
    _found().pool_backward(back.data_ptr(), places.data_ptr(), found.data_ptr(), len(back), *sizes)


def available() -> bool:
    """Whether `pooling.c` can be had here."""
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled `pooling.c`, None where it cannot be had."""
    try:
        found = compiled("pooling.c")
    except NotCompiled:
        return None
    for function, numbers in ((found.pool_forward, 9), (found.pool_backward, 8)):
        function.restype, function.argtypes = None, [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * numbers]
    return found


def _found() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask `available` first"
    return found
