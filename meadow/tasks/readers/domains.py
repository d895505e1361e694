"""The source domain of `[adapt]`: labelled samples of another domain, with the same shape and targets."""

import functools
import re

import numpy as np
import numpy.typing as npt
import torch

from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.data import Data
from meadow.tasks.readers.datasets import open_dataset
from meadow.tasks.source import source_data
from meadow.tasks.task import Task, open_task


def source_samples(experiment: Experiment, client: int | None) -> Data:
    """The labelled source samples that a client trains with; `client` None: pooled training.

    adapt.where = "public": all samples. "clients": a share for each client, drawn from the seed; all if pooled. With
    method = "match": those paired with the client's training samples, in the same order. Raises UserError as
    `open_dataset`, and for samples or targets that do not match the task's.
    """
    source, clients = _source(experiment), experiment.partition.clients
    task = open_task(experiment)
    if experiment.adapt.method == "match":
        return source.take(torch.from_numpy(_partners(task, client, len(source))))
    if experiment.adapt.where == "public" or client is None:
        return source
    order = numpy_generator(experiment.run.seed, "source-shares").permutation(len(source))
    own = np.sort(order[len(source) * client // clients : len(source) * (client + 1) // clients])
    if len(own) == 0:
        raise UserError(
            f'adapt.where = "clients": {len(source)} source samples are not enough for {clients} clients; write '
            'adapt.where = "public"'
        )
    return source.take(torch.from_numpy(own))


def _partners(task: Task, client: int | None, sources: int) -> npt.NDArray[np.int64]:
    clients = range(len(task.split.clients)) if client is None else [client]
    index = np.concatenate([task.split.clients[each].train for each in clients])
    if sources != len(task.dataset.train) or index.min(initial=0) < 0:
        raise UserError(
            f'adapt.method = "match" pairs the i-th source sample with the i-th sample of the training pool, but these '
            f"have {sources} and {len(task.dataset.train)} samples; use paired data, or another method"
        )
    return index.astype(np.int64)


@functools.lru_cache(maxsize=2)
def _source(experiment: Experiment) -> Data:
    adapt, task = experiment.adapt, open_task(experiment)
    names = adapt.targets or experiment.task.targets
    if len(names) != len(experiment.task.targets):
        raise UserError(
            f"adapt.targets = {list(names)}: name the source's column for each of task.targets = "
            f"{list(experiment.task.targets)}, in order"
        )
    if not adapt.dataset:
        data = source_data(experiment).train
        sizes = {t.name: (t.kind, t.size) for t in task.targets}
    else:
        other = {"dataset": adapt.dataset, "root": adapt.root, "train": adapt.train, "test": "", "client": ""}
        settings = experiment.task.model_copy(update={**other, "targets": names})
        try:
            dataset = open_dataset(settings)
        except UserError as error:  # the reader names [task], the settings are those of [adapt]
            raise UserError(re.sub(r"task\.(dataset|root|train|targets)\b", r"adapt.\1", str(error))) from None
        data = dataset.train
        renamed = dict(zip(experiment.task.targets, names, strict=True))
        data = Data(data.x, {name: data.y[renamed[name]] for name in experiment.task.targets})
        of = {t.name: t for t in dataset.targets}
        sizes = {t.name: (of[renamed[t.name]].kind, of[renamed[t.name]].size) for t in task.targets}
    wanted = {t.name: (t.kind, t.size) for t in task.targets}
    x = task.dataset.train.x
    if data.x.shape[1:] != x.shape[1:] or data.x.dtype != x.dtype or sizes != wanted:
        raise UserError(
            f'adapt.dataset = "{adapt.dataset}": its samples are {tuple(data.x.shape[1:])} {data.x.dtype} with {sizes}, '
            f"the clients' {tuple(x.shape[1:])} {x.dtype} with {wanted}: make them agree by task.image_size and "
            "task.channels (used for both), task.kinds and adapt.targets"
        )
    return Data(data.x, {t.name: data.y[t.name] for t in task.targets})
