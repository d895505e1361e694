"""The rounds: one loop, from the last checkpoint to the last round, and the evaluation of every client at the end."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from config.durable import Arrays
from config.errors import RunStopped, UserError
from config.schema import Experiment
from config.seeds import numpy_generator
from server import checkpoints
from server.admission import Verdict, admit
from server.evaluation import Scores, add_confusion, describe, over_clients, read_confusion
from server.exchange import Cohort, Exchange
from server.folder import RunFolder, open_folder
from server.summary import ClientScores, client_rows, summarise, test_sizes, used
from strategies import make_strategy
from strategies.blocks import cut, weighted_sum
from strategies.packing import block_message
from strategies.sharing import Roles, from_record, name_weights, nbytes, roles, to_record
from tasks.evaluation import load_into, predict
from tasks.features import View, view
from tasks.metrics import score
from tasks.task import Task, initial_state, open_task

log = logging.getLogger("meadow.server")


@dataclass
class Session:
    """What the rounds of one run have in hand. `arrays` are the shared ones, and the only thing here that changes."""

    experiment: Experiment
    task: Task
    roles: Roles
    start: Arrays
    arrays: Arrays
    strategy: Strategy
    exchange: Exchange
    folder: RunFolder
    run_id: str
    model: nn.Module
    view: View


def run_experiment(grid: Grid, experiment: Experiment, out: Path, resume: bool) -> dict[str, Any]:
    """Run the experiment over the grid's nodes and return its summary, which also stands in the run folder `out`.

    Raises UserError for input that only shows now (an impossible split), RunStopped if the run ends early for a
    stated reason; the summary is written in that case too, and in every case the folder can be resumed.
    """
    if (folds := experiment.evaluate.folds) and not experiment.evaluate.fold:
        raise UserError(
            f"evaluate.folds = {folds}: a single run is one fold of them; write evaluate.fold = 1 to {folds}, or let "
            "`meadow run` make all of them"
        )
    torch.set_num_threads(experiment.engine.threads)
    task = open_task(experiment)
    start = initial_state(experiment)
    hashes = {"data": task.dataset.sha256, "split": task.split.sha256}
    split = {"law": task.split.law, "tries": task.split.tries, "sha256": task.split.sha256}
    folder = open_folder(out, experiment, resume, {"data_sha256": task.dataset.sha256, "split": split})
    if (before := folder.summary()) and before["status"] == "done":
        return before
    folder.forget_summary()
    folder.write_split(split | split_table(experiment, task))
    run_id = folder.manifest()["run_id"]
    parts = roles(experiment, start)
    base = {n: start[n] for n in parts.personal + parts.fixed} if experiment.task.pretrained else {}
    exchange = Exchange(grid, run_id, base, hashes, experiment.partition.clients, experiment.cohort.timeout)
    arrays = {n: start[n] for n in parts.shared}
    model = task.new_model()
    seen = view(task, model, frozen=parts.trunk_is_frozen)
    strategy = make_strategy(experiment)
    session = Session(experiment, task, parts, start, arrays, strategy, exchange, folder, run_id, model, seen)
    status, reason = "done", ""
    scores: dict[int, ClientScores] = {}
    try:
        exchange.gather()
        for round_ in range(_recover(session) + 1, experiment.run.rounds + 1):
            play_round(session, round_)
        scores = score_clients(session, experiment.run.rounds, last=True)
    except RunStopped as stop:
        status, reason = "stopped", str(stop)
    except KeyboardInterrupt:
        status, reason = "stopped", "stopped by the user"
    except BaseException as fault:
        folder.write_summary(summarise(session.folder, experiment, task, session.arrays, {}, "failed", repr(fault)))
        raise
    if scores:
        folder.write_clients(client_rows(folder, task, scores))
        outputs = predict_globally(session)
        shared = describe(outputs, task.dataset.test.y, task.targets) if outputs else {}
        counts = add_confusion([s.confusion for s in scores.values()], task.targets)
        folder.write_evaluation({"global": shared, "clients": counts})
    summary = summarise(folder, experiment, task, session.arrays, scores, status, reason)
    folder.write_summary(summary)
    return summary


def draw_cohort(experiment: Experiment, round_: int) -> list[int]:
    """The clients of a round, ascending: a function of (run.seed, round). Without federation, whoever trains at all."""
    if experiment.run.placement == "pooled":
        return [0]
    everyone = experiment.partition.clients
    if experiment.cohort_size == everyone:
        return list(range(everyone))
    draw = numpy_generator(experiment.run.seed, "cohort", round_)
    return sorted(int(c) for c in draw.choice(everyone, experiment.cohort_size, replace=False))


def play_round(session: Session, round_: int) -> None:
    """One round: cohort, messages, replies, admission, combination, evaluation, record, checkpoint."""
    experiment, began = session.experiment, time.perf_counter()
    pooled = experiment.run.placement == "pooled"
    on_clients = "clients" in experiment.evaluate.on
    cohort = draw_cohort(experiment, round_)
    config = ConfigRecord(
        {
            "round": round_,
            "run": session.run_id,
            "keep-from": checkpoints.oldest_round(session.folder.checkpoints),
            "evaluate": on_clients and not pooled and (round_ - 1) % experiment.evaluate.every == 0,
        }
    )
    sent = to_record(session.arrays)
    messages = list(session.strategy.configure_train(round_, sent, config, Cohort(cohort)))
    sums_only = getattr(session.strategy, "needs_sums_only", False)
    replies, sums = session.exchange.send(messages, whole_blocks=sums_only)
    sizes = {0: len(session.task.pool())} if pooled else session.exchange.sizes
    verdict = admit(replies, sums, session.arrays, sizes)
    for client, reason in verdict.refused.items():
        which = {"round": round_, "client": client}
        log.warning(
            "round %d: client %d does not count: %s", *which.values(), reason.strip().splitlines()[-1], extra=which
        )
    if len(verdict.admitted) < experiment.cohort.quorum:
        first = next(iter(verdict.refused.values()), "").strip().splitlines()
        raise RunStopped(
            f"round {round_}: {len(verdict.admitted)} of {len(cohort)} clients gave a good reply, "
            f"cohort.quorum = {experiment.cohort.quorum}" + (f"; the first failure: {first[-1]}" if first else "")
        )
    blocks = combine_order(cohort, verdict) if sums_only else verdict.admitted
    combined, _ = session.strategy.aggregate_train(round_, blocks)
    if combined is not None:
        session.arrays = from_record(combined)
    received: dict[int, Scores] = {
        m.metadata.src_node_id: _scores(m) for m in verdict.admitted if "evaluation" in m.content
    }
    clients_round = round_ - 1
    if pooled and on_clients and round_ % experiment.evaluate.every == 0:
        received, clients_round = used(score_clients(session, round_, last=False)), round_
    record = {
        "round": round_,
        "cohort": cohort,
        "failed": [{"client": c, "reason": r} for c, r in verdict.refused.items()],
        "seconds": 0.0,
        **_traffic(session, round_, len(cohort), len(verdict.admitted)),
        **_training(session.task, [m.content.metric_records["metrics"] for m in verdict.admitted]),
        "global": score_globally(session)
        if round_ % experiment.evaluate.every == 0 or round_ == experiment.run.rounds
        else {},
        "clients": over_clients(received, test_sizes(session.task)),
        "clients_round": clients_round,
        "epsilon": None,
    }
    record["seconds"] = time.perf_counter() - began
    session.folder.append(record)
    checkpoints.save(session.folder.checkpoints, checkpoints.Checkpoint(round_, session.arrays))


def _traffic(session: Session, round_: int, asked: int, replied: int) -> dict[str, int]:
    """Bytes of arrays that clients received and sent in a round, as if each were reached by itself.

    The first round includes what every client is sent once. Pooling has no traffic of arrays: the data itself moved.
    """
    if session.experiment.run.placement == "pooled":
        return {"bytes_down": 0, "bytes_up": 0}
    size, once = nbytes(session.arrays), nbytes(session.exchange.base) * session.experiment.partition.clients
    return {"bytes_down": size * asked + (once if round_ == 1 else 0), "bytes_up": size * replied}


def _training(task: Task, metrics: Sequence[MetricRecord]) -> dict[str, Any]:
    """Optimiser steps in all, and each target's training loss, the mean weighted by the clients' samples.

    What a client reports is taken only if it is a finite number; it decides nothing.
    """
    losses = {}
    for target in task.targets:
        pairs = [(_scalar(m, "num-examples"), _scalar(m, f"loss/{target.name}")) for m in metrics]
        known = [(weight, loss) for weight, loss in pairs if weight is not None and loss is not None]
        if known:
            losses[target.name] = {"loss": sum(w * v for w, v in known) / sum(w for w, _ in known)}
    return {"steps": int(sum(_scalar(m, "steps") or 0 for m in metrics)), "train": losses}


def combine_order(cohort: Sequence[int], verdict: Verdict) -> list[Message]:
    """The round's blocks in order, one message each: a node's sum, or the sum of the single replies, made here."""
    admitted = {m.metadata.src_node_id: m for m in verdict.admitted}
    messages = []
    for block in cut(cohort):
        if present := [admitted[c] for c in block if c in admitted]:
            total = verdict.sums.get(block) or weighted_sum(
                (name_weights(m.content.metric_records["metrics"], arrays), arrays)
                for m in present
                for arrays in [from_record(m.content.array_records["arrays"])]
            )
            messages.append(block_message(total, present[0]))
    return messages


def score_globally(session: Session) -> dict[str, dict[str, float]]:
    """The shared model on the global test set: {target: {metric: value}}; empty where `predict_globally` is."""
    outputs = predict_globally(session)
    return score(outputs, session.task.dataset.test.y, session.task.targets, thorough=True) if outputs else {}


def predict_globally(session: Session) -> dict[str, Tensor]:
    """The shared model's outputs on the global test set; empty if part of the model is personal, or nobody asks."""
    if session.roles.personal or "global" not in session.experiment.evaluate.on:
        return {}
    load_into(session.model, session.start | session.arrays)
    seen = session.view
    return predict(seen.model, seen.data("test", session.task.dataset.test).x, seen.task.prepare)


