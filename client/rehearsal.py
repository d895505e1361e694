"""Who will train, before a run: an algorithm takes two rounds with a client whose training does nothing but note what it is
asked for."""

from dataclasses import dataclass, field, replace

from meadow.client.context import LocalContext
from meadow.client.loop.training import Trained
from meadow.client.trainers.choose import Choice, Trainers, trainers_of
from meadow.client.trainers.job import Job, Training
from meadow.strategies.protocol import ClientAlgorithm, Roles, steps_of
from torch import nn

from meadow.arrays.named import Kinds
from meadow.config.schema import Experiment
from meadow.tasks.features import view
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task


@dataclass
class Notes:
    """A trainer that trains nothing. kinds: whether each training came with a correction, and with a term."""

    kinds: dict[tuple[bool, bool], None] = field(default_factory=dict)
    name: str = "rehearsal"
    blocks_at_once: int = 0

    def why_not(self, job: Job) -> str:
        """It takes everything."""
        return ""

    def train(self, model: nn.Module, training: Training) -> Trained:
        """Note what it is asked for."""
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
    """Who will train the clients of a run, and why faster trainers will not: an entry for each kind of training that its
    algorithm asks for. auxiliary: what the server sends beside the model. Raises UserError where `engine.trainer` names one
    that cannot.
    """
    seen = view(task, model, frozen=roles.trunk_is_frozen)
    trainers = trainers_of(experiment, seen)
    if (plain := trainers.chosen()).trainer is trainers.loop:
        return [plain]  # whatever the algorithm adds
    start, notes = initial_state(experiment), Notes()
    data = task.client(0).train
    context = LocalContext(
        experiment=experiment,
        task=seen.task,
        roles=roles,
        whole=model,
        model=seen.model,
        trainers=Trainers(trainers.job, seen.task, [notes], trainers.loop),
        data=data,
        round=1,
        client=0,
        received={name: start[name] for name in roles.shared},
        auxiliary=auxiliary,
        memory={},
        base=lambda: start,
        personal={},
    )
    for _ in range(2):  # some act only on what their last round left
        context.load(context.start())
        context = replace(context, memory={**context.memory, **algorithm.train(context).memory})
    some_missing = not task.held.all() or not all(
        bool(t.known(task.dataset.train.y[t.name]).all()) for t in task.targets
    )
    found = list[Choice]()
    for kind in notes.kinds:
        found.append(trainers.chosen(*kind))
        if some_missing and found[-1].by_labels:
            found.append(trainers.chosen(*kind, complete=False))
    return found
