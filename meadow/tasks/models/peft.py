"""Parameter-efficient fine-tuning: LoRA and adapters, small modules added to a model's layers.

They are children of the layer, and a forward hook adds their output to the layer's. So the layer's state names remain
those of pretrained files, and linear layers and convolutions work alike. The peft library would wrap layers, which changes
their names.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.config import schema
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_seeded

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
"""The layers that modules can be added to."""


@dataclass(frozen=True)
class Added:
    """The modules added to each layer of the trunk: none, low-rank factors, or adapters; `size`: rank or bottleneck."""

    kind: Literal["", "lora", "series", "parallel"] = ""
    size: int = 1
    scale: float = 1.0


def added(local: schema.Local) -> Added:
    """The modules that `local.trainable` adds to a model."""
    if local.trainable == "lora":
        return Added("lora", local.lora_rank, local.lora_alpha / local.lora_rank)
    if local.trainable == "adapters":
        return Added(local.adapter_place, local.adapter_size)
    return Added()


def extend(model: nn.Module, what: Added, seed: int) -> nn.Module:
    """Add modules to each linear layer and convolution of the model's trunk, in place; outputs are unchanged at first.

    lora (Hu et al. 2022, equation 3): W x + scale B A x, with A from torch's default initialisation and B = 0; for
    convolutions A has the same kernel, stride and groups and `size` channels per group, and B is a 1x1 convolution.
    Adapters: a bottleneck of `size` units with `up` = 0, added to the layer's output h. series (Houlsby et al. 2019; for
    convolutions Rebuffi et al. 2017): h + up(relu(down(h))); parallel (He et al. 2022): h + up(relu(down(x))) of the
    layer's input x. Weights depend on (seed, "init", kind, layer). Layers with no more weights than the module (depthwise
    convolutions) are skipped. Raises UserError if all are.
    """
    if not what.kind:
        return model
    changed, layers = 0, list(_layers(model.get_submodule("trunk")))
    if not layers:
        raise UserError(
            f'local.trainable = "{"lora" if what.kind == "lora" else "adapters"}": the trunk of this model has no linear '
            'layer or convolution to add modules to; write local.trainable = "all", "last:1" or "head"'
        )
    for name, layer in layers:
        with torch_seeded(seed, "init", what.kind, name):
            parts = _low_rank(layer, what) if what.kind == "lora" else {"adapter": _adapter(layer, what)}
        if sum(p.numel() for part in parts.values() for p in part.parameters()) >= layer.weight.numel():
            continue
        for key, part in parts.items():
            layer.add_module(key, part)
        lora, parallel = what.kind == "lora", what.kind == "parallel"
        layer.register_forward_hook(partial(_add_low_rank, what.scale) if lora else partial(_add_adapter, parallel))
        changed += 1
    if not changed:
        setting = "local.lora_rank" if what.kind == "lora" else "local.adapter_size"
        raise UserError(
            f"{setting} = {what.size}: no layer of this model has more weights than the added module; "
            f'write a smaller number, or local.trainable = "all"'
        )
    return model


def merged(state: Arrays, scale: float) -> Arrays:
    """Merge the low-rank factors of a state into the weights, W + scale B A.

    The plain model with the result computes the same as the extended model with `state`.
    """
    result = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        place = name.removesuffix("weight")
        if name.endswith("weight") and f"{place}lora_a.weight" in state:
            a, b = (torch.from_numpy(state[f"{place}lora_{part}.weight"]).double() for part in "ab")
            groups = a.shape[0] // b.shape[1]  # B of a grouped convolution is per group
            rows = torch.stack(
                [x @ y for x, y in zip(b.flatten(1).chunk(groups), a.flatten(1).chunk(groups), strict=True)]
            )
            value = (torch.from_numpy(value).double() + scale * rows.reshape(value.shape)).to(torch.float32).numpy()
        result[name] = value
    return result


def _add_low_rank(scale: float, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of a layer with low-rank factors."""
    low = cast(nn.Module, layer.lora_a)(inputs[0])
    return output + scale * cast(Tensor, cast(nn.Module, layer.lora_b)(low))


def _add_adapter(parallel: bool, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of a layer with an adapter."""
    return output + cast(Tensor, cast(nn.Module, layer.adapter)(inputs[0] if parallel else output))


def _layers(trunk: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, module in trunk.named_modules():
        # Attention reads its output layer's weights without calling the layer, so a hook would have no effect.
        if isinstance(module, Layer) and type(module).__name__ != "NonDynamicallyQuantizableLinear":
            yield name, module


def _low_rank(layer: Layer, what: Added) -> dict[str, nn.Module]:
    down, up = _narrow(layer, what.size, bias=False), _widen(layer, what.size, bias=False)
    nn.init.zeros_(up.weight)
    return {"lora_a": down, "lora_b": up}


def _adapter(layer: Layer, what: Added) -> nn.Module:
    if what.kind == "parallel":
        down = _narrow(layer, what.size, bias=True)
    elif isinstance(layer, nn.Linear):
        down = nn.Linear(layer.out_features, what.size)
    else:
        down = _convolution(layer)(layer.out_channels, what.size * layer.groups, 1, groups=layer.groups)
    up = _widen(layer, what.size, bias=True)
    nn.init.zeros_(up.weight)
    nn.init.zeros_(cast(Tensor, up.bias))
    return nn.Sequential(OrderedDict[str, nn.Module](down=down, relu=nn.ReLU(), up=up))


def _narrow(layer: Layer, size: int, bias: bool) -> Layer:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, size, bias)
    same = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    return _convolution(layer)(layer.in_channels, size * layer.groups, *same, bias, layer.padding_mode)


def _widen(layer: Layer, size: int, bias: bool) -> Layer:
    if isinstance(layer, nn.Linear):
        return nn.Linear(size, layer.out_features, bias)
    return _convolution(layer)(size * layer.groups, layer.out_channels, 1, groups=layer.groups, bias=bias)


def _convolution(layer: nn.Conv1d | nn.Conv2d) -> Callable[..., nn.Conv1d | nn.Conv2d]:
    return nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
