"""A task, opened: the data set, its split over the clients, the learned targets, the model and its initial state.

Everything here is a function of the experiment alone, so every process of a run opens the same task by itself.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from config import schema
from config.durable import Arrays
from config.errors import UserError
from config.load import apply, resolve, to_tree
from config.schema import Experiment
from config.seeds import derive, one_thread, torch_generator
from tasks.data import Data, Dataset, Target, concatenate
from tasks.datasets import open_dataset
from tasks.digits import printed_digits
from tasks.metrics import loss
from tasks.models import Inputs, build, inputs
from tasks.partition import Split, deal, strata
from tasks.peft import Added, added, extend

TRUNK = "trunk."


@dataclass(frozen=True)
class ClientData:
    """One client's own samples, in three disjoint parts."""

    train: Data
    validation: Data
    test: Data


@dataclass(frozen=True)
class Task:
    """What a process needs of a task. `targets` are the learned ones, in order, `weights` those of their losses.

    `ready`: samples are given to the model as they are (`tasks.features`).
    """

    dataset: Dataset
    split: Split
    targets: tuple[Target, ...]
    weights: tuple[float, ...]
    settings: schema.Task
    seed: int
    added: Added
    ready: bool = False
    _clients: dict[int, ClientData] = field(default_factory=dict, repr=False, compare=False)

    def client(self, pid: int) -> ClientData:
        """The data of client `pid`, 0 <= pid < partition.clients; kept once gathered. Raises IndexError beyond."""
        if not 0 <= pid < len(self.split.clients):
            raise IndexError(f"client {pid}: there are clients 0 to {len(self.split.clients) - 1}")
        if pid not in self._clients:
            own, pool = self.split.clients[pid], self.dataset.train
            parts = (pool.take(torch.from_numpy(index)) for index in (own.train, own.validation, own.test))
            self._clients[pid] = ClientData(*parts)
        return self._clients[pid]

    def pool(self) -> Data:
        """All clients' train parts in client order: what placement = "pooled" trains on."""
        return concatenate([self.client(pid).train for pid in range(len(self.split.clients))])

    def new_model(self) -> nn.Module:
        """A new model with the random start of the run's seed; `initial_state` is where training starts."""
        return extend(build(self.settings, self.targets, inputs(self.dataset), self.seed), self.added, self.seed)

    def prepare(self, x: Tensor, training: bool = False) -> Tensor:
        """Samples as the model takes them, from samples as they are stored (`tasks.data.Data`)."""
        return x


def open_task(experiment: Experiment) -> Task:
    """The task of an experiment; the same object for the same (run.seed, task, partition, fold) in one process.

    The split follows the first of `task.targets` (its labels, or for a value target its deciles), not the first
    learned one, so that methods that learn different targets are compared on one split. Raises UserError for an
    unknown target and an impossible split.
    """
    seed, folds = experiment.run.seed, (experiment.evaluate.folds, experiment.evaluate.fold)
    return _open_task(seed, experiment.task, experiment.partition, experiment.learned, *folds, added(experiment.local))


def settle(experiment: Experiment) -> Experiment:
    """The experiment with what only its data can tell filled in: `partition.clients` = 0 is how many there are.

    Raises UserError as `open_task`, and if the cohort does not fit so many clients.
    """
    if experiment.partition.clients:
        return experiment
    count = len(open_task(experiment).split.clients)
    return resolve(apply(to_tree(experiment), [("partition.clients", count)]))


@functools.lru_cache(maxsize=4)
def _open_task(
    seed: int,
    task: schema.Task,
    partition: schema.Partition,
    learned: tuple[str, ...],
    folds: int,
    fold: int,
    added: Added,
) -> Task:
    dataset = open_dataset(task)
    targets = {target.name: target for target in dataset.targets}
    first = targets[task.targets[0]]
    split = deal(partition, strata(dataset.train.y[first.name], first), seed)
    weights = task.target_weights or (1.0,) * len(learned)
    return Task(dataset, split, tuple(targets[name] for name in learned), weights, task, seed, added)


def initial_state(experiment: Experiment) -> Arrays:
    """The model's complete state before the first round, float32, in state_dict order; fresh arrays at each call.

    task.pretrained = "": the random start of run.seed (`tasks.models.build`). "source": its trunk is that of
    `source_state`, the heads keep their random start. A path to a .safetensors file: its arrays whose names start with
    "trunk." must be exactly the trunk's, by name and shape; other arrays in the file are passed over. Raises UserError
    for a file that is missing, unreadable or does not fit.
    """
    task, seed = experiment.task, experiment.run.seed
    dataset = open_dataset(task)
    state = dict(build(task, _learned(dataset, experiment), inputs(dataset), seed).state_dict())
    if task.pretrained == "source":
        source = source_state(experiment)
        state.update({name: torch.from_numpy(source[name]) for name in state if name.startswith(TRUNK)})
    elif task.pretrained:
        state.update(_trunk_from_file(task.pretrained, {n: t for n, t in state.items() if n.startswith(TRUNK)}))
    if added(experiment.local).kind:
        state = dict(open_task(experiment).new_model().state_dict()) | state
    return {name: tensor.numpy(force=True).astype(np.float32) for name, tensor in state.items()}


