"""FedRoD: Chen and Chao, On Bridging Generic and Personalized Federated Learning for Image Classification (ICLR 2022),
section 4 (linear personalised heads).

Client: trunk and generic head are trained on the balanced softmax loss (Ren et al. 2020): cross-entropy of the logits
plus log(n_c), for the client's class counts n_c. A personal head is trained on the trunk's features, without gradients
into them, so that the sum of both heads' logits has a low plain loss. Server: FedAvg over trunk and generic head.

The client uses one head, whose weights are the sum of both. The personal head starts at zero, so a client without one
uses the generic model. Classes that the client lacks get log(1e-9) instead of log(0). Targets without classes have no
balanced loss, only a personal head.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meadow.arrays.named import Arrays, Named
from meadow.config.rules.rule import Rule
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import watch
from meadow.strategies.protocol import Algorithm, Batch, ClientAlgorithm, ClientContext, ClientResult

ABSENT = 1e-9


class Client(ClientAlgorithm):
    """The loop trains the generic model; a second optimiser trains the personal heads, the client's memory."""

    def train(self, context: ClientContext) -> ClientResult:
        generic = context.model.get_submodule("heads")
        own = _personal(generic, context.memory.get("own", {}))
        by_name = dict(own.named_parameters())
        optimizer = context.optimizer(own)
        priors = {target: torch.log(counts.clamp(min=ABSENT)) for target, counts in context.class_counts().items()}
        batches: list[Batch] = []
        features: list[Tensor] = []
        balanced = True

        def head_hook(target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                features[:] = [inputs[0].detach()]
                return output + priors[target].to(output.device) if balanced and target in priors else output

            return hook

        def step_own(learning: Mapping[str, nn.Parameter]) -> None:
            nonlocal balanced
            sums = {f"model.{n}": p.detach() + by_name[n] for n, p in context.model.named_parameters() if n in by_name}
            both = partial(functional_call, _OnFeatures(context.model), sums)
            optimizer.zero_grad()
            balanced = False
            found = context.loss(lambda _: both((features[-1],)), batches[-1])
            balanced = True
            gradients = torch.autograd.grad(found, list(by_name.values()))
            for parameter, gradient in zip(by_name.values(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

        hooks = [module.register_forward_hook(head_hook(target)) for target, module in generic.named_children()]
        try:
            fitted = context.fit(term=watch(batches), correct=step_own)
        finally:
            for hook in hooks:
                hook.remove()
        kept = {name: p.detach().numpy(force=True).copy() for name, p in by_name.items()}
        return ClientResult(context.arrays(), fitted, memory={"own": kept})

    def used(self, context: ClientContext) -> Arrays:
        start = context.start()
        return start | (Named(context.memory.get("own", {})) + Named(start)).like(start)


def _personal(heads: nn.Module, memory: Arrays) -> nn.Module:
    """The personal heads, with the state names of the generic ones; zeros where `memory` has none."""
    own = nn.ModuleDict({"heads": copy.deepcopy(heads)})
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(True)
            parameter.copy_(torch.from_numpy(memory[name]) if name in memory else torch.zeros_like(parameter))
    return own


class _OnFeatures(nn.Module):
    """Applies a model's heads to features. With a frozen trunk, the model itself already does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = getattr(self.model, "on_features", self.model)(features)
        return result


FEDROD = Algorithm(
    FedAvg,
    Client(),
    averages=True,
    steps_itself=True,
    rules=(
        Rule(
            ("task.gated", "strategy.name"),
            lambda e: e.task.gated,
            "gated heads cannot be added up",
            "write task.gated = false",
            ("strategy.name=fedrod", "task.gated=true"),
            ("strategy.name=fedrod",),
        ),
    ),
)
