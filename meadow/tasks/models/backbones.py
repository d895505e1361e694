"""Other people's models as trunks: torchvision's classification models by name, and encoders of `transformers`."""

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
    """The classification models that this torchvision has."""
    models = torchvision().models
    return tuple(models.list_models(module=models))


def torchvision_trunk(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """The model of that name, randomly initialised, without its classifier: its last linear layer is made the identity,
    and all else keeps torchvision's names. SqueezeNet, which classifies by a convolution, gives its pooled features.

    Batches are not counted (`num_batches_tracked`): only a cumulative average would ask for it, and the state is to be of
    numbers that can be averaged. With task.norm = "group" each batch normalisation is made a GroupNorm by Opacus.
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
        from opacus.validators import ModuleValidator  # takes a second to import

        model = cast(nn.Module, ModuleValidator.fix(model))
    _takes(model, task, inputs)
    return model, width


def without_counters(model: nn.Module) -> nn.Module:
    """The model, whose batch normalisations no longer count batches."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_batches_tracked = None
    return model


def _takes(model: nn.Module, task: Task, inputs: Inputs) -> None:
    """Raise UserError unless a sample of this shape goes through; in `eval()`, so that nothing in the model changes."""
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *inputs.shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f'task.model = "{task.model}" cannot take images of {inputs.shape[1]}x{inputs.shape[2]} pixels '
            f"({str(error).splitlines()[0]}): set task.image_size larger, 224 is what it was made for"
        ) from None
    finally:
        model.train()


class Encoder(nn.Module):
    """A BERT-like encoder: tokens int64 (n, length), 0 where there is none -> the last state of the first token
    ([CLS]), (n, width)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._samples = 0
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._for_each_sample)

    def _for_each_sample(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Positions are the same in all samples, so the library looks them up once a batch, as one row: then no sample's
        share of their gradient could be told (`meadow.privacy.dpsgd.book`). Here every sample looks up its own."""
        ids, *others = inputs
        return (ids.expand(self._samples, -1), *others) if ids.ndim == 2 and len(ids) == 1 else inputs

    def forward(self, x: Tensor) -> Tensor:
        self._samples = len(x)
        states = self.encoder(input_ids=x, attention_mask=(x != 0).long()).last_hidden_state
        return cast(Tensor, states[:, 0])


def transformers_trunk(task: Task, inputs: Inputs) -> tuple[nn.Module, int]:
    """The encoder in a local folder or on the Hugging Face hub, `transformers:NAME`, with random weights."""
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
    """The published weights of that encoder, by our names."""
    model = _of_transformers(task, lambda library, name: library.AutoModel.from_pretrained(name))
    return {f"encoder.{name}": tensor for name, tensor in _plain(model).state_dict().items()}


def _plain(model: Any) -> nn.Module:
    if hasattr(model, "pooler"):
        model.pooler = None  # a second head that nothing here uses
    return cast(nn.Module, model)


def _of_transformers(task: Task, get: Callable[[Any, str], Any]) -> Any:
    torchvision()  # transformers imports it in its own way, which fails beside some builds of torch
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"task.model = \"{task.model}\" needs the package transformers: pip install -e '.[transformers]'"
        ) from None
    try:
        return get(transformers, task.model.removeprefix(TRANSFORMERS))
    except (OSError, ValueError) as error:
        raise UserError(f'task.model = "{task.model}": {str(error).splitlines()[0]}') from None
