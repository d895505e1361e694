"""MOON: Li, He and Song, Model-Contrastive Federated Learning (CVPR 2021), equation 3 and algorithm 1.

Client: loss + mu * l_con, where z is a sample's representation (the trunk's output), z_glob that of the received model,
z_prev that of the client's own model after its last round, l_con = -log( exp(sim(z, z_glob)/T) / (exp(sim(z, z_glob)/T)
+ exp(sim(z, z_prev)/T)) ), and sim the cosine. In a client's first round there is no z_prev and no term (the authors'
code has z_prev = z_glob then, so l_con is always log 2). Server: FedAvg. The representation of a token sequence is the
mean over tokens.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meadow.config.rules.rule import Rule
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, Batch, ClientAlgorithm, ClientContext, ClientResult
from meadow.strategies.trainable import HEADS


class Client(ClientAlgorithm):
    """Trains with the contrastive term; keeps the new trunk for the next round."""

    def train(self, context: ClientContext) -> ClientResult:
        previous = context.memory.get("previous", {})
        settings, trunk = context.settings, context.model.get_submodule("trunk")
        start = context.start()
        anchors = [_frozen(context, trunk, start), _frozen(context, trunk, start | previous)] if previous else []
        features: list[Tensor] = []

        def contrast(model: nn.Module, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
            z = _pooled(features[-1])
            with torch.no_grad():
                others = [_pooled(anchor(batch.x)) for anchor in anchors]
            logits = torch.stack([F.cosine_similarity(z, other) for other in others], 1) / settings.temperature
            return settings.mu * F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.int64, device=z.device))

        hook = trunk.register_forward_hook(lambda module, inputs, output: features.__setitem__(slice(None), [output]))
        try:
            fitted = context.fit(term=contrast if anchors else None)
        finally:
            hook.remove()
        model = context.arrays()
        body = {name: value for name, value in model.items() if not name.startswith(HEADS)}
        return ClientResult(model, fitted, memory={"previous": body})


def _frozen(context: ClientContext, trunk: nn.Module, state: Mapping[str, object]) -> nn.Module:
    """A copy of the trunk with this state, in evaluation mode."""
    result = copy.deepcopy(trunk).eval()
    own = {n: torch.as_tensor(state[f"trunk.{n}"]) for n in result.state_dict()}
    result.load_state_dict(own)
    return result


def _pooled(z: Tensor) -> Tensor:
    return z.mean(1) if z.ndim == 3 else z.flatten(1)


MOON = Algorithm(
    FedAvg,
    Client(),
    averages=True,
    rules=(
        Rule(
            ("local.trainable", "strategy.name"),
            lambda e: e.local.trainable in ("head", "last:0"),
            "it trains the trunk from round 1 on",
            'write local.trainable = "all"',
            ("strategy.name=moon", "local.trainable=head"),
            ("strategy.name=moon", "local.trainable=last:1"),
        ),
    ),
    model_rules=(
        Rule(
            ("local.trainable", "strategy.name"),
            lambda e, roles: roles.trunk_is_frozen,
            "it trains the trunk",
            'write local.trainable = "all", or strategy.name = "fedavg"',
            ("strategy.name=moon", "local.trainable=gradual", "run.rounds=1"),
            ("strategy.name=moon", "local.trainable=gradual", "run.rounds=2"),
        ),
    ),
)
