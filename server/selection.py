"""Validation metrics decide when a run stops and which round's model it keeps. Test parts play no role in either."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meadow.arrays.named import Arrays
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.server import checkpoints
from meadow.server.checkpoints import Checkpoint
from meadow.server.folder import RunFolder
from meadow.strategies.protocol import Roles
from meadow.tasks.metrics import LOWER_IS_BETTER, METRICS, PRIMARY
from meadow.tasks.task import Task


@dataclass(frozen=True)
class StopMetric:
    """`run.stop_metric`: where it is measured ("clients" or "global"), the target, the metric."""

    place: str
    target: str
    metric: str

    def __str__(self) -> str:
        return f"{self.place}.{self.target}.{self.metric}"

    def of(self, validation: Mapping[str, Any]) -> float | None:
        """Its value in the "validation" of a record or summary; None if it was not measured or is undefined."""
        found = validation.get(self.place, {}).get(self.target, {}).get(self.metric)
        return None if found is None else float(found["mean"] if self.place == "clients" else found)

    def gain(self, value: float, before: float) -> float:
        """By how much a value is better than another; negative if it is worse."""
        return before - value if self.metric in LOWER_IS_BETTER else value - before


def stop_metric(experiment: Experiment, task: Task, roles: Roles) -> StopMetric:
    """The experiment's `run.stop_metric`, or its default. Raises UserError if it is never measured."""
    first = task.targets[0]
    if not (name := experiment.run.stop_metric):
        return StopMetric("clients", first.name, PRIMARY[first.kind])
    place, _, rest = name.partition(".")
    target, _, metric = rest.rpartition(".")
    kinds = {t.name: t.kind for t in task.targets}
    if target not in kinds:
        raise UserError(f'run.stop_metric = "{name}": the targets learned are {", ".join(kinds)}; write one of them')
    if metric not in METRICS[kinds[target]]:
        known = ", ".join(METRICS[kinds[target]])
        raise UserError(f'run.stop_metric = "{name}": the metrics of {target} are {known}; write one of them')
    if place == "global" and roles.personal:
        raise UserError(
            f'run.stop_metric = "{name}": every client has layers of its own ({roles.personal[0]}, ...), so there is no '
            f'shared model to score; write "clients.{rest}"'
        )
    return StopMetric(place, target, metric)


class Selection:
    """Follows the stop metric from round to round. It is rebuilt from the records when a run is resumed.

    A round's scores arrive with the next round's replies (`clients_round`), so a stop comes a round later, and the best
    round's arrays are those that were sent in that next round. The untrained model is no candidate.
    """

    def __init__(self, experiment: Experiment, metric: StopMetric, folder: RunFolder) -> None:
        self.metric, self._plan, self._folder = metric, experiment.run, folder
        self.best: tuple[int, float] | None = None
        """The best round so far, and its value."""
        self._progress = 0
        """The last round that was better by more than min_delta than all before."""
        self._level: float | None = None
        self._scored = 0
        """The last round whose model was scored."""

    @property
    def keeps(self) -> bool:
        """Whether the best round's model is kept."""
        return self._plan.keep == "best"

    def keep_from(self, oldest: int) -> int:
        """The round from which clients must keep their states, given the round of the oldest checkpoint."""
        return min(oldest, self.best[0]) if self.keeps and self.best else oldest

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take the scores in a round's record; return whether they are the best so far."""
        value, round_ = self.metric.of(record.get("validation", {})), int(record["clients_round"])
        if value is None or round_ < 1:
            return False
        self._scored = round_
        if self._level is None or self.metric.gain(value, self._level) > self._plan.min_delta:
            self._progress, self._level = round_, value
        if self.best is None or self.metric.gain(value, self.best[1]) > 0:
            self.best = round_, value
            return True
        return False

    def reason(self, round_: int) -> str:
        """Why the run should end after the round; "" to go on."""
        plan = self._plan
        if self.best is None or round_ < plan.min_rounds:
            return ""
        best, value = self.best
        if plan.target and self.metric.gain(value, plan.target) >= 0:
            return f"{self.metric} reached run.target = {plan.target:g}: {value:.4g} in round {best}"
        if plan.patience and self._scored - self._progress >= plan.patience:
            waited = f"was not better for run.patience = {plan.patience} rounds"
            return f"{self.metric} {waited}: best {value:.4g} in round {best}"
        return ""

    def save(self, arrays: Arrays, run: str) -> None:
        """Keep the best round's shared arrays in the run folder."""
        if self.best is not None:
            checkpoints.save(self._folder.best, Checkpoint(self.best[0], arrays, run=run), keep=1)

    def earlier(self, round_: int) -> Checkpoint | None:
        """The best round's arrays, if that round came before `round_`. Raises DamagedFile if they are lost."""
        return checkpoints.read(self._folder.best, self.best[0]) if self.best and self.best[0] < round_ else None

    def summary(self, round_: int) -> dict[str, Any]:
        """The summary's "selected": the metric, the best round and its value, and the round whose model is kept."""
        best, value = self.best or (None, None)
        return {"metric": str(self.metric), "best_round": best, "value": value, "kept_round": round_}
