"""Third-party trunks: torchvision's classification models by name, and encoders of `transformers`."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.tasks.data import Inputs
from meadow.tasks.models.vision import torchvision

TRANSFORMERS = "transformers:"


@functools.cache
def torchvision_names() -> tuple[str, ...]:
    """The classification models of the installed torchvision."""
    models = torchvision().models
    return tuple(models.list_models(module=models))


def torchvision_trunk(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """Build a torchvision model with random weights and without its classifier: the identity replaces its last linear
    layer, and names are torchvision's. SqueezeNet, whose classifier is a convolution, returns its pooled features.

    Batch normalisations do not count batches (`num_batches_tracked`), because the state must be possible to average. With
    task.norm = "group" Opacus replaces each batch normalisation with a GroupNorm.
    """
    if len(inputs.shape) != 3 or inputs.shape[0] != 3 or inputs.tokens:
        raise UserError(
            f'task.model = "{task.model}" needs colour images (3, height, width), not samples of shape {inputs.shape}: for '
            'grey images write task.channels = "rgb"; else use another model'
        )
    settings = {"aux_logits": False, "init_weights": True} if task.model in ("googlenet", "inception_v3") else {}
    model = cast(nn.Module, torchvision().models.get_model(task.model, weights=None, **settings))
    if task.model.startswith("squeezenet"):
        model.classifier = nn.AdaptiveAvgPool2d(1)
        width = 512
    else:
        name, last = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        model.set_submodule(name, nn.Identity())
        width = last.in_features
    model = without_counters(model)
    if task.norm == "group":
        from opacus.validators import ModuleValidator  # takes 1 s to import

        model = cast(nn.Module, ModuleValidator.fix(model))
    _check_size(model, task, inputs)
    return model, width


def without_counters(model: nn.Module) -> nn.Module:
    """Make the model's batch normalisations not count batches, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_batches_tracked = None
    return model


def _check_size(model: nn.Module, task: Task, inputs: Inputs) -> None:
    """Raise UserError unless the model accepts this shape; tried in `eval()`, so that the model does not change."""
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *inputs.shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f'task.model = "{task.model}" cannot take images of {inputs.shape[1]}x{inputs.shape[2]} pixels '
            f"({str(error).splitlines()[0]}): write a larger task.image_size; it was made for 224"
        ) from None
    finally:
        model.train()


class Encoder(nn.Module):
    """A BERT-like encoder: tokens int64 (n, length), padded with 0 -> the last state of the first token ([CLS]),
    (n, width)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._samples = 0
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._for_each_sample)

    def _for_each_sample(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Look up positions for every sample. The library does it once per batch, because they are the same in all samples,
        but then there is no per-example gradient (`meadow.privacy.dpsgd.book`)."""
        ids, *others = inputs
        return (ids.expand(self._samples, -1), *others) if ids.ndim == 2 and len(ids) == 1 else inputs

    def forward(self, x: Tensor) -> Tensor:
        self._samples = len(x)
        states = self.encoder(input_ids=x, attention_mask=(x != 0).long()).last_hidden_state
        return cast(Tensor, states[:, 0])


def transformers_trunk(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """Build the encoder `transformers:NAME`, from a local folder or the Hugging Face hub, with random weights."""
    config = _of_transformers(task, lambda library, name: library.AutoConfig.from_pretrained(name))
    if not inputs.tokens:
        raise UserError(f'task.model = "{task.model}" needs tokens: use it with text')
    if getattr(config, "pad_token_id", 0) != 0:
        raise UserError(f'task.model = "{task.model}" pads with token {config.pad_token_id}; Meadow pads with 0')
    if config.vocab_size < inputs.tokens:
        raise UserError(
            f'task.model = "{task.model}" knows {config.vocab_size} tokens, the texts have {inputs.tokens}: write '
            f'task.tokens = "{task.model}", or a task.vocabulary_size of at most that'
        )
    model = _of_transformers(task, lambda library, name: library.AutoModel.from_config(config))
    return Encoder(_plain(model)), int(config.hidden_size)


def transformers_weights(task: Task) -> dict[str, Tensor]:
    """The published weights of that encoder, by the names in `Encoder`."""
    model = _of_transformers(task, lambda library, name: library.AutoModel.from_pretrained(name))
    return {f"encoder.{name}": tensor for name, tensor in _plain(model).state_dict().items()}


def _plain(model: Any) -> nn.Module:
    if hasattr(model, "pooler"):
        model.pooler = None  # an unused head
    return cast(nn.Module, model)


def _of_transformers(task: Task, get: Callable[[Any, str], Any]) -> Any:
    return from_transformers("task.model", task.model, get)


def from_transformers(setting: str, value: str, get: Callable[[Any, str], Any]) -> Any:
    """What `get(library, NAME)` returns for a setting's value `transformers:NAME`. Raises UserError if it cannot be had."""
    torchvision()  # transformers' own import of it fails with some builds of torch
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{setting} = \"{value}\" needs the package transformers: pip install -e '.[transformers]'"
        ) from None
    try:
        return get(transformers, value.removeprefix(TRANSFORMERS))
    except (OSError, ValueError) as error:
        raise UserError(f'{setting} = "{value}": {str(error).splitlines()[0]}') from None
