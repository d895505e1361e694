"""Max pooling of channels-last images (`pooling.c`), forward and backward, bit-identical to torch."""

import ctypes
import functools
from collections.abc import Sequence

from torch import Tensor

from meadow.native.build import NotCompiled, compiled


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
