"""Choose what of a model learns: set `requires_grad` of parameters and modes of modules, and mask entries."""

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meadow.client.loop.fisher import empirical_fisher
from meadow.config.schema import Experiment
from meadow.runtime.module_cache import cached
from meadow.runtime.seeds import one_thread
from meadow.strategies.trainable import HEADS
from meadow.tasks.evaluation import device_of, load_into
from meadow.tasks.source import source_data, source_model
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task


def freeze(model: nn.Module, learns: Collection[str], statistics: str = "batch") -> dict[str, nn.Parameter]:
    """Let only the arrays of these names learn, and return those parameters by name.

    A module whose parameters are all frozen is in `eval()`, with its submodules; a module whose own arrays are all frozen
    is in `eval()` alone. So frozen normalisations keep their statistics, and a frozen trunk has no dropout. `statistics`:
    as `local.statistics`; with "kept" every batch normalisation is in `eval()`, though its weight and bias learn.
    """
    key = frozenset(learns), statistics
    flags = cached(model, key, lambda: _flags(model, *key))
    for parameter, learning in flags.learns:
        parameter.requires_grad = learning
    for module, training in flags.training:
        module.training = training
    return dict(flags.learning)


@dataclass(frozen=True)
class _Flags:
    """The flags that `freeze` sets, and the parameters that it returns."""

    learns: tuple[tuple[nn.Parameter, bool], ...]
    training: tuple[tuple[nn.Module, bool], ...]
    learning: Mapping[str, nn.Parameter]


def _flags(model: nn.Module, learns: frozenset[str], statistics: str) -> _Flags:
    named = tuple((p, name in learns) for name, p in model.named_parameters())
    flag = {id(p): learning for p, learning in named}
    still: set[int] = set()
    for place, module in model.named_modules():
        parameters = list(module.parameters())
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        frozen = parameters and not any(flag[id(p)] for p in parameters)
        if frozen or (statistics == "kept" and isinstance(module, nn.modules.batchnorm._BatchNorm)):
            still |= {id(inner) for inner in module.modules()}
        elif own and not any((f"{place}.{name}" if place else name) in learns for name, _ in own):
            still.add(id(module))
    training = tuple((module, id(module) not in still) for module in model.modules())
    return _Flags(named, training, {name: p for name, p in model.named_parameters() if name in learns})


@dataclass(frozen=True)
class Mask:
    """True for each entry that may change, by parameter name; parameters without a mask change freely."""

    entries: Mapping[str, Tensor]
    start: Mapping[str, Tensor]

    def correct(self, learning: Mapping[str, nn.Parameter]) -> None:
        """Set the gradients of all other entries to 0."""
        for name, parameter in learning.items():
            if name in self.entries and parameter.grad is not None:
                parameter.grad.masked_fill_(~self.entries[name], 0.0)

    def restore(self, learning: Mapping[str, nn.Parameter]) -> None:
        """Restore the bits of all other entries, which weight decay may have moved."""
        with torch.no_grad():
            for name, parameter in learning.items():
                if name in self.entries:
                    parameter.copy_(torch.where(self.entries[name], parameter, self.start[name]))


def mask(model: nn.Module, experiment: Experiment, client: int) -> Mask | None:
    """The mask of trainable = "fisher" for the model's present values; None under every other setting.

    FISH mask (Sung et al. 2021, equation 4): the `fisher_fraction` of all the trunk's entries with the largest empirical
    Fisher information; of equal entries the first. The heads, which are new, learn as a whole.
    """
    if experiment.local.trainable != "fisher":
        return None
    chosen = _entries(experiment, client if experiment.local.fisher_on == "local" else None)
    entries = {name: entry.to(device_of(model)) for name, entry in chosen.items()}
    return Mask(entries, {n: p.detach().clone() for n, p in model.named_parameters() if n in entries})


def top(fisher: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """True for the ceil(fraction * number) largest entries of all arrays; of equal entries the first."""
    flat = torch.cat([value.flatten() for value in fisher.values()])
    chosen = torch.zeros(flat.shape, dtype=torch.bool)
    chosen[torch.sort(flat, descending=True, stable=True).indices[: math.ceil(fraction * len(flat))]] = True
    parts = torch.split(chosen, [value.numel() for value in fisher.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(fisher.items(), parts, strict=True)}


@functools.lru_cache(maxsize=128)
def _entries(experiment: Experiment, client: int | None) -> Mapping[str, Tensor]:
    """The mask, a function of the experiment and, with fisher_on = "local", of the client; never of the round."""
    task, samples = open_task(experiment), experiment.local.fisher_samples
    with one_thread():
        if client is None:
            model = source_model(experiment)
            data = source_data(experiment).train
        else:
            model = task.new_model()
            load_into(model, initial_state(experiment))
            data = task.pool() if experiment.run.placement == "pooled" else task.client(client).train
        fisher = empirical_fisher(model, data, task, samples)
    return top({n: v for n, v in fisher.items() if not n.startswith(HEADS)}, experiment.local.fisher_fraction)
