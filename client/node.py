"""A node: a process that hosts clients. It opens their data and state, and answers the messages packed for it."""

import functools
import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from meadow.client.context import LocalContext, with_wrong_labels
from meadow.client.loop.anchors import teaches
from meadow.client.loop.training import LOOP, Beside, train
from meadow.client.release import Exhausted, Keeper, charge, noised_update
from meadow.client.store import SHARED_MEMORY, Store
from meadow.client.trainers.choose import Fast, fast, told
from meadow.strategies import algorithm, check, equal_weights
from meadow.strategies.attacks import ON_LABELS, attackers
from meadow.strategies.protocol import ClientAlgorithm, ClientResult, Roles
from meadow.strategies.roles import name_weights, roles_of
from meadow.strategies.wire.packing import Answer, NodeReply, Request
from meadow.strategies.wire.replies import arrays_fault, metrics_of, weight_fault
from torch import nn

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.memory import Recent, find
from meadow.arrays.named import Arrays, arrays_sha256, by_kind, flat, split_auxiliary
from meadow.arrays.sums import Span, WeightedSum, weighted_sum
from meadow.config.load import from_flat, to_flat
from meadow.config.schema import Experiment
from meadow.privacy.ledger import LedgerFault
from meadow.privacy.releases import allowed
from meadow.runtime.clock import Clock
from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import hold_still
from meadow.tasks.data import Data, concatenate
from meadow.tasks.evaluation import evaluate, examine
from meadow.tasks.features import View, view
from meadow.tasks.readers.domains import source_samples
from meadow.tasks.splits.shares import hosted
from meadow.tasks.task import Task, initial_state, open_task, settle, source_data

log = logging.getLogger("meadow.client")

FACTS = 10_000
"""Clients of which a process keeps `Facts`."""


@dataclass(frozen=True)
class Facts:
    """What is always so of a client's training data: whether kernels cover it, and its samples, in all and by target."""

    covered: bool
    samples: dict[str, int]


@dataclass(frozen=True)
class Node:
    """What a process keeps between messages: one task, one model that every client is loaded into, and the store."""

    experiment: Experiment
    task: Task
    model: nn.Module
    roles: Roles
    view: View
    algorithm: ClientAlgorithm
    state_root: Path
    keeper: Keeper
    fast: Fast | str
    """What trains plain local steps in the training loop's place, or why nothing does."""
    memory: int = 0
    """Bytes of clients' states that this process may keep in shared memory."""
    clock: Clock = field(default_factory=Clock, repr=False, compare=False)
    """Where the time of the message in hand goes."""
    facts: Recent[int, Facts] = field(default_factory=lambda: Recent(FACTS), repr=False, compare=False)
    _stores: dict[str, Store] = field(default_factory=dict, repr=False, compare=False)
    _bases: dict[str, Arrays] = field(default_factory=dict, repr=False, compare=False)

    @property
    def training(self) -> str:
        """What trains here (`meadow.client.trainers.choose.told`)."""
        return told(self.experiment, self.fast)


def open_node(context: Context) -> Node:
    """The node of this process for the experiment in the run configuration; made once a process."""
    simulated = bool(context.node_config.get("simulated", False))
    nodes = int(cast(int, context.node_config.get("num-partitions", 1)))
    shared = str(context.node_config.get("data", ""))
    return _open_node(_resolved(json.dumps(dict(context.run_config))), _state_root(context), simulated, nodes, shared)


@functools.lru_cache(maxsize=8)
def _resolved(flat: str) -> str:
    """The whole experiment, however it was given, with all defaults."""
    return json.dumps(to_flat(from_flat(json.loads(flat))))


@functools.lru_cache(maxsize=8)
def _open_node(flat: str, state_root: Path, simulated: bool, nodes: int, shared: str) -> Node:
    for address in shared.split():
        try:
            find(address)
        except OSError as error:  # then this process reads the data by itself
            log.warning("the data in the machine's memory cannot be opened: %s", error)
    experiment = settle(from_flat(json.loads(flat)))
    check(experiment)
    torch.set_num_threads(experiment.engine.threads)
    task = open_task(experiment)
    model = hold_still(task.new_model())
    parts, chosen = roles_of(experiment, model), algorithm(experiment.strategy.name)
    seen = view(task, model, frozen=parts.trunk_is_frozen and not teaches(experiment))
    keeper = Keeper(experiment, state_root, task.dataset.sha256, task.split.sha256, simulated)
    # Deployed clients keep their states on disk; so do those of a cluster, whose machines share no memory.
    in_memory = simulated and not experiment.engine.address and SHARED_MEMORY.is_dir()
    memory = experiment.engine.state_memory * 2**20 // nodes if in_memory else 0
    return Node(experiment, task, model, parts, seen, chosen.client, state_root, keeper, fast(experiment, seen), memory)


