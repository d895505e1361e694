"""The stages that settings ask for: attacks, the noise of local DP, the longest update, heads that nothing trained."""

from collections.abc import Sequence

from meadow.strategies.attacks import attack, attackers
from meadow.strategies.stages.stage import Arrived, AtClient, Left, Stage

from meadow.arrays.named import Arrays
from meadow.arrays.sums import length
from meadow.config.schema import Experiment
from meadow.privacy.releases import Quantity


class Own(Stage):
    """What leaves by these stages stands in `meadow.privacy.releases`, with the model's arrays."""

    def releases(self, experiment: Experiment) -> Sequence[Quantity]:
        return ()


class TrainedOnly(Own):
    """A head that no sample of the client trained does not travel."""

    name, sums, plain = "trained-only", True, True

    def leave(self, update: Arrays, at: AtClient) -> Left:
        return Left({name: value for name, value in update.items() if at.weights[name] > 0})


class LocalNoise(Own):
    """Local DP: the client clips its update and adds noise before anything leaves (`meadow.client.release`)."""

    name, sums = "local-noise", True

    def __init__(self, learned: Sequence[str]) -> None:
        self._learned = frozenset(learned)

    def leave(self, update: Arrays, at: AtClient) -> Left:
        assert at.noise is not None  # without a charged release nothing is trained
        own = [name for name in update if name in self._learned]
        noised = at.noise({name: at.received[name] for name in own}, {name: update[name] for name in own})
        return Left(update | noised)


class Attack(Own):
    """What simulated attackers send takes the place of what they trained, where the server receives it. They know the
    sound updates of the others (`meadow.strategies.attacks`)."""

    name = "attack"

    def __init__(self, experiment: Experiment) -> None:
        self._bad, self._settings, self._seed = attackers(experiment), experiment.attack, experiment.run.seed

    def arrive(self, arrived: Arrived) -> None:
        sound = {client: update for client, update in arrived.updates.items() if arrived.sound(client, update)}
        if sound:
            sent = arrived.sent[next(iter(sound))]
            arrived.updates |= attack(sound, self._bad, sent, self._settings, self._seed, arrived.round)


class NormBound(Own):
    """An update that is longer than `cohort.max_norm` is refused."""

    name, sums = "norm-bound", True

    def __init__(self, most: float) -> None:
        self._most = most

    def judge(self, update: Arrays, received: Arrays) -> str:
        far = length(update, received)
        return f"its update is {far:.6g} long, more than cohort.max_norm = {self._most:.6g}" if far > self._most else ""


class ClipAndNoise(Own):
    """Client-level DP: the server clips each update and adds the noise to their sum (`meadow.server.client_level`)."""

    name = "clip-and-noise"
