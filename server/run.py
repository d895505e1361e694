"""A run: opens it, plays its rounds from the last checkpoint on, and evaluates every client at the end."""

import logging
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid

from meadow.arrays.files import DamagedFile, locked
from meadow.arrays.named import by_kind
from meadow.config.load import to_tree
from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.runtime.errors import RunStopped, UserError
from meadow.server import checkpoints
from meadow.server.cohorts import read_schedule
from meadow.server.evaluation import (
    ClientScores,
    add_confusion,
    describe,
    predict_globally,
    score_clients,
    validation_spread,
)
from meadow.server.exchange import Exchange
from meadow.server.folder import check_folder, open_folder
from meadow.server.listeners import Listeners, RunBegins, open_listeners
from meadow.server.placement import placement
from meadow.server.privacy import protection
from meadow.server.rollcall import Carrier, RollCall
from meadow.server.rounds import play_round
from meadow.server.selection import Selection, stop_metric
from meadow.server.session import Session, setup, split_table
from meadow.server.summary import client_rows, summarise
from meadow.server.writer import EVERY, Writer
from meadow.strategies import algorithm, server_of
from meadow.strategies.roles import roles_of
from meadow.strategies.stages import stages_of
from meadow.strategies.wire.packing import Request
from meadow.tasks.features import view
from meadow.tasks.numerics import keeps_float32, placed
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task

log = logging.getLogger("meadow.server")

BY_USER = "stopped by the user"
"""The reason of a run that a signal stopped."""


def run_experiment(
    grid: Grid, experiment: Experiment, out: Path, resume: bool, checkpoint_every: float = EVERY
) -> dict[str, Any]:
    """Run the experiment over the grid's nodes; return its summary, which is also written to the run folder `out`.

    checkpoint_every: seconds between checkpoints (`Writer`). Raises UserError for errors of the input that show only now
    (an impossible split), RunStopped if the folder cannot be written. A run that ends early for a stated reason has a
    summary, too. The folder can be resumed in every case.
    """
    check_folder(out, experiment, resume)
    with locked(out):
        return _run(open_run(grid, experiment, out, checkpoint_every))


def _run(session: Session) -> dict[str, Any]:
    folder, experiment = session.folder, session.experiment
    if (before := folder.summary()) and before["status"] == "done":
        return before
    folder.delete_summary()
    folder.write("split", _split(session.task) | split_table(experiment, session.task))
    try:
        status, reason, scores = _play(session)
    except BaseException as fault:
        if isinstance(fault, SystemExit) and not fault.code:  # Flower ends its ServerApp so, after SIGTERM
            _end(session, summarise(session, "stopped", BY_USER, {}))
        else:
            reason = repr(fault) if allowed(experiment, "errors") else type(fault).__name__
            _end(session, summarise(session, "failed", reason, {}))
        raise
    return _end(session, summarise(session, status, reason, scores))


def open_run(grid: Grid, experiment: Experiment, out: Path, checkpoint_every: float) -> Session:
    """Open the run folder and everything that the rounds need, without contacting any node."""
    if (folds := experiment.evaluate.folds) and not experiment.evaluate.fold:
        raise UserError(
            f"evaluate.folds = {folds}: a single run covers one fold; write evaluate.fold = 1 to {folds}, or let "
            "`meadow run` run all of them"
        )
    torch.set_num_threads(experiment.engine.threads)
    task = open_task(experiment)
    start, engine = initial_state(experiment), experiment.engine
    model = placed(task.new_model(), engine.device, engine.exact)
    parts, chosen = roles_of(experiment, model), algorithm(experiment.strategy.name)
    guard, users = protection(experiment, task, parts), open_listeners(experiment.run.listeners)
    about = {"large_products": "float32 by oneDNN" if keeps_float32() else "float32 by torch's default"}
    facts = {"data_sha256": task.dataset.sha256, "split": _split(task)}
    folder = open_folder(out, experiment, facts, about)
    run_id = folder.manifest()["run_id"]
    own = tuple(start) if chosen.own_start else parts.personal + parts.fixed
    base = {n: start[n] for n in own} if experiment.task.pretrained else {}
    hashes = {"data": task.dataset.sha256, "split": task.split.sha256}
    roll = RollCall(Carrier(grid), run_id, base, hashes, experiment.partition.clients, experiment.cohort.timeout)
    # Ledgers stay with their nodes, and so does state that only one machine of a cluster has.
    movable = guard.movable and not experiment.engine.address
    writer, stages = Writer(folder, run_id, checkpoint_every), stages_of(experiment, parts, guard.stages)
    arrays, server = {n: start[n] for n in parts.shared}, server_of(setup(experiment, task, parts))
    return Session(
        experiment=experiment,
        task=task,
        roles=parts,
        start=start,
        arrays=arrays,
        algorithm=server,
        state=server.init(arrays),
        exchange=Exchange(roll, movable=movable),
        folder=folder,
        run_id=run_id,
        model=model,
        view=view(task, model, frozen=parts.trunk_is_frozen),
        protection=guard,
        placement=placement(experiment, task),
        stages=stages,
        schedule=read_schedule(experiment),
        writer=writer,
        listeners=Listeners([writer], users),
        selection=Selection(experiment, stop_metric(experiment, task, parts), folder),
    )


