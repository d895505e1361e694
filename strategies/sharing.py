"""Which arrays travel, which are personal, and which never change: the roles that `strategy.share` gives them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from config.durable import Arrays
from config.schema import Experiment
from strategies.trainable import HEADS as HEADS
from strategies.trainable import is_added, trained


@dataclass(frozen=True)
class Roles:
    """The names of a model's state, divided. `shared`, `personal` and `fixed` are disjoint and complete.

    shared: travel in every round. personal: trained, never travel, live in the client's store. fixed: neither trained
    nor shared; they arrive once, before the first round. `trained` cuts across: what local training changes.
    """

    trained: tuple[str, ...]
    shared: tuple[str, ...]
    personal: tuple[str, ...]
    fixed: tuple[str, ...]

    @property
    def trunk_is_frozen(self) -> bool:
        """Whether local training changes heads alone."""
        return all(name.startswith(HEADS) for name in self.trained)


def roles(experiment: Experiment, names: Iterable[str]) -> Roles:
    """Divide the state names of a model by `local.trainable` and `strategy.share`; the order of names is kept."""
    order = tuple(names)
    heads = tuple(n for n in order if n.startswith(HEADS))
    learning = trained(experiment, order)
    changed = tuple(n for n in order if n in learning)
    # FedSA-LoRA: each client keeps its B (the experiment file allows this with share = "trainable" only).
    federated = experiment.run.placement == "federated"
    own_b = federated and experiment.local.trainable == "lora" and experiment.local.lora_share == "a"
    shared = {
        "all": order,
        "none": (),
        "body": tuple(n for n in order if n not in heads),
        "head": heads,
        "trainable": tuple(n for n in changed if not (own_b and is_added(n, "lora_b"))),
    }[experiment.share]
    personal = tuple(n for n in changed if n not in shared)
    return Roles(changed, shared, personal, tuple(n for n in order if n not in shared and n not in personal))


def name_weights(metrics: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """The weight of each array in a client's reply: its training samples (`num-examples`); for a head those of its target
    (`num-examples/<target>`). A head that no sample trained has weight 0 and does not travel."""
    weights = {}
    for name in names:
        target = name.split(".")[1] if name.startswith(HEADS) else ""
        weights[name] = float(metrics.get(f"num-examples/{target}", metrics["num-examples"]))
    return weights


def to_record(arrays: Mapping[str, npt.NDArray[np.generic]]) -> ArrayRecord:
    """Named arrays as Flower's ArrayRecord, in the given order. Zero-dimensional arrays keep their shape."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})


def from_record(record: ArrayRecord) -> Arrays:
    """The inverse of `to_record`."""
    return {name: value.numpy() for name, value in record.items()}


def arrays_sha256(arrays: Mapping[str, npt.NDArray[np.generic]]) -> str:
    """SHA-256 over arrays: for each name in sorted order, the name in UTF-8, then the array's little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        value = np.ascontiguousarray(arrays[name])
        digest.update(value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def nbytes(arrays: Mapping[str, npt.NDArray[np.generic]]) -> int:
    """Bytes of the arrays' values, without any wrapping."""
    return sum(value.nbytes for value in arrays.values())
