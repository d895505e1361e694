"""Converts between Meadow's values and Flower's records. Of what a run uses, only this module uses private parts of
Flower (flwr 1.41); `deploy/control.py` uses others for the operator.

Named NumPy arrays become records without a copy. Small records skip Flower's check of each entry, which would take as
long as training some of the clients.
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
    """A Flower Array that keeps its NumPy array and serialises it only when a deployment needs bytes. Ray's pickle
    (protocol 5) sends the values out of band, without a copy."""

    value: npt.NDArray[np.generic]

    def __init__(self, value: npt.NDArray[np.generic]) -> None:
        self.__dict__.update(value=value, dtype=value.dtype.name, shape=value.shape, stype="numpy.ndarray")

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in the format of `numpy.save`."""
        return Array.from_numpy_ndarray(self.value).data

    def numpy(self) -> npt.NDArray[np.generic]:
        """Return the array itself, which must not be written to."""
        return self.value

    def deflate(self) -> bytes:
        """Serialise as a plain Array, which is the type that the receiver knows."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (self.value,)


def _revived(value: npt.NDArray[np.generic]) -> Kept:
    """Copy the array out of Ray's shared memory, so that it is writable (torch warns otherwise) and Ray can free its
    own."""
    return Kept(value if value.flags.writeable else value.copy())


def to_record(arrays: Mapping[str, npt.NDArray[np.generic]]) -> ArrayRecord:
    """Put named arrays, in order, into an ArrayRecord without a copy. Zero-dimensional arrays keep their shape."""
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = Kept(np.asarray(value))
    return record


def from_record(record: ArrayRecord) -> Arrays:
    """Invert `to_record`. The arrays may be shared, so they must not be written to."""
    return {name: value.numpy() for name, value in record.items()}


def to_metrics(values: Mapping[str, int | float]) -> MetricRecord:
    """Put numbers into a MetricRecord."""
    record = MetricRecord()
    record.__dict__["_data"].update(values)
    return record


def to_content(records: Mapping[str, ArrayRecord | MetricRecord | ConfigRecord]) -> RecordDict:
    """Put records into the content of a message."""
    content = RecordDict()
    content.__dict__["_data"].update(records)
    return content


def set_task(run: int, node: int) -> None:
    """Let this process create messages of a run as a node. Flower requires a task identity and has no public way to set
    it."""
    TaskIdentity.task_id = TaskIdentity.run_id = run
    TaskIdentity.node_id = node


def set_message_id(message: Message, number: str) -> None:
    """Set a message's id, as Flower's grids do on sending."""
    message.metadata.__dict__["_message_id"] = number


def is_remote(grid: Grid) -> bool:
    """Whether a grid sends messages over Flower's network, with separate calls for each record and array."""
    from flwr.superlink.grid import HttpGrid  # imported here because only servers need it

    return isinstance(grid, HttpGrid)