def _split(task: Task) -> dict[str, Any]:
    """The facts about the split that must be the same when the run is resumed."""
    return {"law": task.split.law, "tries": task.split.tries, "sha256": task.split.sha256}


def _play(session: Session) -> tuple[str, str, dict[int, ClientScores]]:
    """Hold the roll call, play the remaining rounds, evaluate every client and write its scores; return status, reason and
    clients' scores."""
    try:
        status, reason = _play_rounds(session)
        scores = _last_scores(session)
        if scores:
            _write_scores(session, scores)
        return status, reason, scores
    except RunStopped as early:
        return "stopped", str(early), {}
    except DamagedFile as fault:
        return "stopped", f"{fault}; restore it and continue with --resume, or start a new run in another folder", {}
    except KeyboardInterrupt:
        return "stopped", BY_USER, {}


def _last_scores(session: Session) -> dict[int, ClientScores]:
    """Score every client with the model that the run keeps, which is the session's from then on."""
    session.kept_round, selection = session.round, session.selection
    scores = score_clients(session, session.round, last=True)
    if selection.keeps:
        last = validation_spread(session, {client: its.scores for client, its in scores.items()})
        selection.add({"validation": last, "clients_round": session.round})
        if (best := selection.earlier(session.round)) is not None:
            session.arrays, session.kept_round = best.arrays, best.round
            session.states = session.states.at(best.round, session.folder.rounds())
            scores = score_clients(session, best.round, last=True)
    return scores


def _play_rounds(session: Session) -> tuple[str, str]:
    """Play the rounds. Returns "done", with the reason if validation ended the run early; or "stopped" and a listener's."""
    experiment, roll, listeners = session.experiment, session.exchange.roll, session.listeners
    try:
        roll.gather()
        session.protection.begin(roll.simulated, session.folder.path)
        if roll.keeps or session.protection.sync_each_round:
            session.writer.every = 0
        _recover(session)
        tree = to_tree(experiment)
        listeners.run_begins(RunBegins(tree, session.folder.path, session.round + 1))
        session.clock.start("broadcast")
        stop, enough = "", session.selection.reason(session.round)
        while session.round < experiment.run.rounds and not stop and not enough:
            stop = play_round(session, session.round + 1)
            enough = session.selection.reason(session.round)
        if session.round == experiment.run.rounds:
            return "done", ""
        return ("done", enough) if enough else ("stopped", stop)
    finally:
        listeners.rounds_end()


def _recover(session: Session) -> None:
    """Restore the newest intact checkpoint; without one the run begins with round 1. Raises DamagedFile, and RunStopped if a
    client's state is lost."""
    checkpoint, passed_over = checkpoints.latest(session.folder.checkpoints)
    for line in passed_over:
        log.warning("passed over, not a whole checkpoint: %s", line)
    if checkpoint is not None:
        if checkpoint.run not in ("", session.run_id):
            raise DamagedFile(
                f"{session.folder.path / 'manifest.json'}: run_id is {session.run_id}, but the checkpoints are of run "
                f"{checkpoint.run}, whose clients' states would not be found"
            )
        session.round, session.arrays = checkpoint.round, checkpoint.arrays
        session.protection.restore(checkpoint.privacy)
        session.state = {**session.state, **by_kind(checkpoint.strategy)}
    elif session.folder.rounds():
        log.warning("there is no whole checkpoint: the run begins again with round 1")
    session.folder.cut_back(session.round)
    records = session.folder.rounds()
    if missing := sorted({*range(1, session.round + 1)} - {record["round"] for record in records}):
        log.warning("rounds.jsonl has no record of rounds %s", missing)
    for record in records:
        session.selection.add(record)
        session.void += [f"{record['round']}.{attempt + 1}" for attempt in range(len(record.get("void", [])))]
    states = session.states
    states.read(session.folder.path, records)
    if states.newest:
        check = {"round": session.round, "run": session.run_id, "void": session.void, "check": True}
        check |= states.about(states.newest)
        session.exchange.send("evaluate", [Request(client, {}, check) for client in sorted(states.newest)])


def _write_scores(session: Session, scores: dict[int, ClientScores]) -> None:
    """Write `clients.csv` and `evaluation.json`."""
    folder, task = session.folder, session.task
    folder.write_clients(client_rows(session, scores))
    outputs = predict_globally(session)
    shared = describe(outputs, task.dataset.test.y, task.targets) if outputs else {}
    counts = add_confusion([s.confusion for s in scores.values()], task.targets)
    folder.write("evaluation", {"global": shared, "clients": counts})


def _end(session: Session, summary: dict[str, Any]) -> dict[str, Any]:
    """Write the summary and notify the listeners; exceptions that they raised are added to the summary."""
    session.folder.write("summary", summary)
    session.listeners.run_ends(summary)
    if session.listeners.faults:
        summary = summary | {"listeners": list(session.listeners.faults.values())}
        session.folder.write("summary", summary)
    return summary
