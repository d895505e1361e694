"""Shares: the part of a task that one machine of a deployment needs, without other clients' data.

`write_shares` runs on a machine with all the data (or each data owner writes its own in the same format); the apps of a
deployment open their task from the share in MEADOW_SHARE (`use_share`). A node's share has its clients' samples, the
coordinator's the global test set and the sizes of all clients. The hashes of data and split are those of the whole, so
that the roll call detects different splits.
"""

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meadow.arrays.files import DamagedFile, read_arrays, write_arrays, write_bytes, write_json
from meadow.arrays.lru import LRU
from meadow.arrays.named import Arrays
from meadow.config.load import flatten, to_toml, to_tree
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.tasks.data import Data, Dataset, Target
from meadow.tasks.models.peft import added
from meadow.tasks.pipeline import image_pipeline
from meadow.tasks.splits.partition import LeftOut, Split
from meadow.tasks.task import ClientData, Task, open_task, open_tasks_by, settle

COORDINATOR = "coordinator"


def hosted(index: int, nodes: int, clients: int) -> range:
    """The clients of node `index` of `nodes`: an even, contiguous range."""
    return range(index * clients // nodes, (index + 1) * clients // nodes)


def write_shares(experiment: Experiment, nodes: int, out: Path, below: str = "") -> list[Path]:
    """Write the shares of the coordinator and of `nodes` nodes to out/coordinator/`below`, out/node-0/`below`, ...

    For pooled training node 0 has all data. Raises UserError as `open_task`, and if there are more
    nodes than clients.
    """
    experiment = settle(experiment)
    clients = experiment.partition.clients
    if not 1 <= nodes <= clients:
        raise UserError(f"--nodes {nodes}: {clients} clients can be divided among 1 to {clients} nodes")
    task = open_task(experiment)
    folders = [out / COORDINATOR / below, *(out / f"node-{i}" / below for i in range(nodes))]
    for number, folder in enumerate(folders):
        index = number - 1
        own = hosted(index, nodes, clients) if index >= 0 else range(0)
        if experiment.run.placement == "pooled" and index == 0:
            own = range(clients)
        _write(experiment, task, folder, own, coordinator=index < 0)
    return folders


def _write(experiment: Experiment, task: Task, folder: Path, own: range, coordinator: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    x = task.dataset.train.x
    sizes = task.split.sizes
    if not coordinator:
        sizes = np.where(np.isin(np.arange(len(sizes)), own)[:, None], sizes, 0)
    write_json(
        folder / "share.json",
        {
            "of": _identity(experiment),
            "clients": list(own),
            "shape": list(x.shape[1:]),
            "dtype": str(x.dtype).removeprefix("torch."),
            "dataset": {
                "name": task.dataset.name,
                "sha256": task.dataset.sha256,
                "tokens": task.dataset.tokens,
                "images": task.dataset.images,
                "clients": list(task.dataset.clients) if coordinator else [],
                "targets": [asdict(target) for target in task.dataset.targets],
            },
            "split": {
                "law": task.split.law,
                "tries": task.split.tries,
                "sha256": task.split.sha256,
                "left_out": asdict(task.split.left_out),
                "natural": None if task.split.natural is None else task.split.natural.tolist(),
                "sizes": sizes.tolist(),
            },
            "held": task.held.tolist(),
            "labels": task.label_counts().tolist() if coordinator else [],
        },
    )
    write_bytes(folder / "experiment.toml", to_toml(experiment).encode())
    if coordinator:
        write_arrays(folder / "test.safetensors", _arrays("test", task.dataset.test))
    for client in own:
        data = task.client(client)
        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        arrays = {name: array for part, own_data in parts.items() for name, array in _arrays(part, own_data).items()}
        write_arrays(folder / f"client-{client}.safetensors", arrays)


@functools.lru_cache(maxsize=4)
def read_share(folder: Path, experiment: Experiment) -> Task:
    """Open the task of an experiment from the share in `folder`. Raises UserError for a missing or different share."""
    try:
        share = json.loads((folder / "share.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"MEADOW_SHARE = {folder}: there is no share ({error}); `meadow deal` writes shares") from None
    for key, value in _identity(experiment).items():
        if share["of"].get(key) != value:
            raise UserError(
                f"MEADOW_SHARE = {folder}: the share was written for {key} = {share['of'].get(key)!r}, but the experiment "
                f"has {value!r}; run `meadow deal` again"
            )
    targets = tuple(_target(entry) for entry in share["dataset"]["targets"])
    empty = Data(
        torch.empty((0, *share["shape"]), dtype=getattr(torch, share["dtype"])),
        {t.name: torch.empty(0) for t in targets},
    )
    test_file = folder / "test.safetensors"
    try:
        test = _data("test", read_arrays(test_file)) if test_file.exists() else empty
        clients = {pid: _client(folder / f"client-{pid}.safetensors") for pid in share["clients"]}
    except DamagedFile as error:
        raise UserError(f"MEADOW_SHARE = {folder}: {error}; run `meadow deal` again") from None
    facts = {key: share["dataset"][key] for key in ("name", "sha256", "tokens", "images")}
    dataset = Dataset(train=empty, test=test, targets=targets, clients=tuple(share["dataset"]["clients"]), **facts)
    kept: LRU[int, ClientData] = LRU(2**62)  # unlimited: there is no pool to read them from again
    for client, data in clients.items():
        kept.put(client, data, 0)
    by_name = {target.name: target for target in targets}
    return Task(
        dataset,
        _split(share["split"]),
        tuple(by_name[name] for name in experiment.learned),
        experiment.task.target_weights or (1.0,) * len(experiment.learned),
        experiment.task,
        experiment.run.seed,
        np.array(share["held"], dtype=bool),
        pipeline=image_pipeline(dataset, experiment.task),
        counts=np.array(share["labels"], dtype=np.int64) if share["labels"] else None,
        added=added(experiment.local),
        two_domains=experiment.adapt.method == "augment",
        _clients=kept,
    )


def use_share(place: str) -> None:
    """Make this process open its tasks from the share in the folder `place`; "": from the data."""
    open_tasks_by(functools.partial(read_share, Path(place)) if place else None)


def _identity(experiment: Experiment) -> dict[str, Any]:
    """The settings that determine the data and the split, without the machine's paths."""
    keys = {"run.seed", *(f"task.{key}" for key in ("dataset", "targets", "kinds", "image_size", "channels")),
            "evaluate.folds", "evaluate.fold"}  # fmt: skip
    return {k: v for k, v in flatten(to_tree(experiment)) if k in keys or k.startswith("partition.")}


def _target(entry: dict[str, Any]) -> Target:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Target(**values)


def _split(entry: dict[str, Any]) -> Split:
    bounds = np.concatenate([[0], np.cumsum(np.array(entry["sizes"], dtype=np.int64).ravel())])
    natural = entry["natural"]
    return Split(
        entry["law"],
        entry["tries"],
        np.broadcast_to(np.int64(-1), int(bounds[-1])),  # the indices in the pool are not part of a share
        bounds,
        entry["sha256"],
        LeftOut(**entry["left_out"]),
        None if natural is None else np.array(natural, dtype=np.int64),
    )


def _client(path: Path) -> ClientData:
    arrays = read_arrays(path)
    return ClientData(*(_data(part, arrays) for part in ("train", "validation", "test")))


def _arrays(part: str, data: Data) -> Arrays:
    return {f"{part}/x": data.x.numpy(), **{f"{part}/y/{name}": y.numpy() for name, y in data.y.items()}}


def _data(part: str, arrays: Arrays) -> Data:
    prefix = f"{part}/y/"
    y = {n.removeprefix(prefix): torch.from_numpy(a) for n, a in arrays.items() if n.startswith(prefix)}
    return Data(torch.from_numpy(arrays[f"{part}/x"]), y)
