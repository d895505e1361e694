"""The initial state of the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from meadow.arrays.named import Arrays
from meadow.config.schema import Experiment
from meadow.tasks.models.stitch import COLUMNS
from meadow.tasks.models.weights import TRUNK, pretrained_trunk
from meadow.tasks.source import source_state
from meadow.tasks.task import open_task


def initial_state(experiment: Experiment) -> Arrays:
    """The model's complete state before the first round, in state_dict order; new arrays at each call. All are float32,
    or float64 if the model is, but a batch normalisation's batch counter, which is int64.

    The heads start at random (`meadow.tasks.models.multihead.build`), and so does the trunk if task.pretrained is empty.
    "source": the trunk of `source_state`. Else the trunk of `meadow.tasks.models.weights.pretrained_trunk`. Raises
    UserError for weights that are missing, unreadable or do not fit.
    """
    task, opened = experiment.task, open_task(experiment)
    state = dict(opened.plain_model().state_dict())
    if task.pretrained == "source":
        source = source_state(experiment)
        state.update({name: torch.from_numpy(source[name]) for name in state if name.startswith(TRUNK)})
    elif task.pretrained:
        state.update(pretrained_trunk(task, {n: t for n, t in state.items() if n.startswith(TRUNK)}))
    if opened.added.kind or opened.two_domains or task.trunks == "cross-stitch":
        whole = dict(opened.new_model().state_dict())
        state = {name: _start(name, state, tensor, bool(task.pretrained)) for name, tensor in whole.items()}
    half = (torch.float16, torch.bfloat16)
    floats = {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in state.items()}
    return {name: tensor.numpy(force=True).copy() for name, tensor in floats.items()}


def _start(name: str, plain: Mapping[str, Tensor], new: Tensor, pretrained: bool) -> Tensor:
    """The initial value of an array of an extended model: the plain trunk's if it has one (coupled trunks take it only if
    pretrained), else `new`."""
    if pretrained and name.startswith(COLUMNS):
        name = TRUNK + name.removeprefix(COLUMNS).partition(".")[2]
    return plain.get(name, new) if name.startswith(TRUNK) else new