def score_clients(session: Session, round_: int, last: bool) -> dict[int, ClientScores]:
    """Ask every client to score the model that it would use after `round_`; who does not answer is left out.

    `last`: thoroughly, and, if that is set, after local fine-tuning too.
    """
    everyone = range(session.experiment.partition.clients)
    fine_tuned = last and session.experiment.evaluate.fine_tune_epochs > 0
    config = ConfigRecord({"round": round_, "run": session.run_id, "finetune": fine_tuned, "thorough": last})
    sent = to_record(session.arrays)
    replies, _ = session.exchange.send(
        list(session.strategy.configure_evaluate(round_, sent, config, Cohort(everyone)))
    )
    scores = {}
    for reply in replies:
        client = reply.metadata.src_node_id
        identity = None if reply.has_error() else reply.content.config_records.get("identity")
        if identity is None:
            reason = reply.error.reason if reply.has_error() else "its reply says nothing of itself"
            log.warning("client %d was not evaluated: %s", client, reason)
            continue
        counts = reply.content.metric_records.get("confusion") or MetricRecord()
        scores[client] = ClientScores(
            _scores(reply),
            str(identity.get("personal")),
            bool(identity.get("trained")),
            read_confusion(counts, session.task, client),
        )
    return scores


def split_table(experiment: Experiment, task: Task) -> dict[str, Any]:
    """The split for `split.json`, a row a client: samples of each part; counts of the first target's labels or deciles.

    "holds", where clients hold part of the targets: the clients that hold each. For law = natural "left_out", how many
    of the data's own clients are too small and how many samples they have, and "names", each client's name in the data.
    """
    table: dict[str, Any] = {
        "sizes": task.split.sizes.tolist(),
        "target": experiment.task.targets[0],
        "labels": task.label_counts().tolist(),
    }
    if experiment.partition.holds:
        columns = zip(experiment.task.targets, task.held.T, strict=True)
        table["holds"] = {name: np.flatnonzero(has).tolist() for name, has in columns}
    if task.split.natural is not None:
        table["left_out"] = asdict(task.split.left_out)
        table["names"] = [task.dataset.clients[number] for number in task.split.natural]
    return table


def _recover(session: Session) -> int:
    """Put the newest whole checkpoint's arrays in place and return its round; 0 where there is none."""
    checkpoint, damaged = checkpoints.latest(session.folder.checkpoints)
    for line in damaged:
        log.warning("damaged checkpoint, the one before it is used: %s", line)
    if checkpoint is not None:
        session.arrays = checkpoint.arrays
    session.folder.cut_back(checkpoint.round if checkpoint else 0)
    return checkpoint.round if checkpoint else 0


def _scores(message: Message) -> dict[str, float]:
    """The scores in a reply that are finite numbers."""
    record = message.content.metric_records.get("evaluation") or MetricRecord()
    return {key: value for key in record if (value := _scalar(record, key)) is not None}


def _scalar(record: MetricRecord, key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
