"""A node: a process that hosts clients. It opens their data and state, and answers the messages packed for it."""

import functools
import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from torch import nn

from client.anchors import teaches
from client.privately import Exhausted, Keeper, charge, noised_update
from client.store import Store
from client.training import Beside, train
from config.durable import Arrays
from config.load import from_flat, to_flat
from config.schema import Experiment
from privacy.ledger import LedgerFault
from privacy.releases import allowed
from strategies.blocks import WeightedSum, fault, weighted_sum
from strategies.packing import Answer, NodeReply, Request
from strategies.sharing import Roles, arrays_sha256, from_record, name_weights, roles, to_record
from tasks.data import Data, concatenate
from tasks.domains import source_samples
from tasks.evaluation import evaluate, examine, load_into, state_of
from tasks.features import View, view
from tasks.shares import hosted
from tasks.task import Task, initial_state, open_task, settle, source_data

log = logging.getLogger("meadow.client")


@dataclass(frozen=True)
class Node:
    """What a process keeps between messages: one task, one model that every client is loaded into, and the store."""

    experiment: Experiment
    task: Task
    model: nn.Module
    roles: Roles
    view: View
    state_root: Path
    keeper: Keeper
    _bases: dict[str, Arrays] = field(default_factory=dict, repr=False, compare=False)


def open_node(context: Context) -> Node:
    """The node of this process for the experiment in the run configuration; made once a process."""
    simulated = bool(context.node_config.get("simulated", False))
    return _open_node(json.dumps(to_flat(from_flat(context.run_config))), _state_root(context), simulated)


@functools.lru_cache(maxsize=8)
def _open_node(flat: str, state_root: Path, simulated: bool) -> Node:
    experiment = settle(from_flat(json.loads(flat)))
    torch.set_num_threads(experiment.engine.threads)
    task = open_task(experiment)
    model = task.new_model()
    parts = roles(experiment, model.state_dict())
    seen = view(task, model, frozen=parts.trunk_is_frozen and not teaches(experiment))
    keeper = Keeper(experiment, state_root, task.dataset.sha256, task.split.sha256, simulated)
    return Node(experiment, task, model, parts, seen, state_root, keeper)


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
    """One client's part of a round: score what it received, train, store what is personal, reply what is shared.

    The reply holds "arrays" (the shared arrays after training, without the heads of targets that no training sample
    has), "metrics" (num-examples in all and for each target, steps, loss of each target) and, if the message asks for
    it, "evaluation" (target/metric of the received model on the client's test part).

    Under example-level and local DP the release is charged before anything else happens, and "ledger" says what the
    client's ledger then holds; if the budget does not allow the release, that is all, with "exhausted", the reason. What
    else is in a reply under DP is what `privacy.releases.allowed` lets out; each client weighs 1.
    """
    config = request.content.config_records["config"]
    round_, store = int(cast(int, config["round"])), Store(node.state_root, str(config["run"]))
    _, memory = _load(node, store, request, round_)
    client, seen, experiment = request.client, node.view, node.experiment
    reply, release = RecordDict(), None
    if experiment.privacy.unit in ("example", "local"):
        try:
            release = charge(node.keeper, request.content, round_, client, state_of(node.model) | _remembered(memory))
        except Exhausted as reason:
            return RecordDict({"ledger": ConfigRecord({**reason.state, "exhausted": str(reason)})})
        reply["ledger"] = release.state
    if config["evaluate"] and allowed(experiment, "metrics"):
        data = seen.data(f"{client}/test", node.task.client(client).test)
        reply["evaluation"] = MetricRecord(dict(evaluate(seen.model, data, seen.task)))
    if node.experiment.run.placement == "pooled":
        data = seen.data("pool", node.task.pool())
    else:
        data = seen.data(f"{client}/train", node.task.client(client).train)
    beside, permit = _beside(node, client, memory), release.permit if release else None
    trained = train(seen.model, data, seen.task, experiment, round_, client, beside=beside, permit=permit)
    state = state_of(node.model)
    if release and experiment.privacy.unit == "local":
        received = from_record(request.content.array_records["arrays"])
        own = [name for name in received if name in node.roles.trained]
        state |= noised_update(experiment, release, {n: received[n] for n in own}, {n: state[n] for n in own})
    if kept := {name: state[name] for name in node.roles.personal} | _remembered(trained.memory):
        store.save(client, round_, kept, keep_from=int(cast(int, config["keep-from"])))
    known = permit is not None or experiment.local.steps > 0 or allowed(experiment, "samples")
    metrics: dict[str, Any] = {**_samples(node, client, data), "steps": trained.steps if known else 0}
    weights = name_weights(metrics, node.roles.shared)
    reply["arrays"] = to_record({name: state[name] for name in node.roles.shared if weights[name] > 0})
    losses = {f"loss/{t}": value for t, value in trained.losses.items() if allowed(experiment, "loss")}
    reply["metrics"] = MetricRecord(metrics | losses)
    return reply