def source_state(experiment: Experiment) -> dict[str, npt.NDArray[np.float32]]:
    """The complete state of the source model, heads and all, float32, in state_dict order; not to be written to.

    The same model family, trained on `task.source_samples` samples of `task.source` for `task.source_epochs` epochs,
    on the learned targets with their weights. Its data, start and order come from derive(run.seed, "source"), so it is
    the same for every partition. Kept once trained.
    """
    task = experiment.task
    weights = task.target_weights or (1.0,) * len(experiment.learned)
    # What a source model depends on, and nothing else: runs that start from it under any other setting share it.
    key = schema.Task(
        learn="all",
        pretrained="",
        targets=experiment.learned,
        model=task.model,
        hidden=task.hidden,
        source=task.source,
        source_samples=task.source_samples,
        source_epochs=task.source_epochs,
        target_weights=weights,
    )
    targets = _learned(open_dataset(task), experiment)
    with one_thread():  # it is trained wherever it is asked for first, before or after an engine sets its threads
        return _source_state(derive(experiment.run.seed, "source"), key, targets)


@dataclass(frozen=True)
class SourceData:
    """The source task's own samples: those that the source model learned from, and others made the same way."""

    train: Data
    test: Data


def source_data(experiment: Experiment) -> SourceData:
    """The source task's data of an experiment: what `source_state` is trained on, and a test set of 1,000 samples."""
    return _source_data(derive(experiment.run.seed, "source"), experiment.task.source_samples)


@functools.lru_cache(maxsize=2)
def _source_data(seed: int, samples: int) -> SourceData:
    return SourceData(
        printed_digits(samples, derive(seed, "data")), printed_digits(SOURCE_TEST, derive(seed, "data", "test"))
    )


SOURCE_TEST = 1000
SOURCE_BATCH = 64
SOURCE_LR = 2e-3
SOURCE_WEIGHT_DECAY = 1e-2


@functools.lru_cache(maxsize=8)
def _source_state(seed: int, task: schema.Task, targets: tuple[Target, ...]) -> dict[str, npt.NDArray[np.float32]]:
    """Train the source model with AdamW (Loshchilov and Hutter 2019) at a rate that falls linearly to zero."""
    # The sample count alone decides the source data's targets and shape, so no test part is made for it.
    data = printed_digits(task.source_samples, derive(seed, "data"))
    model = build(task, targets, Inputs(tuple(data.x.shape[1:])), seed)
    steps = task.source_epochs * -(-len(data) // SOURCE_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SOURCE_LR, weight_decay=SOURCE_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for epoch in range(task.source_epochs):
        order = torch.randperm(len(data), generator=torch_generator(seed, "shuffle", epoch))
        for index in torch.split(order, SOURCE_BATCH):
            batch = data.take(index)
            optimizer.zero_grad(set_to_none=True)
            loss(model(batch.x), batch.y, targets, task.target_weights).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return {name: tensor.numpy(force=True).copy() for name, tensor in model.state_dict().items()}


def _trunk_from_file(place: str, trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    if not Path(place).is_file():
        raise UserError(
            f'task.pretrained = "{place}": there is no such file; write "source", the path of a .safetensors file, '
            "or an empty string for a random start"
        )
    try:
        arrays = {n: t for n, t in load_file(place).items() if n.startswith(TRUNK)}
    except (SafetensorError, OSError) as error:
        raise UserError(f'task.pretrained = "{place}" cannot be read as a .safetensors file: {error}') from None
    for name in sorted(trunk.keys() | arrays.keys()):
        way_out = "set task.model and task.hidden as they were when the file was made"
        if name not in arrays:
            raise UserError(f'task.pretrained = "{place}" has no array "{name}", which the trunk needs: {way_out}')
        if name not in trunk:
            raise UserError(f'task.pretrained = "{place}" has an array "{name}", which the trunk has not: {way_out}')
        if arrays[name].shape != trunk[name].shape:
            raise UserError(
                f'task.pretrained = "{place}": array "{name}" has shape {tuple(arrays[name].shape)}, '
                f"the trunk's has {tuple(trunk[name].shape)}: {way_out}"
            )
        if not arrays[name].is_floating_point() or not arrays[name].isfinite().all():
            raise UserError(
                f'task.pretrained = "{place}": array "{name}" is not of finite floating-point numbers: '
                "use a file that holds a trained model"
            )
    return {name: arrays[name].to(torch.float32) for name in trunk}


def _learned(dataset: Dataset, experiment: Experiment) -> tuple[Target, ...]:
    targets = {target.name: target for target in dataset.targets}
    return tuple(targets[name] for name in experiment.learned)