def _state_root(context: Context) -> Path:
    """Where this node's clients keep their state: the node's `state` setting, else MEADOW_STATE, else ~/.meadow."""
    place = context.node_config.get("state") or os.environ.get("MEADOW_STATE") or Path.home() / ".meadow" / "state"
    return Path(str(place))


def hosted_here(context: Context, clients: int) -> range:
    """The clients that this node hosts, by its partition-id of num-partitions."""
    index = int(cast(int, context.node_config.get("partition-id", 0)))
    nodes = int(cast(int, context.node_config.get("num-partitions", 1)))
    return hosted(index, nodes, clients)


def answer(node: Node, requests: Sequence[Request], handler: Callable[[Node, Request], RecordDict]) -> list[Answer]:
    """Let each client answer in turn. One that raises costs itself only: its answer is its id and its traceback.

    Under DP the kind of the error alone leaves, but for what the ledger says; the rest goes to the node's log.
    """
    answers = []
    for request in requests:
        try:
            answers.append(Answer(request.client, handler(node, request)))
        except LedgerFault as fault:
            answers.append(Answer(request.client, error=f"client {request.client}: {fault}"))
        except Exception as error:  # whatever a client's data or model does, the others go on
            if not allowed(node.experiment, "errors"):
                log.exception("client %d failed", request.client)
                told = f"{type(error).__name__}; the rest is in the node's log, or write privacy.release = errors"
                answers.append(Answer(request.client, error=f"client {request.client}: {told}"))
                continue
            answers.append(Answer(request.client, error=f"client {request.client}: {traceback.format_exc()}"))
    return answers


def train_client(node: Node, request: Request) -> RecordDict:
    """One client's part of a round: score the model it would use, train, store what is its own, reply the rest.

    The reply holds "arrays" (the shared arrays after training and what the algorithm sends beside them, without those
    of heads that no training sample has), "metrics" (num-examples in all and for each target, steps, loss of each
    target, and what the algorithm adds) and, if the message asks for it, "evaluation" (target/metric of the model that
    the client would use, on its test part).

    Under example-level and local DP the release is charged before anything else happens, and "ledger" says what the
    client's ledger then holds; if the budget does not allow the release, that is all, with "exhausted", the reason. What
    else is in a reply under DP is what `meadow.privacy.releases.allowed` lets out; each client weighs 1.
    """
    config = request.config
    round_, store = int(cast(int, config["round"])), _store(node, request)
    client, seen, experiment = request.client, node.view, node.experiment
    node.clock.now("open")
    context = open_context(node, request, before=round_, pooled=experiment.run.placement == "pooled")
    reply, release = RecordDict(), None
    if experiment.privacy.unit in ("example", "local"):
        begins = context.start() | flat(context.memory) | flat(context.auxiliary)
        try:
            release = charge(node.keeper, request.content, round_, client, begins, context.work)
        except Exhausted as reason:
            return RecordDict({"ledger": ConfigRecord({**reason.state, "exhausted": str(reason)})})
        reply["ledger"] = release.state
        context = replace(context, permit=release.permit)
    if config["evaluate"] and allowed(experiment, "metrics"):
        node.clock.now("evaluate")
        context.load(node.algorithm.used(context))
        data = seen.data(f"{client}/test", node.task.client(client).test)
        reply["evaluation"] = MetricRecord(dict(evaluate(seen.model, data, seen.task)))
        context.load(context.start())
    node.clock.now("train")
    result = node.algorithm.train(context)
    node.clock.now("write")
    sent = {name: result.model[name] for name in node.roles.shared}
    if release and experiment.privacy.unit == "local":
        own = [name for name in sent if name in node.roles.trained]
        received, found = {n: context.received[n] for n in own}, {n: sent[n] for n in own}
        sent |= noised_update(experiment, release, received, found)
    lasting = {name: result.model[name] for name in node.roles.personal} | flat(result.memory) | context.remembered
    if lasting:
        attempt, keep_from = int(cast(int, config.get("attempt", 1))), int(cast(int, config["keep-from"]))
        store.save(client, round_, lasting, keep_from, attempt, cast(list[str], config.get("void", [])))
    node.clock.now("reduce")
    known = context.permit is not None or allowed(experiment, "samples")
    metrics: dict[str, Any] = {**samples(node, client, context.data), "steps": result.fitted.steps if known else 0}
    metrics |= result.metrics
    _refuse_undeclared(experiment, result)
    sent |= flat(result.auxiliary)
    weights = name_weights(metrics, sent)
    reply["arrays"] = to_record({name: value for name, value in sent.items() if weights[name] > 0})
    losses = {f"loss/{t}": value for t, value in result.fitted.losses.items() if allowed(experiment, "loss")}
    reply["metrics"] = MetricRecord(metrics | losses)
    return reply