def _samples(node: Node, client: int, data: Data) -> dict[str, int]:
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

    The reply holds "evaluation" (model/target/metric, model being "used" or "finetuned"), "identity" (SHA-256 of the
    client's personal arrays, and whether it has any of its own) and, if the message asks for a thorough evaluation,
    "confusion" (of the used model, by class target: its confusion counts, row after row) and, if evaluate.on names it,
    the model "source" in "evaluation": the used one on the source task's test set. Under DP, only what
    `privacy.releases.allowed` lets out.
    """
    config = request.content.config_records["config"]
    round_, store = int(cast(int, config["round"])), Store(node.state_root, str(config["run"]))
    personal, memory = _load(node, store, request, round_ + 1)
    client, own, seen = request.client, node.task.client(request.client), node.view
    sha256 = arrays_sha256(personal) if allowed(node.experiment, "hashes") else ""
    identity = ConfigRecord({"personal": sha256, "trained": bool(personal)})
    if not allowed(node.experiment, "metrics"):
        return RecordDict({"evaluation": MetricRecord(), "identity": identity})
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
        beside = _beside(node, client, memory)
        train(seen.model, data, seen.task, node.experiment, round_ + 1, client, epochs, beside=beside)
        found = evaluate(seen.model, test, seen.task, thorough=True)
        scores |= {f"finetuned/{key}": value for key, value in found.items()}
    reply["evaluation"] = MetricRecord(dict(scores))
    reply["identity"] = identity
    return reply


def add_up(answers: list[Answer], sent: Arrays, blocks: Sequence[tuple[int, Sequence[int]]]) -> NodeReply:
    """Replace the arrays of each whole block by their weighted sum, unless one of its clients failed or is at fault.

    Such a block goes to the server client by client, where each reply is judged alone.
    """
    contents = {a.client: a for a in answers}
    sums: dict[int, WeightedSum] = {}
    for index, clients in blocks:
        updates: list[tuple[float | Mapping[str, float], Arrays]] = []
        for content in (contents[c].content for c in clients):
            if content is None or "arrays" not in content.array_records:
                break
            arrays = from_record(content.array_records["arrays"])
            weights = name_weights(content.metric_records["metrics"], sent)
            if fault(arrays, sent, weights):
                break
            updates.append((weights, arrays))
        else:
            sums[index] = weighted_sum(updates)
            for client in clients:
                contents[client].summed = True
                cast(RecordDict, contents[client].content).pop("arrays")
    return NodeReply(answers, sums)


_MEMORY = "memory/"
"""In the store, the names of what local training must remember (`Beside.memory`) start with this."""


def _beside(node: Node, client: int, memory: Arrays) -> Beside:
    """What training gets beside the training samples, as far as the settings ask for it."""
    experiment, task, pooled = node.experiment, node.task, node.experiment.run.placement == "pooled"
    validation = source = None
    if experiment.local.patience or experiment.local.schedule == "plateau":
        if pooled:
            everyone = [task.client(c).validation for c in range(experiment.partition.clients)]
            part, key = concatenate(everyone), "pool/validation"
        else:
            part, key = task.client(client).validation, f"{client}/validation"
        validation = node.view.data(key, part) if len(part) else None
    if experiment.adapt.method != "none":
        own = experiment.adapt.where == "clients" or experiment.adapt.method == "match"
        key = f"{client}/source" if own and not pooled else "source"
        source = node.view.data(key, source_samples(experiment, None if pooled else client))
    return Beside(validation, memory, source)


def _remembered(memory: Arrays) -> Arrays:
    return {f"{_MEMORY}{name}": value for name, value in memory.items()}


def _load(node: Node, store: Store, request: Request, before: int) -> tuple[Arrays, Arrays]:
    """Load base, personal and shared arrays into the model, the later over the earlier.

    Returns the client's personal arrays, and what its local training remembers.
    """
    kept = store.load(request.client, before)
    memory = {n.removeprefix(_MEMORY): value for n, value in kept.items() if n.startswith(_MEMORY)}
    personal = {n: value for n, value in kept.items() if not n.startswith(_MEMORY)}
    shared = from_record(request.content.array_records["arrays"])
    load_into(node.model, _base(node, store) | personal | shared)
    return personal, memory


def _base(node: Node, store: Store) -> Arrays:
    """What the client starts from besides the shared arrays: sent once if pretrained, else derived from the seed."""
    if not (node.roles.personal or node.roles.fixed):
        return {}
    if store.run not in node._bases:
        node._bases[store.run] = store.base() if node.experiment.task.pretrained else initial_state(node.experiment)
    return node._bases[store.run]
