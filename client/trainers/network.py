"""Read a model as a list of layers that the kernels know (`client/trainers/kernel.py`), or say why it is not one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from meadow.tasks.data import Target
from meadow.tasks.features import Heads
from meadow.tasks.models.multihead import Multihead
from meadow.tasks.models.networks import FEATURE_NORM_SQUARED, BoundedFeatures, HalfOfTime, MeanAndMaximum


class Unknown(Exception):
    """The model has a part that no kernel knows; the training loop trains it."""


@dataclass(frozen=True)
class Layer:
    """A layer of the trunk, with the activation that follows it. weight, bias: state names, or "".

    before, after: the shape of a sample in front of and behind it: (c, h, w) of an image, (c, 1, w) of a sensor window,
    (c, 1, 1) of flat features. kernel: of a convolution (with `padding`) or a pooling. groups, eps: of a normalisation.
    scale: the factor of BoundedFeatures. ceil: whether a pooling has windows that reach over the edge.
    """

    kind: Literal["linear", "conv", "pool", "norm", "bounded", "flatten", "over time"]
    before: tuple[int, int, int]
    after: tuple[int, int, int]
    weight: str = ""
    bias: str = ""
    activation: Literal["", "relu", "tanh"] = ""
    kernel: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    eps: float = 0.0
    scale: float = 1.0
    ceil: bool = False


@dataclass(frozen=True)
class Network:
    """A model as layers and heads, one for each target.

    features: the input width of the heads. importance: each target's weight in the loss. shape: of one sample. image:
    whether the first layer sees an image or a sensor window; else samples are flattened. shapes: of all arrays of the
    model's state, in its order.
    """

    layers: tuple[Layer, ...]
    features: int
    targets: tuple[Target, ...]
    importance: tuple[float, ...]
    shape: tuple[int, ...]
    image: bool
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def windows(self) -> bool:
        """Whether samples are sensor windows, (channels, time)."""
        return self.image and len(self.shape) == 2

    @property
    def heads(self) -> list[tuple[str, str]]:
        """State names of each head's weight and bias."""
        return [(f"heads.{t.name}.weight", f"heads.{t.name}.bias") for t in self.targets]


_ACTIVATIONS: dict[type[nn.Module], Literal["relu", "tanh"]] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


def network(
    model: nn.Module, shape: tuple[int, ...], targets: Sequence[Target], importance: Sequence[float]
) -> Network:
    """The network of a model for samples of this shape. Raises Unknown unless the model is a sequence of known layers and
    linear heads for class and value targets."""
    if type(model) not in (Multihead, Heads):
        raise Unknown("the model does not consist of a trunk and heads")
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise Unknown("its parameters are not float32")
    modules = list(_flattened("trunk", model.trunk)) if isinstance(model, Multihead) else []
    image = len(shape) in (2, 3) and bool(modules) and not isinstance(modules[0][1], nn.Flatten)
    at = (shape[0], 1 if len(shape) == 2 else shape[1], shape[-1]) if image else (math.prod(shape), 1, 1)
    first_is_image, layers = image, list[Layer]()
    for number, (place, module) in enumerate(modules):
        if number == 0 and isinstance(module, nn.Flatten):
            continue
        if type(module) in _ACTIVATIONS:
            # ReLU and max pooling commute: the maximum after ReLU is ReLU of the maximum, and at 0 no gradient passes.
            of = -2 if len(layers) > 1 and layers[-1].kind == "pool" and type(module) is nn.ReLU else -1
            if not layers or layers[of].activation or layers[of].kind not in ("linear", "conv", "norm"):
                raise Unknown(f"{place} does not follow a linear layer, a convolution or a normalisation")
            layers[of] = replace(layers[of], activation=_ACTIVATIONS[type(module)])
            continue
        layer = _layer(module, at, place, image, len(shape) == 2)
        weight, bias = (f"{place}.{n}" if getattr(module, n, None) is not None else "" for n in ("weight", "bias"))
        layers.append(replace(layer, weight=weight, bias=bias))
        at, image = layer.after, image and layer.kind not in ("flatten", "over time")
    if image:
        raise Unknown("the trunk's features are not flat")
    heads = cast(Mapping[str, nn.Module], model.heads)
    for target in targets:
        head = heads[target.name]
        if type(head) is not nn.Linear or head.in_features != at[0] or head.bias is None:
            raise Unknown(f"the head of {target.name} is not a linear layer")
        if target.kind not in ("class", "value"):
            raise Unknown(f"the target {target.name} is neither a class nor a value")
    state = model.state_dict()
    found = Network(
        tuple(layers), at[0], tuple(targets), tuple(importance), shape, first_is_image,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
    )  # fmt: skip
    known = {n for layer in layers for n in (layer.weight, layer.bias)} | {n for pair in found.heads for n in pair}
    if other := [name for name in state if name not in known]:
        raise Unknown(f"{other[0]} belongs to no known layer")
    return found


def _flattened(place: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            yield from _flattened(f"{place}.{name}", child)
    else:
        yield place, module


def _layer(module: nn.Module, before: tuple[int, int, int], place: str, image: bool, window: bool) -> Layer:
    """The layer of a module, with its output shape. Raises Unknown."""
    c, h, w = before
    if image and type(module) is (nn.Conv1d if window else nn.Conv2d):
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        (kh, kw), stride, dilation = ((1, *side)[-2:] for side in (module.kernel_size, module.stride, module.dilation))
        plain = stride == dilation == (1, 1) and module.groups == 1 and module.padding_mode == "zeros"
        ph, pw = (kh, kw) if isinstance(module.padding, str) else (0, *module.padding)[-2:]
        if not plain or ph >= kh or pw >= kw:
            raise Unknown(f"{place} is a convolution with stride, groups, dilation or wide padding")
        after = (module.out_channels, h + 2 * ph - kh + 1, w + 2 * pw - kw + 1)
        return Layer("conv", before, after, kernel=(kh, kw), padding=(ph, pw))
    if image and window and type(module) is HalfOfTime:
        return Layer("pool", before, (c, 1, w // 2), kernel=(1, 2))
    if image and window and type(module) is MeanAndMaximum:
        return Layer("over time", before, (2 * c, 1, 1))
    if type(module) is nn.Linear and not image and module.in_features == c:
        return Layer("linear", before, (module.out_features, 1, 1))
    if type(module) is nn.MaxPool2d and image:
        kernel = _pair(module.kernel_size)
        if _pair(module.stride) != kernel or _pair(module.padding) != (0, 0) or _pair(module.dilation) != (1, 1):
            raise Unknown(f"{place} is a pooling with overlapping windows, dilation or padding")
        whole = math.ceil if module.ceil_mode else math.floor
        after = (c, whole(h / kernel[0]), whole(w / kernel[1]))
        return Layer("pool", before, after, kernel=kernel, ceil=module.ceil_mode)
    if type(module) is nn.GroupNorm and image and module.affine:
        return Layer("norm", before, before, groups=module.num_groups, eps=module.eps)
    if type(module) is BoundedFeatures and not image:
        return Layer("bounded", before, before, eps=1e-5, scale=math.sqrt(FEATURE_NORM_SQUARED / c))
    if type(module) is nn.Flatten and image and (module.start_dim, module.end_dim) == (1, -1):
        return Layer("flatten", before, (c * h * w, 1, 1))
    raise Unknown(f"{place} is a {type(module).__name__}, which is not a known layer here")


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, tuple) else (int(value), int(value))
