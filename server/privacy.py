"""Makes the protection that `[privacy]` asks for, and refuses tasks that it cannot protect."""

import torch
from torch import Tensor, nn

from meadow.config.schema import Experiment
from meadow.privacy.dpsgd.choose import chosen_mode
from meadow.privacy.dpsgd.mechanism import Mechanism
from meadow.privacy.dpsgd.step import Privatiser, refuse_what_mixes_samples
from meadow.privacy.noise import Stream
from meadow.runtime.errors import UserError
from meadow.server.client_level import client_level
from meadow.server.protection import Ledgers, Protection
from meadow.strategies.protocol import Roles
from meadow.tasks.task import Task


def protection(experiment: Experiment, task: Task, roles: Roles) -> Protection:
    """The protection that `[privacy]` asks for. Raises UserError if it does not work with this task's model or losses."""
    unit = experiment.privacy.unit
    if unit != "none":
        _refuse_unprotectable(experiment, task, roles)
    if unit == "client":
        return client_level(experiment, [name for name in roles.shared if name in roles.trained])
    return (Protection if unit == "none" else Ledgers)(experiment)


def _rehearse(task: Task, model: nn.Module) -> None:
    """Compute the private gradient of an empty sample by Opacus. Raises UserError if it cannot take the model apart."""
    x = task.prepare(torch.zeros_like(task.dataset.train.x[:1]))

    def losses(_: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = model(x)
        return torch.stack([output.sum() for output in outputs.values()]).sum().reshape(1)

    noise = Stream(0)
    with Privatiser(model, Mechanism(1, 0, 1, 1, 1), noise, noise, "hooks") as trial:
        trial.gradients(torch.tensor([0]), losses)


def _refuse_unprotectable(experiment: Experiment, task: Task, roles: Roles) -> None:
    for target in task.targets:
        if target.balanced:
            raise UserError(
                f'privacy.unit = "{experiment.privacy.unit}": the target {target.name} weights its classes by counts of '
                "the private labels; write the weights as constants in task.kinds"
            )
    model = task.new_model()
    parameters = dict(model.named_parameters())
    if experiment.privacy.unit == "example":
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in roles.trained)
        for place, module in model.named_modules():  # as `meadow.client.loop.trainable.freeze` does
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            module.training = any((f"{place}.{name}" if place else name) in roles.trained for name, _ in own)
            if experiment.local.statistics == "kept" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        refuse_what_mixes_samples(model)
        if chosen_mode(model, experiment.privacy.grad_sample) == "hooks":  # the others take what they are chosen for
            _rehearse(task, model)
        return
    for name in roles.shared:
        if name in roles.trained and name not in parameters:
            raise UserError(
                f'privacy.unit = "{experiment.privacy.unit}": the shared "{name}" is not a parameter but a statistic of the '
                'private data, which noise would make useless; write task.norm = "group", or do not share it'
            )
