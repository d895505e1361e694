"""The task of an experiment: the data set, its split over the clients, the learned targets and the model.

It is a function of the experiment alone, so every process of a run opens the same task by itself.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meadow.arrays import memory
from meadow.arrays.lru import LRU
from meadow.config import schema
from meadow.config.load import apply, resolve, to_tree
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.data import MISSING, Data, Dataset, Target, concatenate
from meadow.tasks.models.multihead import build, inputs, with_domains
from meadow.tasks.models.peft import Added, added, extend
from meadow.tasks.numerics import channels_last
from meadow.tasks.pipeline import Pipeline, image_pipeline
from meadow.tasks.readers.datasets import data_settings, forget_datasets, open_dataset
from meadow.tasks.splits.holds import held
from meadow.tasks.splits.partition import Split, label_counts, make_split, strata
from meadow.tasks.splits.partitioners import Ints

_CACHED = 2**28
"""Bytes of client data that a process caches, least recently used first out."""


@dataclass(frozen=True)
class ClientData:
    """One client's own samples, in three disjoint parts."""

    train: Data
    validation: Data
    test: Data


@dataclass(frozen=True)
class Task:
    """An opened task. `targets`: the learned ones, in order; `weights`: those of their losses.

    held: whether each client has the labels of each of `task.targets` (`partition.holds`), bool (clients, targets).
    noise: variance of the last client's noise for law = feature-shift, else 0. pipeline: what `prepare` does to images;
    None for other samples. counts: `label_counts`, for processes that do not have the pool
    (`meadow.tasks.splits.shares`). added: modules added to each layer of the trunk. two_domains: whether heads are
    `meadow.tasks.models.multihead.TwoDomains`.
    """

    dataset: Dataset
    split: Split
    targets: tuple[Target, ...]
    weights: tuple[float, ...]
    settings: schema.Task
    seed: int
    held: npt.NDArray[np.bool_]
    noise: float = 0.0
    pipeline: Pipeline | None = None
    counts: Ints | None = None
    added: Added = field(default_factory=Added)
    two_domains: bool = False
    _clients: LRU[int, ClientData] = field(default_factory=lambda: LRU(_CACHED), repr=False, compare=False)

    def client(self, pid: int) -> ClientData:
        """The data of client `pid`, cached. Raises IndexError unless 0 <= pid < partition.clients.

        Labels of targets that the client does not have are missing; for law = feature-shift its inputs are noisy.
        """
        if not 0 <= pid < len(self.split.clients):
            raise IndexError(f"client {pid}: there are clients 0 to {len(self.split.clients) - 1}")
        if (found := self._clients.get(pid)) is not None:
            return found
        own = self.split.clients[pid]
        indices = (own.train, own.validation, own.test)
        parts = [self._masked(pid, self.dataset.train.take(torch.from_numpy(index))) for index in indices]
        if self.noise:
            variance = self.noise * (pid + 1) / len(self.split.clients)
            parts = _with_noise(parts, indices, variance, numpy_generator(self.seed, "feature-shift", pid))
        return self._clients.put(pid, ClientData(*parts), sum(part.nbytes for part in parts))

    def _masked(self, pid: int, data: Data) -> Data:
        gone = {name for name, has in zip(self.settings.targets, self.held[pid], strict=True) if not has}
        if not gone:
            return data
        return Data(data.x, {name: _all_missing(y) if name in gone else y for name, y in data.y.items()})

    def label_counts(self) -> Ints:
        """Each client's samples (all parts) by label or decile of the first of `task.targets`, int64 (clients, labels)."""
        if self.counts is not None:
            return self.counts
        first = next(t for t in self.dataset.targets if t.name == self.settings.targets[0])
        return label_counts(self.split, strata(self.dataset.train.y[first.name], first))

    def pool(self) -> Data:
        """All clients' training parts in client order: the training data of placement = "pooled"."""
        return concatenate([self.client(pid).train for pid in range(len(self.split.clients))])

    def new_model(self) -> nn.Module:
        """A new model with random weights from the run's seed; training starts from `initial_state`."""
        model = extend(build(self.settings, self.targets, inputs(self.dataset), self.seed), self.added, self.seed)
        return channels_last(with_domains(model) if self.two_domains else model)

    def plain_model(self) -> nn.Module:
        """A new model with one trunk and no added modules, as source models and files of weights have it."""
        settings = self.settings.model_copy(update={"trunks": "shared"})
        return build(settings, self.targets, inputs(self.dataset), self.seed)

    @property
    def augments(self) -> bool:
        """Whether `prepare` augments training samples at random."""
        return self.pipeline is not None and bool(self.pipeline.steps)

    def prepare(self, x: Tensor, training: bool = False) -> Tensor:
        """Prepare stored samples (`meadow.tasks.data.Data`) for the model, in the same shape.

        Images become float32 and normalised, and with `training` augmented by torch's global generator: seed it
        (`meadow.runtime.seeds.torch_seeded`). Other samples are unchanged.
        """
        return x if self.pipeline is None else self.pipeline(x, training)


