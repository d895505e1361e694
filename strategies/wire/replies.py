"""Checks one client's reply. The node checks replies that it adds up, the server all others, by the same rules."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from meadow.arrays.named import Arrays
from meadow.arrays.sums import fault
from meadow.strategies.roles import name_weights


def weight_fault(metrics: Mapping[str, Any], size: int) -> str:
    """Return what is wrong with a reply's weights, or "". They must be positive (0 is valid for a head) and at most
    `size`."""
    weight = metrics.get("num-examples")
    if not _number(weight) or weight <= 0:
        return f"num-examples is {weight!r}; it must be a positive number"
    if weight > size:
        return f"num-examples is {weight!r}, more than the {size} training samples declared at roll call"
    for key, value in metrics.items():
        if key.startswith("num-examples/") and not (_number(value) and 0 <= value <= weight):
            return f"{key} is {value!r}; it must be a number from 0 to num-examples = {weight!r}"
    return ""


def arrays_fault(arrays: Arrays | None, metrics: Mapping[str, Any], sent: Arrays) -> str:
    """Return what is wrong with a reply's arrays, or "" (`meadow.arrays.sums.fault`). Its weights must be valid."""
    if arrays is None:
        return "its reply has no arrays"
    try:
        return fault(arrays, sent, name_weights(metrics, sent))
    except (TypeError, ValueError) as error:
        return f"its arrays cannot be read: {error}"


def _number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)
