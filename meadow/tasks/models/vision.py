"""Imports torchvision, also with a CPU build of torch.

PyPI's torchvision is built for CUDA. With a CPU torch its compiled part cannot be loaded, and the import fails at two
undeclared detection operators, `nms` and `qnms`. Declared without an implementation, they let the rest work, because models
and transforms are plain Python. If the compiled part loads, nothing is declared.
"""

import functools
import importlib
from types import ModuleType

import torch

# Declarations live as long as this object.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]


@functools.cache
def torchvision() -> ModuleType:
    """The module `torchvision` with all of `torchvision.transforms.v2`; imported at the first call (1 s)."""
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
