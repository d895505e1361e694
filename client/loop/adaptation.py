"""Domain adaptation in local training (`[adapt]`): add labelled source samples and a term that aligns the two domains.

A batch has as many source samples as target samples, the source samples first. The data's loss uses the source labels; it
uses the target labels only with adapt.labels = "both".
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.client.loop.alignment import coral, deep_coral, domain_classifier, mmd, reversal_strength, reversed_gradient
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_generator, torch_seeded
from meadow.tasks.data import MISSING, Data
from meadow.tasks.features import Heads
from meadow.tasks.models.multihead import Multihead, augmented
from meadow.tasks.task import Task


class Adaptation:
    """One client's adaptation in one round."""

    MEMORY = "adapt/"

    def __init__(
        self, experiment: Experiment, task: Task, source: Data, data: Data, round_: int, client: int, memory: Arrays
    ) -> None:
        self.plan, self.seed, self.path = experiment.adapt, experiment.run.seed, (round_, client)
        self.rounds, self.task = experiment.run.rounds, task
        self.source = self._recoloured(source, data) if self.plan.method == "coral" else source
        self.paired = self.plan.method == "match"
        self.memory = {n.removeprefix(self.MEMORY): v for n, v in memory.items() if n.startswith(self.MEMORY)}
        self.classifier: nn.Module | None = None
        self.labels: Mapping[str, Tensor] = source.y
        if self.plan.labels == "both":
            self.labels = {name: torch.cat([source.y[name], data.y[name]]) for name in source.y}
        self._passes, self._queue = 0, torch.empty(0, dtype=torch.int64)
        self._sources = 0

    def open(self, model: nn.Module) -> list[nn.Parameter]:
        """Make the domain classifier as the last round left it, and return its parameters; none for other methods."""
        if self.plan.method != "dann":
            return []
        with torch.no_grad():
            width = self._features(model.eval(), self.task.prepare(self.source.x[:1])).shape[1]
        with torch_seeded(self.seed, "init", "domain"):
            self.classifier = domain_classifier(width, self.plan.dann_hidden).to(self.source.x.device)
        if self.memory:
            self.classifier.load_state_dict({n: torch.from_numpy(v) for n, v in self.memory.items()})
        return list(self.classifier.parameters())

    def batch(self, index: Tensor, own: Data) -> Data:
        """The batch of a step: source samples, and `own`, the target samples at `index` of the client's data."""
        source = self.source.take(index if self.paired else self._next(len(own)))
        self._sources = len(source)
        if self.plan.method in ("coral", "source-only") and self.plan.labels == "source":
            return source  # no term looks at the target samples of a step
        y = {name: own.y[name] for name in source.y}
        if self.plan.labels == "source":
            y = {n: torch.full_like(v, torch.nan if v.is_floating_point() else MISSING) for n, v in y.items()}
        return Data(torch.cat([source.x, own.x]), {n: torch.cat([v, y[n]]) for n, v in source.y.items()})

    def outputs(self, model: nn.Module, x: Tensor, done: float) -> tuple[dict[str, Tensor], Tensor | None]:
        """The model's outputs for the prepared batch x, and the alignment loss, a scalar or None. `done`: the finished share
        of the round."""
        features = self._features(model, x)
        k, seen = self._sources, features
        if self.plan.method == "augment":
            seen = torch.cat([augmented(features[:k], source=True), augmented(features[k:], source=False)])
        assert isinstance(model, Multihead | Heads)
        return model.on_features(seen), self._term(features, done)

    def _features(self, model: nn.Module, x: Tensor) -> Tensor:
        features: Tensor = model.trunk(x) if isinstance(model, Multihead) else x
        if features.ndim != 2 and self.plan.method not in ("coral", "source-only"):
            raise UserError(
                f'adapt.method = "{self.plan.method}" with task.model = "{self.task.settings.model}": its features '
                "belong to single tokens, and only features of whole samples can be aligned; use another model"
            )
        return features

    def _term(self, features: Tensor, done: float) -> Tensor | None:
        source, target = features[: self._sources], features[self._sources :]
        method = self.plan.method
        if method == "mmd":
            value = mmd(source, target, self.plan.widths)
        elif method == "deep-coral":
            value = deep_coral(source, target)
        elif method == "match":
            value = (source - target).pow(2).sum(1).mean()
        elif self.classifier is not None:
            progress = (min(self.path[0], self.rounds) - 1 + done) / self.rounds
            strength = reversal_strength(progress, self.plan.dann_gamma)
            logits = self.classifier(reversed_gradient(features, strength)).squeeze(1)
            truth = (torch.arange(len(logits), device=logits.device) >= len(source)).to(logits.dtype)
            value = F.binary_cross_entropy_with_logits(logits, truth)
        else:
            return None
        return self.plan.weight * value

    def remember(self) -> Arrays:
        """The state for the client's next round: the domain classifier's arrays."""
        if self.classifier is None:
            return {}
        return {self.MEMORY + n: v.numpy(force=True).copy() for n, v in self.classifier.state_dict().items()}

    def _next(self, count: int) -> Tensor:
        """The next `count` indices of source samples, in passes over all of them, each in a new random order."""
        while len(self._queue) < count:
            draw = torch_generator(self.seed, "source-shuffle", *self.path, self._passes)
            self._queue = torch.cat([self._queue, torch.randperm(len(self.source), generator=draw)])
            self._passes += 1
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken

    def _recoloured(self, source: Data, data: Data) -> Data:
        if not data.x.is_floating_point():
            raise UserError(
                f'adapt.method = "coral" with task.dataset = "{self.task.dataset.name}": it needs floating-point '
                "samples, and stored images and tokens are integers; write adapt.method = "
                '"deep-coral", or local.trainable = "head" to recolour the features'
            )
        flat = coral(source.x.flatten(1), data.x.flatten(1), self.plan.ridge)
        return Data(flat.view_as(source.x), source.y)


def adaptation(
    experiment: Experiment, task: Task, source: Data | None, data: Data, round_: int, client: int, memory: Arrays
) -> Adaptation | None:
    """The adaptation of `[adapt]`, or None."""
    if experiment.adapt.method == "none" or source is None:
        return None
    return Adaptation(experiment, task, source, data, round_, client, memory)
