"""What an algorithm is: its client's part, its server's part, and what each part is given.

A round of an algorithm is: the server sends the shared arrays, and beside them what `ServerAlgorithm.auxiliary` says;
each client of the cohort runs `ClientAlgorithm.train`; the server makes the next model by `ServerAlgorithm.update`.
Neither part keeps anything in itself. What the server's part keeps is its state, a value that goes into `update` and
comes out of it; what a client's part keeps is `ClientResult.memory`, which the client stores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from meadow.strategies.trainable import HEADS
from torch import Tensor, nn

from meadow.arrays.named import Arrays, Kinds
from meadow.config import schema
from meadow.config.rules.rule import Rule


@dataclass(frozen=True)
class Roles:
    """The names of a model's state, divided. `shared`, `personal` and `fixed` are disjoint and complete.

    shared: travel in every round. personal: trained, never travel, live in the client's store. fixed: neither trained
    nor shared; they arrive once, before the first round. `trained` and `buffers` cut across: what local training
    changes; what no gradient changes (running statistics).
    """

    trained: tuple[str, ...]
    shared: tuple[str, ...]
    personal: tuple[str, ...]
    fixed: tuple[str, ...]
    buffers: tuple[str, ...] = ()

    @property
    def trunk_is_frozen(self) -> bool:
        """Whether local training changes heads alone."""
        return all(name.startswith(HEADS) for name in self.trained)

    @property
    def learned_together(self) -> tuple[str, ...]:
        """The shared parameters that local training changes: what a correction of their gradients is about."""
        return tuple(n for n in self.shared if n in set(self.trained) - set(self.buffers))


class Batch(Protocol):
    """Prepared samples: x (n, *shape), and y for each target."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> dict[str, Tensor]: ...


class FitResult(Protocol):
    """What one call of `ClientContext.fit` reports: optimiser steps, and for each target its mean loss."""

    @property
    def steps(self) -> int: ...
    @property
    def losses(self) -> dict[str, float]: ...


Correction = Callable[[Mapping[str, nn.Parameter]], None]
"""Changes the gradients of the parameters that learn, by name, after they are final, before the optimiser's step."""

Term = Callable[[nn.Module, Batch, Mapping[str, Tensor]], Tensor]
"""A term beside the loss of a batch: of the model, the batch and the model's outputs on it, a scalar."""


class Optimizer(Protocol):
    """An optimiser, as far as an algorithm uses it."""

    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...


class ClientContext(Protocol):
    """One client in one round, as its algorithm sees it. Arrays are by state name; none may be written to."""

    @property
    def settings(self) -> schema.Strategy: ...
    @property
    def local(self) -> schema.Local: ...
    @property
    def roles(self) -> Roles: ...
    @property
    def model(self) -> nn.Module:
        """The model that `fit` trains. It holds what `start` returns when the round begins."""
        ...

    @property
    def received(self) -> Arrays:
        """The shared arrays as the server sent them."""
        ...

    @property
    def auxiliary(self) -> Mapping[str, Arrays]:
        """What the server sent beside the shared arrays (`ServerAlgorithm.auxiliary`), by kind and state name."""
        ...

    @property
    def memory(self) -> Mapping[str, Arrays]:
        """What this client's last round left in `ClientResult.memory`; empty before the first."""
        ...

    @property
    def size(self) -> int:
        """Training samples."""
        ...

    def start(self) -> Arrays:
        """The model's whole state as the client begins: what was received, its own personal layers, and what is
        fixed."""
        ...

    def initial(self) -> Arrays:
        """The whole state before the first round. Only for an `Algorithm` with `own_start`."""
        ...

    def load(self, arrays: Arrays) -> None:
        """Put a whole state into the model."""
        ...

    def arrays(self) -> Arrays:
        """A copy of the model's whole state."""
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
        """Train the model in place: for `epochs`, else as long as `[local]` says, times `repeat`.

        `learns` narrows the parameters that learn. Two calls in one round see the same batches in the same order.
        `leaves`: whether anything that comes of it may leave the client; what does not is trained without noise under
        DP.
        """
        ...

    def loss(self, model: Callable[[Tensor], Mapping[str, Tensor]], batch: Batch) -> Tensor:
        """The loss of a model's outputs on a batch, as the loop computes it, a scalar."""
        ...

    def batch(self) -> Batch:
        """All training samples of the client, prepared."""
        ...

    def optimizer(self, model: nn.Module) -> Optimizer:
        """A fresh optimiser of `[local]` over a model with the same names."""
        ...

    def rate(self, name: str) -> float:
        """The learning rate of a parameter."""
        ...

    def class_counts(self) -> dict[str, Tensor]:
        """Training samples of each class, float32 (classes,), for each target that has classes."""
        ...


