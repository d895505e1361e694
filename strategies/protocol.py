"""The protocol of an algorithm: a client algorithm, a server algorithm, and their inputs and outputs.

In a round, the server sends the shared arrays and the auxiliary ones of `ServerAlgorithm.auxiliary`; each client of the
cohort runs `ClientAlgorithm.train`; the server computes the next model by `ServerAlgorithm.update`. The algorithm
objects are stateless: `update` gets and returns the server's state, and the client stores `ClientResult.memory`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from meadow.arrays.named import Arrays, Kinds
from meadow.config import schema
from meadow.config.rules.rule import Rule
from meadow.strategies.trainable import HEADS


@dataclass(frozen=True)
class Roles:
    """The roles of a model's arrays, by state name. Each array is either shared, personal or fixed.

    shared: sent in every round. personal: trained but never sent; in the client's store. fixed: neither trained nor
    shared; sent once, before the first round. Independently, trained: changed by local training. buffers: changed by no
    gradient (running statistics).
    """

    trained: tuple[str, ...]
    shared: tuple[str, ...]
    personal: tuple[str, ...]
    fixed: tuple[str, ...]
    buffers: tuple[str, ...] = ()

    @property
    def trunk_is_frozen(self) -> bool:
        """Whether local training changes only heads."""
        return all(name.startswith(HEADS) for name in self.trained)

    @property
    def learned_together(self) -> tuple[str, ...]:
        """The shared parameters that local training changes."""
        return tuple(n for n in self.shared if n in set(self.trained) - set(self.buffers))


class Batch(Protocol):
    """Prepared samples: x (n, *shape), and y of each target."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class FitResult:
    """The report of `ClientContext.fit`: the number of optimiser steps, and each target's mean loss over the samples
    seen (empty without any)."""

    steps: int
    losses: dict[str, float]


Correction = Callable[[Mapping[str, nn.Parameter]], None]
"""Changes the final gradients of the learning parameters, by name, before the optimiser's step."""

Term = Callable[[nn.Module, Batch, Mapping[str, Tensor]], Tensor]
"""A scalar added to the loss of a batch, from the model, the batch and the model's outputs on it."""


class Optimizer(Protocol):
    """The methods of an optimiser that algorithms use."""

    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...


class ClientContext(Protocol):
    """One client in one round. Arrays are by state name and must not be written to."""

    @property
    def settings(self) -> schema.Strategy: ...
    @property
    def local(self) -> schema.Local: ...
    @property
    def roles(self) -> Roles: ...
    @property
    def model(self) -> nn.Module:
        """The model that `fit` trains; at first with the arrays of `start`."""
        ...

    @property
    def received(self) -> Arrays:
        """The shared arrays that the server sent."""
        ...

    @property
    def auxiliary(self) -> Mapping[str, Arrays]:
        """The auxiliary arrays that the server sent (`ServerAlgorithm.auxiliary`), by kind and state name."""
        ...

    @property
    def memory(self) -> Mapping[str, Arrays]:
        """The `ClientResult.memory` of this client's last round; empty before the first."""
        ...

    @property
    def size(self) -> int:
        """The number of training samples."""
        ...

    def start(self) -> Arrays:
        """The complete state at the beginning: received, personal and fixed arrays."""
        ...

    def initial(self) -> Arrays:
        """The complete state before the first round. Only for an `Algorithm` with `own_start`."""
        ...

    def load(self, arrays: Arrays) -> None:
        """Load a complete state into the model."""
        ...

    def arrays(self) -> Arrays:
        """Copy the model's complete state."""
        ...

    def fit(
        self,
        *,
        epochs: int = 0,
        repeat: int = 1,
        learns: Callable[[str], bool] | None = None,
        correct: Correction | None = None,
        term: Term | None = None,
        leaves: bool = True,
    ) -> FitResult:
        """Train the model in place, `repeat` times as long as `epochs` or, by default, `[local]` specifies.

        learns: restricts the parameters that learn. leaves: whether the client may send anything that depends on this
        training; if not, DP adds no noise. All calls in a round see the same batches in the same order.
        """
        ...

    def loss(self, model: Callable[[Tensor], Mapping[str, Tensor]], batch: Batch) -> Tensor:
        """The scalar loss of a model's outputs on a batch, as in the training loop."""
        ...

    def batch(self) -> Batch:
        """All training samples of the client."""
        ...

    def optimizer(self, model: nn.Module) -> Optimizer:
        """A new optimiser, configured by `[local]`, for a model with the same parameter names."""
        ...

    def rate(self, name: str) -> float:
        """The learning rate of a parameter."""
        ...

    def class_counts(self) -> dict[str, Tensor]:
        """Training samples of each class, float32 (classes,), for each target that has classes."""
        ...


