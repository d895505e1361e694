"""The built-in stages, which settings add: attacks, noise of local DP, norm bound, untrained heads.

Clipping and noise of client-level DP are `meadow.server.client_level`, because only the server has their secret.
"""

from collections.abc import Sequence

from meadow.arrays.named import Arrays
from meadow.arrays.sums import length
from meadow.config.schema import Experiment
from meadow.privacy.releases import Quantity
from meadow.strategies.attacks import attack, attackers
from meadow.strategies.stages.stage import Arrived, AtClient, Left, Stage


class BuiltIn(Stage):
    """A stage whose releases `meadow.privacy.releases` lists with the model's arrays."""

    def releases(self, experiment: Experiment) -> Sequence[Quantity]:
        return ()


class TrainedOnly(BuiltIn):
    """Leaves out heads that no sample of the client trained."""

    name, sums, plain = "trained-only", True, True

    def leave(self, update: Arrays, at: AtClient) -> Left:
        return Left({name: value for name, value in update.items() if at.weights[name] > 0})


class LocalNoise(BuiltIn):
    """Local DP: the client clips its update and adds noise before sending it (`meadow.client.release`)."""

    name, sums = "local-noise", True

    def __init__(self, learned: Sequence[str]) -> None:
        self._learned = frozenset(learned)

    def leave(self, update: Arrays, at: AtClient) -> Left:
        assert at.noise is not None  # clients train only after charging the release
        own = [name for name in update if name in self._learned]
        noised = at.noise({name: at.received[name] for name in own}, {name: update[name] for name in own})
        return Left(update | noised)


class Attack(BuiltIn):
    """Replaces simulated attackers' updates at the server. Attackers know the valid updates of the others
    (`meadow.strategies.attacks`)."""

    name = "attack"

    def __init__(self, experiment: Experiment) -> None:
        self._bad, self._settings, self._seed = attackers(experiment), experiment.attack, experiment.run.seed

    def arrive(self, arrived: Arrived) -> None:
        sound = {client: update for client, update in arrived.updates.items() if arrived.sound(client, update)}
        if sound:
            sent = arrived.sent[next(iter(sound))]
            arrived.updates |= attack(sound, self._bad, sent, self._settings, self._seed, arrived.round)


class NormBound(BuiltIn):
    """Rejects updates with a norm above `cohort.max_norm`."""

    name, sums = "norm-bound", True

    def __init__(self, most: float) -> None:
        self._most = most

    def judge(self, update: Arrays, received: Arrays) -> str:
        far = length(update, received)
        return f"its update is {far:.6g} long, more than cohort.max_norm = {self._most:.6g}" if far > self._most else ""
