"""FedBABU: Oh, Kim and Yun, Toward Enhanced Representation for Federated Image Classification (ICLR 2022), algorithm 1.

Only the body is trained and averaged; all clients have the same random head, which never changes
(`Algorithm.trains_heads`). After training, each client fine-tunes the whole model: `evaluate.fine_tune_epochs`.
"""

from meadow.config.rules.rule import Rule
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult


class Client(ClientAlgorithm):
    """Trains only the body."""

    def train(self, context: ClientContext) -> ClientResult:
        body = frozenset(context.roles.trained)
        fitted = context.fit(learns=body.__contains__)
        return ClientResult(context.arrays(), fitted)


FEDBABU = Algorithm(
    FedAvg,
    Client(),
    trains_once=True,
    averages=True,
    trains_heads=False,
    rules=(
        Rule(
            ("local.trainable", "strategy.name"),
            lambda e: e.local.trainable in ("head", "last:0", "gradual"),
            "it trains the trunk from round 1 on",
            'write local.trainable = "all"',
            ("strategy.name=fedbabu", "local.trainable=head"),
            ("strategy.name=fedbabu", "local.trainable=last:1"),
        ),
        Rule(
            ("strategy.share", "strategy.name"),
            lambda e: e.strategy.share == "head",
            "its head never changes, so clients would learn nothing together",
            'write strategy.share = "body"',
            ("strategy.name=fedbabu", "strategy.share=head"),
            ("strategy.name=fedbabu", "strategy.share=body"),
        ),
    ),
)