@dataclass(frozen=True)
class ClientResult:
    """What came of a client's round.

    model: the whole state after training; the client sends what is shared of it and stores what is personal. fitted:
    the loop's report. auxiliary: what is sent beside the model, under the kinds and names that the server sent, in
    their shapes and dtypes. memory: what the client stores for its next round. metrics: numbers that go with the reply.
    """

    model: Arrays
    fitted: FitResult
    auxiliary: Kinds = field(default_factory=dict)
    memory: Kinds = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class ClientAlgorithm:
    """A client's part of an algorithm. This one is plain local training, and the model used is the one received."""

    def train(self, context: ClientContext) -> ClientResult:
        """Take part in a round."""
        fitted = context.fit()
        return ClientResult(context.arrays(), fitted)

    def steps(self, settings: schema.Strategy, local: schema.Local, size: int) -> int:
        """Optimiser steps that `train` takes on `size` training samples, as its result reports them."""
        return steps_of(local, size)

    def used(self, context: ClientContext) -> Arrays:
        """The whole state of the model that the client would use, given what it now has and last received."""
        return context.start()


@dataclass(frozen=True)
class Setup:
    """What the server's part is made with. holders: for each array's name, how many clients may ever train it."""

    settings: schema.Strategy
    local: schema.Local
    seed: int
    roles: Roles
    holders: Mapping[str, int]
    equal_weights: bool


@dataclass(frozen=True)
class ClientUpdate:
    """One client's admitted reply. arrays: its shared arrays after training, auxiliary ones beside them ("c@trunk.w").
    weights: for each array's name, what it counts (`meadow.strategies.roles.name_weights`)."""

    client: int
    round: int
    arrays: Arrays
    weights: Mapping[str, float]
    metrics: Mapping[str, Any]


State = Kinds
"""What a server's part keeps from round to round, by kind and name. It goes into checkpoints, in the same dtypes."""

Replies = TypeVar("Replies", contravariant=True)
"""What `update` is given: a `WeightedSum`, or `Sequence[ClientUpdate]` (`ServerAlgorithm.sums_only`)."""


class ServerAlgorithm(Generic[Replies]):
    """The server's part of an algorithm: functions of the state, the replies and the model, the shared arrays as sent.

    No method may write to an array that it is given, or change `self`.
    """

    sums_only = True
    """Whether `update` gets the sum over the cohort of weight times array (`WeightedSum`), auxiliary arrays among them.
    If not, it gets each client's update, in the order of the clients."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def init(self, model: Arrays) -> State:
        """The state before the first round."""
        return {}

    def auxiliary(self, state: State, model: Arrays) -> Kinds:
        """What is sent to each client beside the model; each array comes back under its name, in its shape and
        dtype."""
        return {}

    def update(self, state: State, total: Replies, model: Arrays) -> tuple[Arrays, State]:
        """The next model, with the names, shapes and dtypes of `model`, and the next state. There is one reply or
        more."""
        raise NotImplementedError

    def judge(self, metrics: Mapping[str, Any], size: int) -> str:
        """Why a reply with these metrics cannot count, or "". `size`: training samples that the client declared."""
        return ""


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: how to make the server's part, the client's part, and what is true of them.

    What is not said is not presumed: an algorithm that says nothing runs wherever no promise of its own is needed.
    """

    server: Callable[[Setup], ServerAlgorithm[Any]]
    client: ClientAlgorithm = field(default_factory=ClientAlgorithm)
    own_start: bool = False
    """Clients start a model of their own from the state before the first round, which is then sent to each once."""
    own_model: bool = False
    """Clients train a model of their own beside the shared one (`fit` with leaves = False), and nothing of it
    leaves."""
    trains_once: bool | None = None
    """Clients train what they send once a round, by each sample's own loss, with corrections that see no data: so
    DP-SGD can take the place of that training. None: if the client's part is plain local training."""
    averages: bool = False
    """The server's part is a mean of what clients send, and nothing beside it: so clip and noise can take its place."""
    is_plain: bool = False
    """Both parts are FedAvg's, so nothing is lost where nothing is combined (`run.placement`)."""
    sends: Mapping[str, str] = field(default_factory=dict)
    """What clients send beside the model: for each kind of auxiliary array, what it is, in words."""
    equal_weights: bool = False
    """Each client counts 1: the server's state is a plain sum over clients."""
    needs_plain_sgd: bool = False
    """A client's whole move is turned back into a mean gradient, which is known for plain steps of SGD alone."""
    steps_itself: bool = False
    """Clients take steps of their own beside the loop's: what changes the loop's steps alone has no part in them."""
    trains_heads: bool = True
    """Local training changes the heads."""
    buckets: bool = False
    """The server averages updates in buckets of `strategy.bucket`."""
    least_updates: Callable[[int], int] = lambda byzantine: 1
    """How many updates the server needs to withstand so many attackers among them."""
    rules: tuple[Rule, ...] = ()
    """What it does not go together with, asked when an experiment is read."""
    model_rules: tuple[Rule, ...] = ()
    """What it does not go together with, asked of the experiment and a model's `Roles`."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """What reports call it, by `strategy.share`, where that is not `strategy.name`."""

    @property
    def is_trained_once(self) -> bool:
        """`trains_once`, or what the client's part says where that is not said."""
        return type(self.client) is ClientAlgorithm if self.trains_once is None else self.trains_once


def steps_of(local: schema.Local, size: int, epochs: int = 0) -> int:
    """Optimiser steps of one training on `size` samples, as long as `[local]` says, or for so many epochs."""
    batch = min(local.batch_size or size, size)
    return epochs * -(-size // batch) if epochs else local.steps or local.epochs * -(-size // batch)
