"""The stages of an experiment's updates, in the order in which clients apply them."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from meadow.strategies.protocol import Roles
from meadow.strategies.stages.bucketing import Bucketing
from meadow.strategies.stages.own import Attack, ClipAndNoise, LocalNoise, NormBound, TrainedOnly
from meadow.strategies.stages.stage import Arrived as Arrived
from meadow.strategies.stages.stage import AtClient, Left, Stage
from meadow.strategies.stages.stage import moved as moved
from meadow.strategies.stages.stage import moves as moves

from meadow.arrays.named import Arrays, Kinds, auxiliary, split_auxiliary
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.objects import user_instance


class Stages:
    """A list of stages as one, on a node or at the server."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self.sums = all(stage.sums for stage in stages)
        """Whether nodes may add updates up."""
        self.keeps = any(stage.keeps for stage in stages)
        """Whether clients store something of a stage."""
        self.plain = all(stage.plain for stage in stages)
        """Whether an update whose arrays are all trained leaves as it is and is judged by its form alone."""
        self.encodes = any(_overrides(stage, "restore") for stage in stages)
        """Whether updates leave in another form than the model's."""
        self._arriving = [stage for stage in reversed(stages) if _overrides(stage, "arrive", "restore")]
        self._judging = [stage for stage in stages if _overrides(stage, "judge")]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    def leave(
        self,
        update: Arrays,
        client: int,
        round_: int,
        received: Arrays,
        weights: Mapping[str, float],
        noise: Callable[[Arrays, Arrays], Arrays] | None,
        memory: Kinds,
    ) -> Left:
        """The clients' halves, in order. `memory`: what the client has stored, of the stages under names of their
        own."""
        kept: Arrays = {}
        for number, stage in enumerate(self._stages):
            kind = f"stage-{number}"
            left = stage.leave(update, AtClient(client, round_, received, weights, noise, dict(memory.get(kind, {}))))
            update, kept = left.arrays, kept | auxiliary(kind, left.memory)
        return Left(update, kept)

    @property
    def arriving(self) -> bool:
        """Whether `arrive` does anything."""
        return bool(self._arriving)

    def arrive(self, arrived: Arrived) -> None:
        """The server's halves, in reverse."""
        for stage in self._arriving:
            stage.arrive(arrived)

    def judge(self, update: Arrays, received: Arrays) -> str:
        """Why an update in the form of the model may not be added up, or ""."""
        if not self._judging:
            return ""
        own = split_auxiliary(update)[0]
        return next((reason for stage in self._judging if (reason := stage.judge(own, received))), "")


def stages_of(experiment: Experiment, roles: Roles) -> Stages:
    """The stages that the settings ask for, then `strategy.stages`: a user's own get an update that has its noise
    already, if the client adds any. Raises UserError for a stage that cannot be, or may not stand there."""
    found: list[Stage] = []
    if experiment.cohort.max_norm:
        found.append(NormBound(experiment.cohort.max_norm))
    if experiment.strategy.bucket > 1:
        found.append(Bucketing(experiment.strategy.bucket))
    if experiment.privacy.unit == "client":
        found.append(ClipAndNoise())
    if experiment.attack.kind not in ("none", "label-flip"):
        found.append(Attack(experiment))
    if experiment.privacy.unit == "local":
        found.append(LocalNoise(roles.trained))
    return Stages([*found, TrainedOnly(), *(_open(name, experiment) for name in experiment.strategy.stages)])


def _open(name: str, experiment: Experiment) -> Stage:
    """A user's own stage, "module:OBJECT"; a class is made once a process."""
    stage = user_instance("strategy.stages", name)
    if not isinstance(stage, Stage):
        raise UserError(
            f'strategy.stages = "{name}" is a {type(stage).__name__}; it must be a meadow.strategies.stages.Stage '
            "(docs/stages.md shows one)"
        )
    if experiment.privacy.unit == "client" and not stage.before_noise:
        raise UserError(
            f'strategy.stages = "{name}" with privacy.unit = "client": the noise is added at the server, so this stage '
            "would read updates without any; write before_noise = True in it if what it does depends on one client alone, "
            'or privacy.unit = "local"'
        )
    return stage


def _overrides(stage: Stage, *halves: str) -> bool:
    return any(getattr(type(stage), half) is not getattr(Stage, half) for half in halves)
