"""The list of an experiment's stages, in the order in which clients apply them."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from meadow.arrays.named import Arrays, Kinds, auxiliary, split_auxiliary
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.objects import user_instance
from meadow.strategies.protocol import Roles
from meadow.strategies.stages.bucketing import Bucketing
from meadow.strategies.stages.builtin import Attack, LocalNoise, NormBound, TrainedOnly
from meadow.strategies.stages.stage import Arrived, AtClient, Left, Stage, moved, moves

__all__ = ["Arrived", "AtClient", "Left", "Stage", "Stages", "moved", "moves", "stages_of"]


class Stages:
    """A list of stages, on a node or at the server."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self.sums = all(stage.sums for stage in stages)
        """Whether nodes may add up updates."""
        self.keeps = any(stage.keeps for stage in stages)
        """Whether clients store memory of a stage."""
        self.plain = all(stage.plain for stage in stages)
        """Whether updates with all arrays trained are sent unchanged and have no `judge`."""
        self.encodes = any(_overrides(stage, "restore") for stage in stages)
        """Whether updates are sent in another form than the model's."""
        self._arriving = [stage for stage in reversed(stages) if _overrides(stage, "arrive", "restore")]
        self.combine = next((stage.combine for stage in stages if _overrides(stage, "combine")), None)
        """Computes the next model in place of the algorithm, if there is such a stage."""
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
        """Apply each stage's `leave`, in order. memory: the client's stored memory of all stages."""
        kept: Arrays = {}
        for number, stage in enumerate(self._stages):
            kind = f"stage-{number}"
            left = stage.leave(update, AtClient(client, round_, received, weights, noise, dict(memory.get(kind, {}))))
            update, kept = left.arrays, kept | auxiliary(kind, left.memory)
        return Left(update, kept)

    @property
    def arriving(self) -> bool:
        """Whether `arrive` changes anything."""
        return bool(self._arriving)

    def arrive(self, arrived: Arrived) -> None:
        """Apply each stage's `arrive`, in reverse order."""
        for stage in self._arriving:
            stage.arrive(arrived)

    def judge(self, update: Arrays, received: Arrays) -> str:
        """Return why an update in the form of the model must be rejected, or ""."""
        if not self._judging:
            return ""
        own = split_auxiliary(update)[0]
        return next((reason for stage in self._judging if (reason := stage.judge(own, received))), "")


def stages_of(experiment: Experiment, roles: Roles, of_server: Sequence[Stage] = ()) -> Stages:
    """The built-in stages that the settings need, then `strategy.stages`, which therefore get updates with the noise of
    local DP. of_server: stages that only the server has. Raises UserError for an invalid stage."""
    found = [*of_server]
    if experiment.cohort.max_norm:
        found.append(NormBound(experiment.cohort.max_norm))
    if experiment.strategy.bucket > 1:
        found.append(Bucketing(experiment.strategy.bucket))
    if experiment.attack.kind not in ("none", "label-flip"):
        found.append(Attack(experiment))
    if experiment.privacy.unit == "local":
        found.append(LocalNoise(roles.trained))
    return Stages([*found, TrainedOnly(), *(_open(name, experiment) for name in experiment.strategy.stages)])


def _open(name: str, experiment: Experiment) -> Stage:
    """Load a user's stage, "module:OBJECT"; a class is instantiated once per process."""
    stage = user_instance("strategy.stages", name)
    if not isinstance(stage, Stage):
        raise UserError(
            f'strategy.stages = "{name}" is a {type(stage).__name__}; it must be a meadow.strategies.stages.Stage '
            "(docs/stages.md shows one)"
        )
    if experiment.privacy.unit == "client" and not stage.before_noise:
        raise UserError(
            f'strategy.stages = "{name}" with privacy.unit = "client": the server adds the noise, so this stage '
            "would read updates without noise; write before_noise = True in it if it treats each client separately, "
            'or privacy.unit = "local"'
        )
    return stage


def _overrides(stage: Stage, *methods: str) -> bool:
    return any(getattr(type(stage), name) is not getattr(Stage, name) for name in methods)
