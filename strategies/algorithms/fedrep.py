"""FedAlt and FedRep: personal and shared layers in turns.

FedAlt: Pillutla et al., Federated Learning with Partial Model Personalization (ICML 2022), algorithm 3: for any split,
a client trains its personal layers with the shared ones as received, and then the shared ones with its new personal
ones. FedRep: Collins et al., Exploiting Shared Representations for Personalized Federated Learning (ICML 2021),
algorithm 1: that with share = "body": `head_epochs` for the head first, then `body_epochs` for the body. Server: the
average of FedAvg over the shared arrays.
"""

from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult, steps_of

from meadow.config.rules.rule import Rule
from meadow.config.schema import Local, Strategy


class Client(ClientAlgorithm):
    """First what is personal, then what is shared; the half that does not learn keeps its bits."""

    def train(self, context: ClientContext) -> ClientResult:
        shared = frozenset(context.roles.shared)
        first = context.fit(epochs=context.settings.head_epochs, learns=lambda name: name not in shared)
        second = context.fit(epochs=context.settings.body_epochs, learns=lambda name: name in shared)
        return ClientResult(context.arrays(), _Both(first.steps + second.steps, second.losses))

    def steps(self, settings: Strategy, local: Local, size: int) -> int:
        return steps_of(local, size, settings.head_epochs) + steps_of(local, size, settings.body_epochs)


class _Both:
    """The report of both phases: their steps together, and the losses of the second."""

    def __init__(self, steps: int, losses: dict[str, float]) -> None:
        self.steps = steps
        self.losses = losses


FEDALT = Algorithm(
    FedAvg,
    Client(),
    averages=True,
    rules=(
        Rule(
            ("strategy.share", "local.trainable", "strategy.name"),
            lambda e: e.share in ("all", "trainable") or (e.share == "head" and e.local.trainable == "head"),
            "nothing is personal, so there are no two parts to train in turns",
            'write strategy.share = "body"',
            ("strategy.name=fedrep", "strategy.share=all"),
            ("strategy.name=fedrep", "strategy.share=body"),
        ),
    ),
    model_rules=(
        Rule(
            ("local.trainable", "strategy.name"),
            lambda e, roles: e.local.trainable == "gradual",
            "at first nothing of the trunk learns, and this algorithm trains the trunk by itself",
            'write local.trainable = "all"',
        ),
        Rule(
            ("strategy.share", "strategy.name"),
            lambda e, roles: not set(roles.personal) - set(roles.buffers),
            "nothing is personal that learns, so there are no two parts to train in turns",
            'write strategy.share = "body" and local.trainable = "all"',
        ),
    ),
)
