"""FedRoD: Chen and Chao, On Bridging Generic and Personalized Federated Learning for Image Classification (ICLR 2022),
section 4 (linear personalised heads).

Client: body and generic head are trained on the balanced softmax loss (Ren et al. 2020), cross-entropy of the logits
plus log(n_c) of the client's class counts; and a personal head, on the body's features with no gradient into them, so
that the sum of both heads' logits has a low plain loss. Server: the average of FedAvg over body and generic head.

The model used adds the two heads up: two linear heads on the same features are one whose weights are their sum. The
personal head starts at zero, so that a client without one uses the generic model. A class that the client has not gets
log(1e-9) in the place of log 0. Targets without classes have no balanced loss, and their personal head alone is new.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.corrections import watch
from meadow.strategies.protocol import Algorithm, Batch, ClientAlgorithm, ClientContext, ClientResult
from torch import Tensor, nn
from torch.func import functional_call

from meadow.arrays.named import Arrays, Named
from meadow.config.rules.rule import Rule

ABSENT = 1e-9


class Client(ClientAlgorithm):
    """The loop trains the generic model; the personal heads, the client's memory, take their step beside it."""

    def train(self, context: ClientContext) -> ClientResult:
        generic = context.model.get_submodule("heads")
        own = _Own(copy.deepcopy(generic), context.memory.get("own", {}))
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
            sums = {f"model.{n}": p.detach() + q for n, p in context.model.named_parameters() for q in own.of(n)}
            both = partial(functional_call, _OnFeatures(context.model), sums)
            optimizer.zero_grad()
            balanced = False
            found = context.loss(lambda _: both((features[-1],)), batches[-1])
            balanced = True
            for parameter, slope in zip(
                own.parameters(), torch.autograd.grad(found, list(own.parameters())), strict=True
            ):
                parameter.grad = slope
            optimizer.step()

        hooks = [module.register_forward_hook(head_hook(target)) for target, module in generic.named_children()]
        try:
            fitted = context.fit(term=watch(batches), correct=step_own)
        finally:
            for hook in hooks:
                hook.remove()
        kept = {name: p.detach().numpy(force=True).copy() for name, p in own.named_parameters()}
        return ClientResult(context.arrays(), fitted, memory={"own": kept})

    def used(self, context: ClientContext) -> Arrays:
        start = context.start()
        return start | (Named(context.memory.get("own", {})) + Named(start)).like(start)


class _Own(nn.Module):
    """The personal heads, under the names of the generic ones."""

    def __init__(self, heads: nn.Module, memory: Arrays) -> None:
        super().__init__()
        self.heads = heads
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(True)
                parameter.copy_(torch.from_numpy(memory[name]) if name in memory else torch.zeros_like(parameter))
        self._by_name = dict(self.named_parameters())

    def of(self, name: str) -> list[nn.Parameter]:
        """The parameter of that name, if there is one."""
        return [self._by_name[name]] if name in self._by_name else []


class _OnFeatures(nn.Module):
    """A model's heads on given features; a view of a model with a frozen trunk is that already."""

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
            "two gated heads do not add up to one",
            "write task.gated = false",
            ("strategy.name=fedrod", "task.gated=true"),
            ("strategy.name=fedrod",),
        ),
    ),
)
