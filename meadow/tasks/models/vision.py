"""torchvision, also beside a CPU build of torch.

PyPI's torchvision is built for CUDA. Beside a CPU torch its compiled part cannot be loaded, and its import then fails,
because it describes two detection operators, `nms` and `qnms`, that nobody has declared. Once they are declared, without
an implementation, the rest works: models and transforms are plain Python. Where the compiled part loads (a matched pair,
with CUDA or without), nothing is declared.
"""

import functools
import importlib
from types import ModuleType

import torch

# Declarations last as long as this object.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


@functools.cache
def torchvision() -> ModuleType:
    """The module `torchvision` with all of `torchvision.transforms.v2`; imported at the first call (about a second)."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _OPERATORS.define(schema)  # type: ignore[no-untyped-call]
    importlib.import_module("torchvision.transforms.v2")
    return importlib.import_module("torchvision")
