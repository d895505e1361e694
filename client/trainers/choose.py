"""Which clients kernels train that are faster than the training loop, and what these are given.

With `engine.exact` a client's bits depend on nothing but its samples and torch (`client/trainers/direct.py`). Without
it, on a CPU compiled code trains one client after another (`client/trainers/fused.py`), whose bits are the compiler's
too; on a GPU all clients of a block train at once on stacked parameters (`client/trainers/stacked.py`). All take the
samples in the loop's order and differ from it in the order of sums alone; tests/client/test_direct.py and
tests/client/test_fast.py say by how much. What none covers, the loop trains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from meadow.client.loop.optimisers import scheduled
from meadow.client.loop.training import Trained
from meadow.client.trainers.direct import Direct
from meadow.client.trainers.fused import Fused
from meadow.client.trainers.network import Kernels, Member, Unknown, network
from meadow.client.trainers.stacked import Stacked
from meadow.strategies.protocol import steps_of
from meadow.strategies.trainable import rate_factors, trained

from meadow.arrays.memory import Recent
from meadow.config.schema import Experiment, Local
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_generator
from meadow.tasks.data import Data
from meadow.tasks.features import View
from meadow.tasks.losses import class_weights
from meadow.tasks.task import Task

KEPT = 2**28
"""Bytes of prepared samples that are kept, of the clients that came last."""


def why_not(experiment: Experiment) -> str:
    """Why the settings leave all training to the loop, or ""."""
    local, anchor = experiment.local, experiment.anchor
    checks = {
        f'privacy.unit = "{experiment.privacy.unit}"': experiment.privacy.unit == "example",
        f'local.optimizer = "{local.optimizer}"': local.optimizer != "sgd",
        f'local.balance = "{local.balance}"': local.balance != "fixed",
        f'local.trainable = "{local.trainable}"': local.trainable in ("gradual", "lora", "adapters", "fisher"),
        f'local.schedule = "{local.schedule}"': local.schedule == "plateau",
        f'adapt.method = "{experiment.adapt.method}"': experiment.adapt.method != "none",
        "anchor.l2, ewc, kl or distill": bool(anchor.l2 or anchor.ewc or anchor.kl or anchor.distill),
        "task.augment": bool(experiment.task.augment),
        f"local.batch_size = {local.batch_size}": not 0 < local.batch_size <= 512,
        f"local.clip_norm = {local.clip_norm}": bool(local.clip_norm),
        f"local.patience = {local.patience}": bool(local.patience),
        f"local.label_smoothing = {local.label_smoothing}": bool(local.label_smoothing),
    }
    return next((setting for setting, holds in checks.items() if holds), "")


def check_device(experiment: Experiment) -> None:
    """Raise UserError for a device that this machine has not."""
    if experiment.engine.device == "cuda" and not torch.cuda.is_available():
        raise UserError('engine.device = "cuda": torch finds no GPU here; write engine.device = "cpu"')


def fast(experiment: Experiment, seen: View) -> "Fast | str":
    """What trains this view's model faster, or why nothing does. Raises UserError for a device that is not there."""
    check_device(experiment)
    if reason := why_not(experiment):
        return reason
    task, engine, reason = seen.task, experiment.engine, ""
    try:
        if seen.trunk is not None:
            raise Unknown("the trunk is frozen, and the heads cost little")
        found = network(seen.model, tuple(task.dataset.test.x.shape[1:]), task.targets, task.weights)
        if engine.device == "cuda":
            return Fast(experiment, task, Stacked(found, experiment.local, engine))
        if not engine.exact:
            try:
                return Fast(experiment, task, Fused(found, experiment.local))
            except Unknown as fault:
                reason = str(fault)
        return Fast(experiment, task, Direct(found, experiment.local), reason)
    except Unknown as fault:
        return reason or str(fault)


def told(experiment: Experiment, found: "Fast | str") -> str:
    """What trains: "loop", "direct", "fused" or "stacked", with the reason if faster ones were allowed."""
    title, reason = (found.kernels.title, found.reason) if isinstance(found, Fast) else ("loop", found)
    return title if experiment.engine.exact or not reason else f"{title}: {reason}"


@dataclass(frozen=True)
class Fast:
    """Kernels for one experiment's model, and the clients' samples as they take them."""

    experiment: Experiment
    task: Task
    kernels: Kernels
    reason: str = ""
    """Why no faster ones train, that were allowed."""
    _kept: Recent[int, tuple[Data, Data, Sequence[torch.Tensor | None]]] = field(
        default_factory=lambda: Recent(KEPT), repr=False, compare=False
    )

    def covers(self, data: Data) -> bool:
        """Whether a client with these labels can be trained."""
        weights = class_weights(self.task.targets, data.y)
        names = [t.name for t in self.task.targets]
        return self.kernels.covers([data.y[name] for name in names], [weights.get(name) for name in names])

    def member(self, data: Data, round_: int, client: int, plan: Local, epochs: int = 0) -> Member:
        """A client for one training, as long as `plan` says or for so many epochs: the loop's batches in its order."""
        steps, size = steps_of(plan, len(data), epochs), min(plan.batch_size, len(data))
        rounds = -(-steps // -(-len(data) // size))
        seed = self.experiment.run.seed
        draws = (torch_generator(seed, "shuffle", round_, client, epoch) for epoch in range(rounds))
        order = torch.stack([torch.randperm(len(data), generator=draw) for draw in draws])
        kept = self._kept.get(client)
        if kept is not None and kept[0] is data:
            _, own, by_class = kept
        else:
            weights = class_weights(self.task.targets, data.y)
            by_class = [weights.get(t.name) for t in self.task.targets]
            own = Data(self.task.prepare(data.x), data.y)
            if self.kernels.keeps_samples:
                own = Data(own.x.contiguous(), data.y)
                self._kept.put(client, (data, own, by_class), own.nbytes)
        return Member(client, own.x, [own.y[t.name] for t in self.task.targets], by_class, order, size, steps)

    def rates(self, round_: int, plan: Local, learns: Callable[[str], bool] | None = None) -> dict[str, float]:
        """The learning rate of each array that learns in a round."""
        names = list(self.kernels.network.shapes)
        now = plan.lr * scheduled(plan, round_, self.experiment.run.rounds)
        factors = rate_factors(plan, names)
        learning = trained(self.experiment, names)
        return {n: now * factors[n] for n in names if n in learning and (learns is None or learns(n))}

    def trained(self, member: Member, losses: Sequence[float]) -> Trained:
        """What the loop would report of a member's training."""
        samples, per = len(member.x), -(-len(member.x) // member.batch)
        whole, rest = divmod(member.steps, per)
        seen = whole * samples + min(rest * member.batch, samples)
        names = [t.name for t in self.task.targets]
        return Trained(member.steps, {name: loss / seen for name, loss in zip(names, losses, strict=True)})