def _refuse_undeclared(experiment: Experiment, result: ClientResult) -> None:
    """Raise UserError for what would leave under DP beside the model without being declared."""
    name = experiment.strategy.name
    extra = sorted({*result.auxiliary} - {*algorithm(name).sends}) + sorted(result.metrics)
    if extra and experiment.privacy.unit != "none":
        raise UserError(
            f'privacy.unit = "{experiment.privacy.unit}" with strategy.name = "{name}": its clients send {", ".join(extra)} '
            "beside the model, which it does not declare; leave them out, or name auxiliary arrays in Algorithm.sends"
        )


def samples(node: Node, client: int, data: Data) -> dict[str, int]:
    """The training samples, in all and of each target; where they are nobody's business, 1 and which targets are held."""
    if allowed(node.experiment, "samples"):
        return {"num-examples": len(data)} | {
            f"num-examples/{t.name}": t.labelled(data.y[t.name]) for t in node.task.targets
        }
    held = dict(zip(node.experiment.task.targets, node.task.held[client], strict=True))
    pooled = node.experiment.run.placement == "pooled"
    return {"num-examples": 1} | {f"num-examples/{t.name}": int(pooled or held[t.name]) for t in node.task.targets}


def evaluate_client(node: Node, request: Request) -> RecordDict:
    """Score the model that the client would use, on its test part; after local fine-tuning too, if that is set.

    The reply holds "evaluation" (model/target/metric, model being "used" or "finetuned"), "identity" (SHA-256 of what
    the client has of its own, and whether it has anything) and, if the message asks for a thorough evaluation,
    "confusion" (of the used model, by class target: its confusion counts, row after row) and, if evaluate.on names it,
    the model "source" in "evaluation": the used one on the source task's test set. Under DP, only what
    `meadow.privacy.releases.allowed` lets out.
    """
    config = request.config
    round_ = int(cast(int, config["round"]))
    context = open_context(node, request, before=round_ + 1)
    client, own, seen = request.client, node.task.client(request.client), node.view
    lasting = context.personal | flat(context.memory)
    sha256 = arrays_sha256(lasting) if allowed(node.experiment, "hashes") else ""
    identity = ConfigRecord({"personal": sha256, "trained": bool(lasting)})
    if not allowed(node.experiment, "metrics"):
        return RecordDict({"evaluation": MetricRecord(), "identity": identity})
    context.load(node.algorithm.used(context))
    test = seen.data(f"{client}/test", own.test)
    reply = RecordDict()
    if config["thorough"]:
        found, counts = examine(seen.model, test, seen.task)
        reply["confusion"] = MetricRecord({target: matrix.flatten().tolist() for target, matrix in counts.items()})
    else:
        found = evaluate(seen.model, test, seen.task)
    scores = {f"used/{key}": value for key, value in found.items()}
    if config["thorough"] and "source" in node.experiment.evaluate.on:
        again = seen.data("source/test", source_data(node.experiment).test)
        scores |= {f"source/{key}": value for key, value in evaluate(seen.model, again, seen.task).items()}
    if config["finetune"]:
        epochs = node.experiment.evaluate.fine_tune_epochs
        data = seen.data(f"{client}/train", own.train)
        beside = Beside(context.validation, dict(context.memory.get(LOOP, {})), context.source)
        train(seen.model, data, seen.task, node.experiment, round_ + 1, client, epochs, beside=beside)
        found = evaluate(seen.model, test, seen.task, thorough=True)
        scores |= {f"finetuned/{key}": value for key, value in found.items()}
    reply["evaluation"] = MetricRecord(dict(scores))
    reply["identity"] = identity
    return reply


