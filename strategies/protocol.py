"""The two halves of an algorithm, and what each is given: the server's half is a Flower strategy, the client's is here.

A client's half is asked twice. `train` is the client's turn in a round: it gets a `Turn`, trains by `Turn.fit`, which
is the one training loop with its hooks, and says what came of it. `used` says which model the client would use, for
evaluation. A half has no state of its own: what must last goes into `Outcome.memory`, which the client stores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.serverapp.strategy import Strategy
from meadow.strategies.roles import Roles
from torch import Tensor, nn

from meadow.arrays.named import Arrays
from meadow.config import schema


class Batch(Protocol):
    """Prepared samples: x (n, *shape), and y for each target."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> dict[str, Tensor]: ...


class Fitted(Protocol):
    """What the training loop reports: optimiser steps, and for each target its mean loss."""

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


class Turn(Protocol):
    """What a client's half is given for one client in one round. Arrays are by state name; none may be written to."""

    @property
    def settings(self) -> schema.Strategy: ...
    @property
    def local(self) -> schema.Local: ...
    @property
    def roles(self) -> Roles: ...
    @property
    def model(self) -> nn.Module:
        """The model that `fit` trains. It holds what `start` returns when the turn begins."""
        ...

    @property
    def received(self) -> Arrays:
        """The shared arrays as the server sent them."""
        ...

    @property
    def extra(self) -> Arrays: ...

    """What the server sent beside them ("c@trunk.w")."""

    @property
    def memory(self) -> Arrays:
        """What this client's last turn left in `Outcome.memory`; empty before the first."""
        ...

    @property
    def size(self) -> int:
        """Training samples."""
        ...

    def start(self) -> Arrays:
        """The model's whole state as the client begins: what was received, its own personal layers, and what is fixed."""
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
    ) -> Fitted:
        """Train the model in place by the one training loop: for `epochs`, else as long as `[local]` says, times `repeat`.

        `learns` narrows the parameters that learn. Two calls in one turn see the same batches in the same order. `leaves`:
        whether anything that comes of it may leave the client; what does not is trained without noise under DP.
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
class Outcome:
    """What came of a client's turn. Of `model`, the whole state, the client sends what is shared and stores what is
    personal. `extra` is sent beside it, under the names that the server sent; `memory` is stored beside it. Names of both
    carry what they are and of what (`meadow.arrays.named.beside`). `metrics` go with the reply."""

    model: Arrays
    fitted: Fitted
    extra: Arrays = field(default_factory=dict)
    memory: Arrays = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Half:
    """The client's half of an algorithm; this one is plain local training, and the model used is the one received."""

    def train(self, turn: Turn) -> Outcome:
        """Take part in a round."""
        fitted = turn.fit()
        return Outcome(turn.arrays(), fitted)

    def steps(self, settings: schema.Strategy, local: schema.Local, size: int) -> int:
        """Optimiser steps that `train` takes on `size` training samples, as its outcome reports them."""
        return steps_of(local, size)

    def used(self, turn: Turn) -> Arrays:
        """The whole state of the model that the client would use, given what it now has and last received."""
        return turn.start()


@dataclass(frozen=True)
class Setup:
    """What the server's half is made with. holders: for each array's name, how many clients may ever train it."""

    settings: schema.Strategy
    local: schema.Local
    seed: int
    roles: Roles
    holders: Mapping[str, int]
    equal_weights: bool


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: how to make the server's half, and the client's half.

    own_start: clients start a model of their own from the state before the first round, which is then sent to each once.
    """

    server: Callable[[Setup], Strategy]
    client: Half = field(default_factory=Half)
    own_start: bool = False


def steps_of(local: schema.Local, size: int, epochs: int = 0) -> int:
    """Optimiser steps of one training on `size` samples, as long as `[local]` says, or for so many epochs."""
    batch = min(local.batch_size or size, size)
    return epochs * -(-size // batch) if epochs else local.steps or local.epochs * -(-size // batch)