@dataclass(frozen=True)
class ClientResult:
    """The result of a client's round.

    model: the complete state after training; the client sends its shared arrays and stores its personal ones. fitted:
    the report of `fit`. auxiliary: arrays to send in addition, with the kinds, names, shapes and dtypes that the server
    sent. memory: arrays to store for the client's next round. metrics: numbers to send.
    """

    model: Arrays
    fitted: FitResult
    auxiliary: Kinds = field(default_factory=dict)
    memory: Kinds = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class ClientAlgorithm:
    """The client algorithm. The default is plain local training, and the client uses the received model."""

    def train(self, context: ClientContext) -> ClientResult:
        """Take part in a round."""
        fitted = context.fit()
        return ClientResult(context.arrays(), fitted)

    def steps(self, settings: schema.Strategy, local: schema.Local, size: int) -> int:
        """The number of optimiser steps that `train` reports for `size` training samples."""
        return steps_of(local, size)

    def used(self, context: ClientContext) -> Arrays:
        """The complete state of the model that the client would deploy."""
        return context.start()


@dataclass(frozen=True)
class Setup:
    """The input of a server algorithm. holders: for each array, the number of clients that may ever train it."""

    settings: schema.Strategy
    local: schema.Local
    seed: int
    roles: Roles
    holders: Mapping[str, int]
    equal_weights: bool


@dataclass(frozen=True)
class ClientUpdate:
    """One client's admitted reply. arrays: its shared arrays after training, and auxiliary ones ("c@trunk.w"). weights:
    the weight of each array (`meadow.strategies.roles.name_weights`)."""

    client: int
    round: int
    arrays: Arrays
    weights: Mapping[str, float]
    metrics: Mapping[str, Any]


State = Kinds
"""The state of a server algorithm, by kind and name. Checkpoints contain it, in the same dtypes."""

Replies = TypeVar("Replies", contravariant=True)
"""The input of `update`: a `WeightedSum`, or `Sequence[ClientUpdate]` (`ServerAlgorithm.sums_only`)."""


class ServerAlgorithm(Generic[Replies]):
    """The server algorithm. `model` is the shared arrays as sent. No method may write to its arguments or change
    `self`."""

    sums_only = True
    """Whether `update` gets the cohort's sum of weight times array (`WeightedSum`), auxiliary arrays included.
    Otherwise it gets a list of each client's update, in the order of the clients."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def init(self, model: Arrays) -> State:
        """The state before the first round."""
        return {}

    def auxiliary(self, state: State, model: Arrays) -> Kinds:
        """Auxiliary arrays to send to each client; clients return arrays of the same names, shapes and dtypes."""
        return {}

    def update(self, state: State, total: Replies, model: Arrays) -> tuple[Arrays, State]:
        """Return the next model, with the names, shapes and dtypes of `model`, and the next state. There is at least
        one reply."""
        raise NotImplementedError

    def judge(self, metrics: Mapping[str, Any], size: int) -> str:
        """Return why a reply with these metrics must be rejected, or "". size: the number of samples that the client
        declared."""
        return ""


@dataclass(frozen=True)
class Algorithm:
    """A server algorithm, a client algorithm and their properties.

    Meadow assumes no property that is not declared; settings that need one are then rejected.
    """

    server: Callable[[Setup], ServerAlgorithm[Any]]
    client: ClientAlgorithm = field(default_factory=ClientAlgorithm)
    own_start: bool = False
    """Clients need the state before the first round, to start personal models from; it is sent to each client once."""
    own_model: bool = False
    """Clients also train a personal model (`fit` with leaves = False) and send nothing that depends on it."""
    trains_once: bool | None = None
    """Clients train the model they send once a round, on per-example losses, with corrections that do not depend on
    data, so that DP-SGD can replace this training. None: true if the client algorithm is plain local training."""
    averages: bool = False
    """The server only averages, so that clipping, averaging and noise can replace it."""
    is_plain: bool = False
    """Both parts are FedAvg's, so the algorithm also fits a `run.placement` that combines nothing."""
    sends: Mapping[str, str] = field(default_factory=dict)
    """The kinds of auxiliary arrays that clients send, each with a description."""
    equal_weights: bool = False
    """Clients have equal weights, because the server's state is an unweighted sum over them."""
    needs_plain_sgd: bool = False
    """It computes a mean gradient from a client's update, which requires plain SGD steps."""
    steps_itself: bool = False
    """Clients take steps in addition to the loop's; settings that change only the loop's steps do not affect them."""
    trains_heads: bool = True
    """Local training changes the heads."""
    buckets: bool = False
    """The server supports `strategy.bucket`."""
    least_updates: Callable[[int], int] = lambda byzantine: 1
    """The number of updates that the server needs to withstand `byzantine` attackers among them."""
    rules: tuple[Rule, ...] = ()
    """Settings that it does not support; checked when an experiment is loaded."""
    model_rules: tuple[Rule, ...] = ()
    """Combinations of settings and a model's `Roles` that it does not support."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Its name in reports by `strategy.share`, where it differs from `strategy.name`."""

    @property
    def is_trained_once(self) -> bool:
        """`trains_once`, or its default."""
        return type(self.client) is ClientAlgorithm if self.trains_once is None else self.trains_once


def steps_of(local: schema.Local, size: int, epochs: int = 0) -> int:
    """The number of optimiser steps on `size` samples, for `epochs` or, by default, as `[local]` specifies."""
    batch = min(local.batch_size or size, size)
    return epochs * -(-size // batch) if epochs else local.steps or local.epochs * -(-size // batch)
