"""Finds the arrays of normalisation layers, which FedBN keeps with the client."""

from torch import nn


def norms(model: nn.Module) -> tuple[str, ...]:
    """The state names, statistics included, of a model's normalisation layers. The type decides, not the layer's
    name."""
    prefixes = [name for name, module in model.named_modules() if _is_norm(module)]
    return tuple(n for n in model.state_dict() if n.rpartition(".")[0] in prefixes)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a torch normalisation layer, or its class name ends with "Norm" (transformers' RMS norms)."""
    torchs = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, torchs) or type(module).__name__.rstrip("1234d").endswith("Norm")
