"""FedAlt and FedRep, which train personal and shared layers alternately.

FedAlt: Pillutla et al., Federated Learning with Partial Model Personalization (ICML 2022), algorithm 3: for any split,
a client trains its personal layers with the received shared ones, then the shared ones with its new personal ones.
FedRep: Collins et al., Exploiting Shared Representations for Personalized Federated Learning (ICML 2021), algorithm 1:
FedAlt with share = "body": `head_epochs` for the head, then `body_epochs` for the body. Server: FedAvg over the shared
arrays.
"""

from meadow.config.rules.rule import Rule
from meadow.config.schema import Local, Strategy
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult, FitResult, steps_of


class Client(ClientAlgorithm):
    """Trains the personal layers, then the shared ones."""

    def train(self, context: ClientContext) -> ClientResult:
        shared = frozenset(context.roles.shared)
        first = context.fit(epochs=context.settings.head_epochs, learns=lambda name: name not in shared)
        second = context.fit(epochs=context.settings.body_epochs, learns=lambda name: name in shared)
        return ClientResult(context.arrays(), FitResult(first.steps + second.steps, second.losses))

    def steps(self, settings: Strategy, local: Local, size: int) -> int:
        return steps_of(local, size, settings.head_epochs) + steps_of(local, size, settings.body_epochs)


FEDALT = Algorithm(
    FedAvg,
    Client(),
    averages=True,
    rules=(
        Rule(
            ("strategy.share", "local.trainable", "strategy.name"),
            lambda e: e.share in ("all", "trainable") or (e.share == "head" and e.local.trainable == "head"),
            "no array is personal, so there are no two parts to train alternately",
            'write strategy.share = "body"',
            ("strategy.name=fedrep", "strategy.share=all"),
            ("strategy.name=fedrep", "strategy.share=body"),
        ),
    ),
    model_rules=(
        Rule(
            ("local.trainable", "strategy.name"),
            lambda e, roles: e.local.trainable == "gradual",
            "the trunk is frozen at first, and this algorithm trains the trunk separately",
            'write local.trainable = "all"',
            ("strategy.name=fedrep", "strategy.share=body", "local.trainable=gradual"),
            ("strategy.name=fedrep", "strategy.share=body", "local.trainable=last:1"),
        ),
        Rule(
            ("strategy.share", "strategy.name"),
            lambda e, roles: not set(roles.personal) - set(roles.buffers),
            "no personal array learns, so there are no two parts to train alternately",
            'write strategy.share = "body" and local.trainable = "all"',
            ("strategy.name=fedrep", "strategy.share=trunk.*,heads.*"),
            ("strategy.name=fedrep", "strategy.share=trunk.*"),
        ),
    ),
)
