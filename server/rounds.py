"""The rounds: one loop, from the last checkpoint to the last round, and the evaluation of every client at the end."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import Grid
from meadow.server import checkpoints
from meadow.server.admission import Verdict, admit
from meadow.server.cohorts import call, read_schedule
from meadow.server.evaluation import Scores, add_confusion, describe, over_clients
from meadow.server.exchange import Exchange
from meadow.server.folder import open_folder
from meadow.server.protection import protection
from meadow.server.scoring import predict_globally, scalar, score_clients, score_globally, scores_in
from meadow.server.session import Session, setup, split_table
from meadow.server.summary import ClientScores, client_rows, summarise, test_sizes, used
from meadow.server.writer import EVERY, Writer
from meadow.strategies import algorithm, equal_weights, server_of
from meadow.strategies.attacks import attack, attackers
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientUpdate, Roles, steps_of
from meadow.strategies.roles import name_weights, roles_of
from meadow.strategies.wire.packing import Answer, Request
from meadow.strategies.wire.replies import arrays_fault, metrics_of, weight_fault

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.named import Arrays, by_kind, flat, nbytes
from meadow.arrays.sums import Span, WeightedSum, add, cut, total, weighted_sum
from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.runtime.errors import RunStopped, UserError
from meadow.tasks.features import view
from meadow.tasks.numerics import keeps_float32
from meadow.tasks.task import Task, initial_state, open_task

log = logging.getLogger("meadow.server")


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
    start, model = initial_state(experiment), task.new_model()
    parts, chosen = roles_of(experiment, model), algorithm(experiment.strategy.name)
    guard = protection(experiment, task, parts)
    hashes = {"data": task.dataset.sha256, "split": task.split.sha256}
    split = {"law": task.split.law, "tries": task.split.tries, "sha256": task.split.sha256}
    about = {"large_products": "float32 by oneDNN" if keeps_float32() else "float32 by torch's default"}
    folder = open_folder(out, experiment, resume, {"data_sha256": task.dataset.sha256, "split": split}, about)
    if (before := folder.summary()) and before["status"] == "done":
        return before
    folder.forget_summary()
    folder.write_split(split | split_table(experiment, task))
    run_id = folder.manifest()["run_id"]
    own = tuple(start) if chosen.own_start else parts.personal + parts.fixed
    base = {n: start[n] for n in own} if experiment.task.pretrained else {}
    # Ledgers stay with their nodes; so does a state that only one of a cluster's machines has.
    movable = experiment.privacy.unit not in ("example", "local") and not experiment.engine.address
    clients, timeout = experiment.partition.clients, experiment.cohort.timeout
    exchange = Exchange(grid, run_id, base, hashes, clients, timeout, movable=movable)
    arrays = {n: start[n] for n in parts.shared}
    seen = view(task, model, frozen=parts.trunk_is_frozen)
    server = server_of(setup(experiment, task, parts))
    sizes, schedule = task.split.sizes[:, 0], read_schedule(experiment)
    session = Session(
        experiment, task, parts, start, arrays, server, server.init(arrays), exchange, folder, run_id, model, seen, guard,
        sizes, schedule, Writer(folder, 0 if _each_round(experiment, chosen, parts) else EVERY),
    )  # fmt: skip
    status, reason = "done", ""
    scores: dict[int, ClientScores] = {}
    try:
        exchange.gather()
        guard.begin(exchange.simulated, out)
        first = _recover(session) + 1
        session.clock.start("broadcast")
        try:
            for round_ in range(first, experiment.run.rounds + 1):
                play_round(session, round_)
        finally:
            session.writer.end()
        scores = score_clients(session, experiment.run.rounds, last=True)
    except RunStopped as stop:
        status, reason = "stopped", str(stop)
    except KeyboardInterrupt:
        status, reason = "stopped", "stopped by the user"
    except BaseException as fault:
        told = repr(fault) if allowed(experiment, "errors") else type(fault).__name__
        folder.write_summary(summarise(session.folder, experiment, task, session.arrays, {}, "failed", told, guard))
        raise
    if scores:
        folder.write_clients(client_rows(folder, experiment, task, scores, guard.epsilons()))
        outputs = predict_globally(session)
        shared = describe(outputs, task.dataset.test.y, task.targets) if outputs else {}
        counts = add_confusion([s.confusion for s in scores.values()], task.targets)
        folder.write_evaluation({"global": shared, "clients": counts})
    summary = summarise(folder, experiment, task, session.arrays, scores, status, reason, guard)
    summary["engine"] = {"exact": experiment.engine.exact, "training": sorted(exchange.training)}
    folder.write_summary(summary)
    return summary


def _each_round(experiment: Experiment, chosen: Algorithm, parts: Roles) -> bool:
    """Whether each round has a checkpoint of its own: under DP, and where clients keep something from round to round."""
    local = experiment.local
    loop_keeps = (
        local.schedule == "plateau" or local.balance not in ("fixed", "pcgrad") or experiment.adapt.method != "none"
    )
    return (
        experiment.privacy.unit != "none"
        or type(chosen.client) is not ClientAlgorithm
        or bool(parts.personal)
        or loop_keeps
    )


def play_round(session: Session, round_: int) -> None:
    """One round: cohort, messages, replies, admission, combination, evaluation, record, checkpoint.

    A round with fewer good replies than the quorum is void, and tried again with a new cohort, `cohort.attempts` times
    in all. Raises RunStopped if none of them counts.
    """
    experiment, clock = session.experiment, session.clock
    pooled = experiment.run.placement == "pooled"
    on_clients = "clients" in experiment.evaluate.on
    guard = session.protection
    void: list[dict[str, Any]] = []
    for attempt in range(1, experiment.cohort.attempts + 1):
        tried = try_round(session, round_, attempt)
        if len(tried.verdict.admitted) >= tried.quorum:
            break
        log.warning("round %d, attempt %d: void, %d good replies", round_, attempt, len(tried.verdict.admitted))
        void.append({"cohort": tried.cohort, "failed": _failed(tried.verdict), **_traffic(session, round_, tried)})
        session.void.append(f"{round_}.{attempt}")
    else:
        del session.void[len(session.void) - len(void) :]  # a resumed run tries this round from the start
        first = next(iter(tried.verdict.refused.values()), "").strip().splitlines()
        raise RunStopped(
            f"round {round_}: {len(tried.verdict.admitted)} of {len(tried.cohort)} clients gave a good reply, "
            f"cohort.quorum = {experiment.cohort.quorum}, cohort.attempts = {experiment.cohort.attempts}"
            + (f"; the first failure: {first[-1]}" if first else "")
        )
    verdict = tried.verdict
    traffic = _traffic(session, round_, tried)
    if experiment.privacy.unit == "client":
        session.arrays = guard.combine(session.arrays, verdict.admitted, round_)
    elif verdict.admitted:
        given = _given(session, tried, round_)
        session.arrays, session.state = session.algorithm.update(session.state, given, session.arrays)
    received: dict[int, Scores] = {
        client: scores_in(content) for client, content in _contents(verdict).items() if "evaluation" in content
    }
    clients_round = round_ - 1
    clock.now("evaluate")
    if pooled and on_clients and allowed(experiment, "metrics") and round_ % experiment.evaluate.every == 0:
        received, clients_round = used(score_clients(session, round_, last=False)), round_
    record = {
        "round": round_,
        "cohort": tried.cohort,
        "failed": _failed(verdict),
        **({"void": void} if void else {}),
        "seconds": 0.0,
        "times": {},
        "idle": session.exchange.idle,
        **{key: value + sum(v[key] for v in void) for key, value in traffic.items()},
        **_training(session.task, [metrics_of(content) for content in _contents(verdict).values()]),
        "global": score_globally(session)
        if round_ % experiment.evaluate.every == 0 or round_ == experiment.run.rounds
        else {},
        "clients": over_clients(received, test_sizes(experiment, session.task)),
        "clients_round": clients_round,
        "epsilon": guard.epsilon() if experiment.privacy.unit != "none" else None,
    }
    checkpoint = checkpoints.Checkpoint(round_, session.arrays, flat(session.state), guard.state())
    record["times"] = clock.read()
    record["seconds"] = sum(record["times"].values())
    clock.start("write")
    session.writer.give(record, checkpoint)
    if experiment.privacy.unit != "none":  # what leaves next presumes that this round has been
        session.writer.wait()


@dataclass(frozen=True)
class Tried:
    """One attempt at a round: who was asked, who of these trained; which replies count, and the arrays that were sent."""

    cohort: list[int]
    trained: list[int]
    verdict: Verdict
    sent: Arrays
    quorum: int
    """Good replies that it needs: `cohort.quorum`, but under DP no more than those who still have a budget, and none at all
    of a Poisson cohort whose size is private."""


def try_round(session: Session, round_: int, attempt: int) -> Tried:
    """Draw a cohort, send it the model, and judge the replies."""
    experiment = session.experiment
    pooled = experiment.run.placement == "pooled"
    guard, private = session.protection, experiment.privacy.unit != "none"
    session.clock.now("broadcast")
    guard.require(round_)
    called = call(experiment, round_, session.sizes, session.schedule, attempt, guard.cohort_secret, without=guard.left)
    config = ConfigRecord(
        {
            "round": round_,
            "attempt": attempt,
            "run": session.run_id,
            "keep-from": checkpoints.oldest_round(session.folder.checkpoints),
            "void": session.void,
            "evaluate": "clients" in experiment.evaluate.on
            and not pooled
            and allowed(experiment, "metrics")
            and (round_ - 1) % experiment.evaluate.every == 0,
        }
    )
    sent = session.arrays | flat(session.algorithm.auxiliary(session.state, session.arrays))
    content = RecordDict({"arrays": to_record(sent), "config": config})
    requests = []
    for client in sorted(called.trained):
        own = content
        if (share := called.work.get(client)) is not None:
            own = RecordDict({**content, "config": ConfigRecord({**config, "work": share})})
        requests.append(Request(client, own))
    requests = guard.remind(requests)
    attacked = attackers(experiment)
    whole = session.algorithm.sums_only and not attacked and experiment.privacy.unit != "client"
    # What a client takes grows with its steps; one more stands for all that does not.
    work = {
        c: 1.0 + called.work.get(c, 1.0) * steps_of(experiment.local, max(1, int(session.sizes[c])))
        for c in called.trained
    }
    replies, sums = session.exchange.send(
        requests, whole_blocks=whole, work=None if pooled else work, meanwhile=session.writer.begin
    )
    session.clock.part("broadcast", session.exchange.times)
    session.clock.now("write")
    session.writer.wait()
    session.clock.now("reduce")
    left = guard.read(replies, round_)
    sizes = {c: int(session.exchange.sizes[c]) for c in called.trained}
    if pooled:
        sizes = {0: len(session.task.pool()) if allowed(experiment, "samples") else 1}
    if attacked and experiment.attack.kind != "label-flip":
        _attack(replies, attacked, sent, sizes, experiment, round_)
    verdict = admit(
        replies,
        sums,
        sent,
        sizes,
        equal=equal_weights(experiment),
        max_norm=experiment.cohort.max_norm,
        judge=session.algorithm.judge,
    )
    for client, reason in verdict.refused.items():
        which = {"round": round_, "client": client}
        log.warning(
            "round %d: client %d does not count: %s", *which.values(), reason.strip().splitlines()[-1], extra=which
        )
    refused = dict(sorted({**verdict.refused, **called.absent}.items()))
    quorum = experiment.cohort.quorum
    if private:
        quorum = min(quorum, len(called.asked) - len(left))
    if experiment.privacy.unit == "client" and experiment.cohort.sampling == "poisson":
        quorum = 0
    verdict = Verdict(verdict.admitted, verdict.sums, refused)
    return Tried(called.asked, called.trained, verdict, sent, quorum)


def _attack(
    replies: Sequence[Answer],
    bad: frozenset[int],
    sent: Arrays,
    sizes: Mapping[int, int],
    experiment: Experiment,
    round_: int,
) -> None:
    """Put what the attackers send in the place of what they trained. They look at sound replies alone."""
    came = {reply.client: reply.content for reply in replies if reply.content is not None}
    updates = {
        client: from_record(content.array_records["arrays"])
        for client, content in came.items()
        if not weight_fault(metrics_of(content), sizes[client]) and not arrays_fault(content, sent)
    }
    for client, arrays in attack(updates, bad, sent, experiment.attack, experiment.run.seed, round_).items():
        came[client]["arrays"] = to_record(arrays)


def _failed(verdict: Verdict) -> list[dict[str, Any]]:
    return [{"client": c, "reason": r} for c, r in verdict.refused.items()]


def _traffic(session: Session, round_: int, tried: Tried) -> dict[str, int]:
    """Bytes of arrays that clients received and sent in a round, as if each were reached by itself.

    The first round includes what every client is sent once. Pooling has no traffic of arrays: the data itself moved.
    """
    if session.experiment.run.placement == "pooled":
        return {"bytes_down": 0, "bytes_up": 0}
    size, once = nbytes(tried.sent), nbytes(session.exchange.base) * session.experiment.partition.clients
    down = size * len(tried.cohort) + (once if round_ == 1 else 0)
    return {"bytes_down": down, "bytes_up": size * len(tried.verdict.admitted)}


def _training(task: Task, metrics: Sequence[MetricRecord]) -> dict[str, Any]:
    """Optimiser steps in all, and each target's training loss, the mean weighted by the clients' samples.

    What a client reports is taken only if it is a finite number; it decides nothing.
    """
    losses = {}
    for target in task.targets:
        pairs = [(scalar(m, "num-examples"), scalar(m, f"loss/{target.name}")) for m in metrics]
        known = [(weight, loss) for weight, loss in pairs if weight is not None and loss is not None]
        if known:
            losses[target.name] = {"loss": sum(w * v for w, v in known) / sum(w for w, _ in known)}
    return {"steps": int(sum(scalar(m, "steps") or 0 for m in metrics)), "train": losses}


def _contents(verdict: Verdict) -> dict[int, RecordDict]:
    """What the clients that count replied."""
    return {reply.client: reply.content for reply in verdict.admitted if reply.content is not None}


def _given(session: Session, tried: Tried, round_: int) -> WeightedSum | list[ClientUpdate]:
    """The replies that count as the algorithm takes them: their sum, or each by itself."""
    equal = equal_weights(session.experiment)
    if session.algorithm.sums_only:
        whole = round_sum(tried.trained, tried.verdict, equal)
        return whole if whole is not None else WeightedSum({}, {})
    updates = []
    for client, content in _contents(tried.verdict).items():
        arrays, metrics = from_record(content.array_records["arrays"]), dict(metrics_of(content).items())
        updates.append(ClientUpdate(client, round_, arrays, name_weights(metrics, arrays, equal), metrics))
    return updates


def round_sum(cohort: Sequence[int], verdict: Verdict, equal: bool = False) -> WeightedSum | None:
    """The sum over a cohort of what nodes have added up, and of single replies, added up here; None if there are none."""
    admitted, sums, blocks = _contents(verdict), verdict.sums, cut(cohort)

    def known(span: Span) -> WeightedSum | None:
        found = sums.get(tuple(c for block in blocks[slice(*span)] for c in block))
        if found is None and span[1] - span[0] == 1 and any(c in admitted for c in blocks[span[0]]):
            return _block_sum(blocks[span[0]], admitted, equal)
        return found

    return total((0, len(blocks)), known, add) if blocks else None


def _block_sum(block: Sequence[int], admitted: Mapping[int, RecordDict], equal: bool) -> WeightedSum:
    return weighted_sum(
        (name_weights(metrics_of(content), arrays, equal), arrays)
        for content in (admitted[c] for c in block if c in admitted)
        for arrays in [from_record(content.array_records["arrays"])]
    )


def _recover(session: Session) -> int:
    """Put the newest whole checkpoint's arrays in place and return its round; 0 where there is none."""
    checkpoint, damaged = checkpoints.latest(session.folder.checkpoints)
    for line in damaged:
        log.warning("damaged checkpoint, the one before it is used: %s", line)
    if checkpoint is not None:
        session.arrays = checkpoint.arrays
        session.protection.restore(checkpoint.privacy)
        session.state = {**session.state, **by_kind(checkpoint.strategy)}
    session.folder.cut_back(checkpoint.round if checkpoint else 0)
    for record in session.folder.rounds():
        session.void += [f"{record['round']}.{attempt + 1}" for attempt in range(len(record.get("void", [])))]
    return checkpoint.round if checkpoint else 0
