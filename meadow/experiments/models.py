"""Load a run's trained models from its folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from meadow.arrays.named import Arrays, arrays_sha256
from meadow.client.node import open_context, open_node
from meadow.config import load as files
from meadow.config.schema import Experiment
from meadow.experiments.api import Summary
from meadow.experiments.folds import in_folds
from meadow.runtime.errors import UserError
from meadow.server.checkpoints import Checkpoint, latest
from meadow.server.folder import RunFolder
from meadow.server.states import States
from meadow.simulation.grid import node_context
from meadow.strategies.roles import roles_of
from meadow.strategies.wire.packing import Request
from meadow.tasks.evaluation import load_into
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task, settle


def load(run: Summary | Path | str, client: int | None = None) -> nn.Module:
    """Load a run's shared model, or the model that `client` uses, in eval mode.

    >>> import meadow, torch
    >>> small = {"engine": {"name": "inline"}, "partition": {"clients": 4}}
    >>> from meadow.experiments.api import run
    >>> summary = meadow.run("fedper", out="fedper", run={"rounds": 2}, **small)
    >>> model = meadow.load(summary, client=3)
    >>> {target: tuple(output.shape) for target, output in model(torch.zeros(5, 1, 8, 8)).items()}
    {'digit': (5, 10)}

    run: a run's folder, or the summary that `run` returned. The weights are those of the newest checkpoint; of a run that
    has ended with `run.keep = "best"`, those of the best round. A client's model is the one that `clients.csv` calls "used":
    the shared layers with the client's own, or its own model if the algorithm keeps one. Each call returns a new model, on
    the CPU. Its input is float32 samples or tokens as returned by `meadow.tasks.task.Task.prepare`; it returns
    {target: output} (`meadow.tasks.models.multihead`).

    The data is opened again, because the shape of the model depends on it. Raises UserError if the data is missing, if the
    folder has no such model, or if one of its files is damaged.
    """
    folder = RunFolder(Path(run.folder if isinstance(run, Summary) else run))
    experiment = _experiment(folder.path)
    checkpoint = _checkpoint(folder)
    model = open_task(experiment).new_model()
    if client is None:
        load_into(model, _shared(experiment, model, checkpoint, folder.path))
    else:
        load_into(model, _used(experiment, checkpoint, folder, client))
    return model.eval()


def _experiment(path: Path) -> Experiment:
    if not (path / "experiment.toml").is_file():
        if folds := sorted(path.glob("*/experiment.toml")):
            raise UserError(f"{path} has several runs in it: name one of them, for example {folds[0].parent}")
        raise UserError(f"{path} has no experiment.toml, so it is not a run: name a folder that `meadow run` made")
    experiment = settle(files.load(path / "experiment.toml"))
    if in_folds(experiment):
        raise UserError(f"{path} is a cross-validation: name one of its runs, for example {path / 'fold-1'}")
    return experiment


def _checkpoint(folder: RunFolder) -> Checkpoint:
    summary = folder.summary()
    selected = (summary or {}).get("selected") or {}
    earlier = summary is not None and selected.get("kept_round", summary["rounds"]) < summary["rounds"]
    found, damaged = latest(folder.best if earlier else folder.checkpoints)
    if found is None:
        reason = f"its checkpoints are damaged ({damaged[0]})" if damaged else "no round has ended yet"
        raise UserError(f"{folder.path}: {reason}; `meadow run --resume --out {folder.path}` continues the run")
    if summary and arrays_sha256(found.arrays) != summary["model_sha256"]:
        raise UserError(
            f"{folder.path}: the newest intact checkpoint, of round {found.round}, is not the model in summary.json"
            f"{f' ({damaged[0]})' if damaged else ''}; `meadow run --resume --out {folder.path}` computes it again"
        )
    return found


def _shared(experiment: Experiment, model: nn.Module, checkpoint: Checkpoint, path: Path) -> Arrays:
    """All arrays of the shared model."""
    roles = roles_of(experiment, model)
    if roles.personal:
        raise UserError(
            f'{path}: with strategy.share = "{experiment.strategy.share}" there is no single shared model, because every '
            f"client has its own layers ({roles.personal[0]}, ...). Name a client: load(run, client=0)"
        )
    return {**(initial_state(experiment) if roles.fixed else {}), **checkpoint.arrays}


def _used(experiment: Experiment, checkpoint: Checkpoint, folder: RunFolder, client: int) -> Arrays:
    """All arrays of the model that a client uses after the checkpoint's round."""
    count = experiment.partition.clients
    if not 0 <= client < count:
        raise UserError(f"client = {client}: {folder.path} has clients 0 to {count - 1}")
    records = [record for record in folder.rounds() if record["round"] <= checkpoint.round]
    run, node = str(folder.manifest()["run_id"]), open_node(node_context(experiment, 0, 1, folder.state))
    void = [f"{r['round']}.{attempt + 1}" for r in records for attempt in range(len(r.get("void", [])))]
    states = States()
    states.read(folder.path, [])  # a state that is elsewhere counts as missing only if an algorithm reads it
    config: dict[str, Any] = {"round": checkpoint.round, "run": run, "void": void, **states.about([client])}
    context = open_context(node, Request(client, checkpoint.arrays, config), before=checkpoint.round + 1)
    if not context.personal and not context.memory and any(client in _trained(r) for r in records):
        missing = _Missing(
            f"{folder.path}: the personal state of client {client} is not in {folder.state}. In a deployment it never "
            "leaves the client's node. Omit `client` to load the shared model, if the run has one"
        )
        context = replace(context, memory=missing, personal=missing if node.roles.personal else {})
    return node.algorithm.used(context)


class _Missing(dict[str, Any]):
    """Stands for a client's state that is stored elsewhere: raises UserError when an algorithm reads it."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self._reason = reason

    def _refuse(self, *_: object) -> NoReturn:
        raise UserError(self._reason)

    __contains__ = __getitem__ = __iter__ = __len__ = __or__ = __ror__ = get = items = keys = values = _refuse


def _trained(record: dict[str, Any]) -> set[int]:
    return {*record["cohort"]} - {failure["client"] for failure in record["failed"]}