def open_context(node: Node, request: Request, before: int, pooled: bool = False) -> LocalContext:
    """What the client has at the start of a round: what was received, and what its rounds earlier than `before` left.

    `pooled`: its data is that of all clients. The received model is in place when this returns.
    """
    config, client, seen = request.config, request.client, node.view
    store = _store(node, request)
    received, sent_along = split_auxiliary(from_record(request.arrays))
    void = cast(list[str], config.get("void", []))
    personal, memory = split_auxiliary(store.load(client, before, void))
    context = LocalContext(
        experiment=node.experiment,
        task=seen.task,
        roles=node.roles,
        whole=node.model,
        model=seen.model,
        data=node.task.client(client).train,
        round=int(cast(int, config["round"])),
        client=client,
        received=received,
        auxiliary=by_kind(sent_along),
        memory=by_kind(memory),
        base=lambda: _base(node, store),
        personal=personal,
        work=float(cast(float, config.get("work", 1.0))),
        validation=_validation(node, client),
        source=_source(node, client),
        fast=None if isinstance(node.fast, str) else node.fast,
    )
    context.load(context.start())
    data = seen.data("pool", node.task.pool()) if pooled else seen.data(f"{client}/train", context.data)
    if client in attackers(node.experiment) and node.experiment.attack.kind in ON_LABELS:
        data = with_wrong_labels(data, node.task.targets)
    return replace(context, data=data)


def add_up(node: Node, answers: list[Answer], sent: Arrays, blocks: Sequence[tuple[int, Sequence[int]]]) -> NodeReply:
    """Replace the arrays of each whole block by their weighted sum, unless one of its clients failed or is at fault.

    Such a block goes to the server client by client, where each reply is judged alone.
    """
    contents = {a.client: a for a in answers}
    sums: dict[Span, WeightedSum] = {}
    for index, clients in blocks:
        updates: list[tuple[float | Mapping[str, float], Arrays]] = []
        for client in clients:
            content, size = contents[client].content, _size(node, client)
            if content is None or weight_fault(metrics_of(content), size):
                break
            if arrays_fault(content, sent, node.experiment.cohort.max_norm):
                break
            weights = name_weights(metrics_of(content), sent, equal_weights(node.experiment))
            updates.append((weights, from_record(cast(ArrayRecord, content["arrays"]))))
        else:
            sums[index, index + 1] = weighted_sum(updates)
            for client in clients:
                contents[client].summed = True
                cast(RecordDict, contents[client].content).pop("arrays")
    return NodeReply(answers, sums)


def _validation(node: Node, client: int) -> Data | None:
    """The client's validation part, as far as the settings ask for it."""
    plan, task = node.experiment.local, node.task
    if not (plan.patience or plan.schedule == "plateau"):
        return None
    if node.experiment.run.placement == "pooled":
        everyone = [task.client(c).validation for c in range(node.experiment.partition.clients)]
        validation, key = concatenate(everyone), "pool/validation"
    else:
        validation, key = task.client(client).validation, f"{client}/validation"
    return node.view.data(key, validation) if len(validation) else None


def _source(node: Node, client: int) -> Data | None:
    """The source domain's samples that the client has beside its own, as far as the settings ask for it."""
    experiment, pooled = node.experiment, node.experiment.run.placement == "pooled"
    if experiment.adapt.method == "none":
        return None
    own = experiment.adapt.where == "clients" or experiment.adapt.method == "match"
    key = f"{client}/source" if own and not pooled else "source"
    return node.view.data(key, source_samples(experiment, None if pooled else client))


def _size(node: Node, client: int) -> int:
    """The training samples that the client may have had in this round."""
    pooled = node.experiment.run.placement == "pooled"
    return len(node.task.pool() if pooled else node.task.client(client).train)


def _store(node: Node, request: Request) -> Store:
    return store_of(node, str(request.config["run"]))


def store_of(node: Node, run: str) -> Store:
    """The node's store of a run; made once, because it counts what it keeps in memory."""
    if run not in node._stores:
        node._stores[run] = Store(node.state_root, run, node.memory)
    return node._stores[run]


def _base(node: Node, store: Store) -> Arrays:
    """What the client starts from besides the shared arrays: sent once if pretrained, else derived from the seed."""
    if store.run not in node._bases:
        node._bases[store.run] = store.base() if node.experiment.task.pretrained else initial_state(node.experiment)
    return node._bases[store.run]
