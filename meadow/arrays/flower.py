"""Between Meadow's values and Flower's records; the one place that touches what Flower keeps private (flwr 1.41).

Named NumPy arrays become records without a copy. Each client's small records skip Flower's check of each entry, which for a
hundred clients takes as long as training some of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

from meadow.arrays.named import Arrays


class Kept(Array):
    """Flower's Array that keeps the NumPy array it was made of, and serialises it only where bytes are asked for: on a
    deployment's wire. Pickled with protocol 5, as Ray does, its numbers travel out of band, without a copy."""

    value: npt.NDArray[np.generic]

    def __init__(self, value: npt.NDArray[np.generic]) -> None:
        self.__dict__.update(value=value, dtype=value.dtype.name, shape=value.shape, stype="numpy.ndarray")

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array as NumPy saves it."""
        return Array.from_numpy_ndarray(self.value).data

    def numpy(self) -> npt.NDArray[np.generic]:
        """The array itself: not to be written to."""
        return self.value

    def deflate(self) -> bytes:
        """As a plain Array: that is what the other side knows."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (self.value,)


def _revived(value: npt.NDArray[np.generic]) -> Kept:
    """What lies in Ray's shared memory is copied out of it: torch warns of arrays that are read-only, and what is left
    there could not be freed."""
    return Kept(value if value.flags.writeable else value.copy())


def to_record(arrays: Mapping[str, npt.NDArray[np.generic]]) -> ArrayRecord:
    """Named arrays as Flower's ArrayRecord, in the given order, without a copy. Zero-dimensional arrays keep their shape."""
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = Kept(np.asarray(value))
    return record


def from_record(record: ArrayRecord) -> Arrays:
    """The inverse of `to_record`. The arrays are not to be written to: others may hold the same."""
    return {name: value.numpy() for name, value in record.items()}


def to_metrics(values: Mapping[str, int | float]) -> MetricRecord:
    """Numbers as Flower's MetricRecord."""
    record = MetricRecord()
    record.__dict__["_data"].update(values)
    return record


def to_content(records: Mapping[str, ArrayRecord | MetricRecord | ConfigRecord]) -> RecordDict:
    """Records as the content of a message."""
    content = RecordDict()
    content.__dict__["_data"].update(records)
    return content


def set_task(run: int, node: int) -> None:
    """Let this process create messages of a run as a node. Flower asks for a task's identity then, and has no public way to
    set it."""
    TaskIdentity.task_id = TaskIdentity.run_id = run
    TaskIdentity.node_id = node


def set_message_id(message: Message, number: str) -> None:
    """Give a message its id, as Flower's own grids do when it is sent."""
    message.metadata.__dict__["_message_id"] = number


def is_remote(grid: Grid) -> bool:
    """Whether a grid sends messages over Flower's network, each record and array by calls of its own."""
    from flwr.superlink.grid import HttpGrid  # the server's: a node need not import it

    return isinstance(grid, HttpGrid)
