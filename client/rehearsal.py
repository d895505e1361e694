"""Forecast which trainers a run will use: run two rounds of one client with a trainer that only records its calls."""

from dataclasses import dataclass, field, replace

from torch import nn

from meadow.arrays.named import Kinds, by_kind, flat
from meadow.client.context import LocalContext
from meadow.client.loop.training import Trained, Training
from meadow.client.trainers.choose import Choice, Trainers, trainers_of
from meadow.client.trainers.job import Job
from meadow.config.schema import Experiment
from meadow.strategies.protocol import ClientAlgorithm, Roles, steps_of
from meadow.tasks.features import view
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task


@dataclass
class Recorder:
    """A trainer that trains nothing. kinds: (has a correction, has a term) of each training that was asked for."""

    kinds: dict[tuple[bool, bool], None] = field(default_factory=dict)
    name: str = "rehearsal"

    def why_not(self, job: Job) -> str:
        return ""

    def train(self, model: nn.Module, training: Training) -> Trained:
        self.kinds[training.correct is not None, training.term is not None] = None
        return Trained(steps_of(training.plan, len(training.data), training.epochs), {})


def forecast(
    experiment: Experiment,
    task: Task,
    model: nn.Module,
    roles: Roles,
    algorithm: ClientAlgorithm,
    auxiliary: Kinds,
) -> list[Choice]:
    """The trainer of each kind of training that the algorithm asks for, and why faster trainers are passed over.

    auxiliary: the auxiliary arrays that the server sends. Raises UserError if `engine.trainer` names a trainer that
    cannot do one of them.
    """
    seen = view(task, model, frozen=roles.trunk_is_frozen)
    trainers = trainers_of(experiment, seen)
    if (plain := trainers.chosen()).trainer is trainers.loop:
        return [plain]  # and any other kind too
    start, recorder = initial_state(experiment), Recorder()
    context = LocalContext(
        experiment=experiment,
        task=seen.task,
        roles=roles,
        whole=model,
        model=seen.model,
        trainers=Trainers(trainers.job, seen.task, [recorder], trainers.loop),
        data=task.client(0).train,
        round=1,
        client=0,
        received={name: start[name] for name in roles.shared},
        auxiliary=by_kind(flat(auxiliary)),
        memory={},
        initial=lambda: start,
        personal={},
    )
    for _ in range(2):  # some algorithms act only on the memory of an earlier round
        context.load(context.start())
        context = replace(context, memory=by_kind(flat({**context.memory, **algorithm.train(context).memory})))
    some_missing = not task.held.all() or not all(
        bool(t.known(task.dataset.train.y[t.name]).all()) for t in task.targets
    )
    found = list[Choice]()
    for kind in recorder.kinds:
        found.append(trainers.chosen(*kind))
        if some_missing and found[-1].by_labels:
            found.append(trainers.chosen(*kind, complete=False))
    return found