_openers: list[Callable[[Experiment], Task]] = []


def open_tasks_by(open_: Callable[[Experiment], Task] | None) -> None:
    """Make `open_task` call `open_` in this process, as for a share; None: open tasks from the data again."""
    _openers[:] = [open_] if open_ else []


def open_task(experiment: Experiment) -> Task:
    """The task of an experiment; the same object for the same (run.seed, task, partition, fold) in one process.

    The split depends on the first of `task.targets` (its labels, or the deciles of a value), not on the first learned
    one, so that methods that learn different targets are compared on the same split. `open_tasks_by` can replace this
    function. Raises UserError for an unknown target and an impossible split.
    """
    if _openers:
        return _openers[-1](experiment)
    seed, folds = experiment.run.seed, (experiment.evaluate.folds, experiment.evaluate.fold)
    more = added(experiment.local), experiment.adapt.method == "augment"
    return _open_task(seed, experiment.task, experiment.partition, experiment.learned, *folds, *more)


def share_task(experiment: Experiment) -> list[str]:
    """Put an experiment's data and split into shared memory (`meadow.arrays.memory`) and return their addresses.

    From then on `open_task` takes them from there, in this process and in others that attach the addresses."""
    addresses = []
    for each in {experiment: None, settle(experiment): None}:
        task, folds = open_task(each), (each.evaluate.folds, each.evaluate.fold)
        addresses.append(memory.share(data_settings(each.task), task.dataset))
        addresses.append(memory.share(_split_of(each.run.seed, each.task, each.partition, *folds), task.split))
    forget_datasets()
    _open_task.cache_clear()
    return [address for address in dict.fromkeys(addresses) if address]


def _split_of(seed: int, task: schema.Task, partition: schema.Partition, folds: int, fold: int) -> Hashable:
    """The key of a split: all that it depends on."""
    return seed, data_settings(task), partition, folds, fold


def settle(experiment: Experiment) -> Experiment:
    """The experiment with `partition.clients` = 0 replaced by the number of clients in the data.

    Raises UserError as `open_task`, and if the cohort does not fit that number.
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
    two_domains: bool,
) -> Task:
    dataset = open_dataset(task)
    targets = {target.name: target for target in dataset.targets}
    first = targets[task.targets[0]]
    shifted = partition.law == "feature-shift"
    if shifted and dataset.tokens:
        raise UserError(
            f'partition.law = "feature-shift": the samples of task.dataset = "{task.dataset}" are tokens, to which '
            "noise cannot be added; choose another law"
        )
    split = memory.common(
        _split_of(seed, task, partition, folds, fold),
        lambda: make_split(partition, strata(dataset.train.y[first.name], first), seed, dataset.owner, folds, fold),
    )
    holders = held(partition.holds, task.targets, len(split.clients), seed)
    weights = task.target_weights or (1.0,) * len(learned)
    learned_targets, noise = tuple(targets[name] for name in learned), partition.noise if shifted else 0.0
    pipeline = image_pipeline(dataset, task)
    return Task(
        dataset, split, learned_targets, weights, task, seed, holders, noise, pipeline, None, added, two_domains
    )


def _all_missing(y: Tensor) -> Tensor:
    """Labels of the same shape and dtype, all missing."""
    return torch.full_like(y, torch.nan if y.is_floating_point() else MISSING)


def _with_noise(
    parts: Sequence[Data], indices: Sequence[Ints], variance: float, draw: np.random.Generator
) -> list[Data]:
    """NIID-Bench's noise-based feature imbalance (Li et al. 2022, arXiv:2102.02079, section 4.2): Gaussian noise of
    mean 0 and this variance on the inputs; on uint8 images in units of 255, rounded and clipped.

    Noise is drawn in the order of sample indices, so that it does not depend on a sample's part or fold.
    """
    own = np.concatenate(indices)
    noise = draw.standard_normal((len(own), *parts[0].x.shape[1:]), dtype=np.float32)
    noise *= np.float32(np.sqrt(variance))
    rank = np.empty(len(own), dtype=np.int64)
    rank[np.argsort(own)] = np.arange(len(own))
    pieces = torch.split(torch.from_numpy(rank), [len(part) for part in parts])
    noises = (torch.from_numpy(noise).index_select(0, piece) for piece in pieces)
    return [Data(_add_noise(data.x, noise), data.y) for data, noise in zip(parts, noises, strict=True)]


def _add_noise(x: Tensor, noise: Tensor) -> Tensor:
    """x + noise, of x's dtype; overwrites `noise`."""
    if x.dtype == torch.uint8:
        return noise.mul_(255).add_(x).round_().clamp_(0, 255).to(torch.uint8)
    return noise.add_(x)
