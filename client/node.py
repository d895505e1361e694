"""A node: a process that hosts clients. It opens their data and state, and answers their requests."""

import functools
import json
import logging
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import Context
from torch import nn

from meadow.arrays.lru import LRU
from meadow.arrays.memory import find
from meadow.arrays.named import Arrays, arrays_sha256, by_kind, flat, split_auxiliary
from meadow.client.context import LocalContext, Observer, with_wrong_labels
from meadow.client.loop.anchors import teaches
from meadow.client.loop.training import LOOP, Training, keeps, train
from meadow.client.release import Exhausted, Ledgers, PrivateRelease, charge, noised_update
from meadow.client.store import SHARED_MEMORY, Store
from meadow.client.trainers.choose import Choice, Trainers, check_device, trainers_of
from meadow.config.load import from_flat
from meadow.config.schema import Experiment
from meadow.privacy.ledger import LedgerFault
from meadow.privacy.releases import allowed
from meadow.runtime.clock import Clock
from meadow.runtime.errors import UserError
from meadow.runtime.module_cache import enable_cache
from meadow.strategies import algorithm, check
from meadow.strategies.attacks import ON_LABELS, attackers
from meadow.strategies.protocol import ClientAlgorithm, ClientResult, Roles
from meadow.strategies.roles import name_weights, roles_of
from meadow.strategies.stages import Stages, stages_of
from meadow.strategies.wire.packing import Answer, Request, Values
from meadow.tasks.data import Data, concatenate
from meadow.tasks.evaluation import evaluate, examine
from meadow.tasks.features import View, view
from meadow.tasks.numerics import placed
from meadow.tasks.readers.domains import source_samples
from meadow.tasks.source import source_data
from meadow.tasks.splits.shares import hosted
from meadow.tasks.start import initial_state
from meadow.tasks.task import Task, open_task, settle

log = logging.getLogger("meadow.client")

FACTS = 10_000
"""Clients whose `Facts` a process caches."""


@dataclass(frozen=True)
class Facts:
    """Constants of a client's training data: the trainer for plain training, and the sample counts (in all, by target)."""

    choice: Choice
    samples: dict[str, int]


@dataclass(frozen=True)
class Node:
    """What a process keeps between messages: the task, one model that every client in turn is loaded into, and stores."""

    experiment: Experiment
    task: Task
    model: nn.Module
    roles: Roles
    view: View
    algorithm: ClientAlgorithm
    state_root: Path
    ledgers: Ledgers
    trainers: Trainers
    stages: Stages
    memory: int = 0
    """Bytes of clients' states that this process may keep in shared memory."""
    clock: Clock = field(default_factory=Clock, repr=False, compare=False)
    """Times the phases of the current message."""
    observers: list[Observer] = field(default_factory=list, repr=False, compare=False)
    """Empty except in an audit."""
    facts: LRU[int, Facts] = field(default_factory=lambda: LRU(FACTS), repr=False, compare=False)
    _stores: dict[str, Store] = field(default_factory=dict, repr=False, compare=False)
    _initial: dict[str, Arrays] = field(default_factory=dict, repr=False, compare=False)

    @property
    def keeps(self) -> bool:
        """Whether clients keep state from round to round: personal layers, or memory of the algorithm, a stage or the
        loop."""
        remembers = type(self.algorithm) is not ClientAlgorithm or self.stages.keeps or keeps(self.experiment)
        return bool(self.roles.personal) or remembers


def open_node(context: Context) -> Node:
    """The node for the experiment in the run configuration; cached, so each process makes it once."""
    simulated = bool(context.node_config.get("simulated", False))
    nodes = int(cast(int, context.node_config.get("num-partitions", 1)))
    shared = str(context.node_config.get("data", ""))
    # Where clients keep their state: the node's `state` setting, else MEADOW_STATE, else ~/.meadow.
    state = context.node_config.get("state") or os.environ.get("MEADOW_STATE") or Path.home() / ".meadow" / "state"
    return _open_node(_resolved(json.dumps(dict(context.run_config))), Path(str(state)), simulated, nodes, shared)


@functools.lru_cache(maxsize=8)
def _resolved(flat: str) -> Experiment:
    """The experiment of a run configuration, as JSON, with all defaults filled in."""
    return from_flat(json.loads(flat))


@functools.lru_cache(maxsize=8)
def _open_node(experiment: Experiment, state_root: Path, simulated: bool, nodes: int, shared: str) -> Node:
    for address in shared.split():
        try:
            find(address)
        except OSError as error:  # this process then reads the data itself
            log.warning("cannot open the data in shared memory, so this process reads the files: %s", error)
    experiment = settle(experiment)
    check(experiment)
    torch.set_num_threads(experiment.engine.threads)
    task = open_task(experiment)
    check_device(experiment)
    model = enable_cache(placed(task.new_model(), experiment.engine.device, experiment.engine.exact))
    parts, chosen = roles_of(experiment, model), algorithm(experiment.strategy.name)
    seen = view(task, model, frozen=parts.trunk_is_frozen and not teaches(experiment))
    ledgers = Ledgers(experiment, state_root, task.dataset.sha256, task.split.sha256, simulated)
    # Only a simulation on one machine keeps states in memory: machines of a cluster share none.
    in_memory = simulated and not experiment.engine.address and SHARED_MEMORY.is_dir()
    memory = experiment.engine.state_memory * 2**20 // nodes if in_memory else 0
    trainers, stages = trainers_of(experiment, seen), stages_of(experiment, parts)
    return Node(experiment, task, model, parts, seen, chosen.client, state_root, ledgers, trainers, stages, memory)


def hosted_here(context: Context, clients: int) -> range:
    """The clients that this node hosts, by its partition-id of num-partitions."""
    index = int(cast(int, context.node_config.get("partition-id", 0)))
    nodes = int(cast(int, context.node_config.get("num-partitions", 1)))
    return hosted(index, nodes, clients)


def answer(node: Node, requests: Sequence[Request], handler: Callable[[Node, Request], Answer]) -> list[Answer]:
    """Answer the requests in order. If a client raises, its own answer is the traceback, and the others continue.

    Under DP only the error's type leaves (and a LedgerFault's text); the node's log has the rest.
    """
    answers = []
    for request in requests:
        try:
            answers.append(handler(node, request))
        except LedgerFault as fault:
            answers.append(Answer(request.client, error=f"client {request.client}: {fault}"))
        except Exception as error:  # any error of a client's data or model is that client's alone
            if not allowed(node.experiment, "errors"):
                log.exception("client %d failed", request.client)
                text = f"{type(error).__name__}; see the node's log, or write privacy.release = errors"
            else:
                text = traceback.format_exc()
            answers.append(Answer(request.client, error=f"client {request.client}: {text}"))
    return answers


def train_client(node: Node, request: Request) -> Answer:
    """Run one client's round: evaluate its model if asked, train it, store its personal state, and return its answer.

    The answer has arrays (the trained shared ones and the algorithm's auxiliary ones, without heads for which the client
    has no labels), "metrics" (num-examples in all and by target, steps, loss by target, and the algorithm's own) and, if
    the request asks for it, "evaluation" (target/metric of the model that the client would use, on its test part).

    Under example-level and local DP the release is charged first, and "ledger" reports the ledger's new state. If the
    budget does not allow the release, the answer has only "ledger", with the reason as "exhausted". Under DP the answer
    has only what `meadow.privacy.releases.allowed` permits, and every client weighs 1.
    """
    config, client, experiment = request.config, request.client, node.experiment
    node.clock.now("open")
    context = open_context(node, request, before=config["round"], pooled=experiment.run.placement == "pooled")
    reply, release = dict[str, Values](), None
    if experiment.privacy.unit in ("example", "local"):
        begins = context.start() | flat(context.memory) | flat(context.auxiliary)
        try:
            release = charge(node.ledgers, request.ledger, context.round, client, begins, context.work)
        except Exhausted as reason:
            return Answer(client, {"ledger": {**reason.state, "exhausted": str(reason)}})
        reply["ledger"] = release.state
        context = replace(context, permit=release.permit)
    if config["evaluate"] and allowed(experiment, "metrics"):
        node.clock.now("evaluate")
        context.load(node.algorithm.used(context))
        data = node.view.data(f"{client}/test", node.task.client(client).test)
        reply["evaluation"] = evaluate(node.view.model, data, node.view.task)
        context.load(context.start())
    node.clock.now("train")
    result = node.algorithm.train(context)
    node.clock.now("write")
    _refuse_undeclared(experiment, result)
    reply["metrics"], auxiliary = _metrics(node, context, result), flat(result.auxiliary)
    weights = name_weights(reply["metrics"], [*node.roles.shared, *auxiliary])
    trained = {name: result.model[name] for name in node.roles.shared}
    noise = _noise(node, client, release)
    left = node.stages.leave(trained, client, context.round, context.received, weights, noise, context.memory)
    lasting = {name: result.model[name] for name in node.roles.personal} | flat(result.memory)
    lasting |= context.remembered | left.memory
    if lasting:
        attempt, void = config.get("attempt", 1), config.get("void", [])
        store_of(node, config["run"]).save(client, context.round, lasting, config["keep-from"], attempt, void)
    node.clock.now("reduce")
    return Answer(client, reply, left.arrays | {name: a for name, a in auxiliary.items() if weights[name] > 0})


def _metrics(node: Node, context: LocalContext, result: ClientResult) -> dict[str, Any]:
    """The metrics of a client's training that may leave."""
    known = context.permit is not None or allowed(node.experiment, "samples")
    steps = result.fitted.steps if known else 0
    reported = result.fitted.losses if allowed(node.experiment, "loss") else {}
    losses = {f"loss/{target}": value for target, value in reported.items()}
    return {**samples(node, context.client, context.data), "steps": steps, **result.metrics, **losses}


def _noise(node: Node, client: int, release: PrivateRelease | None) -> Callable[[Arrays, Arrays], Arrays] | None:
    """The noise of a charged release: (received, trained) -> arrays that may leave, of the arrays that learn."""
    if release is None:
        return None

    def noised(received: Arrays, trained: Arrays) -> Arrays:
        for observer in node.observers:
            observer.noises(client, release)
        return noised_update(node.experiment, release, received, trained)

    return noised


def _refuse_undeclared(experiment: Experiment, result: ClientResult) -> None:
    """Raise UserError if the algorithm, under DP, sends more than the model and its declared auxiliary arrays."""
    name = experiment.strategy.name
    extra = sorted({*result.auxiliary} - {*algorithm(name).sends}) + sorted(result.metrics)
    if extra and experiment.privacy.unit != "none":
        raise UserError(
            f'privacy.unit = "{experiment.privacy.unit}" with strategy.name = "{name}": its clients send {", ".join(extra)} '
            "without declaring it; leave it out, or name auxiliary arrays in Algorithm.sends"
        )


def samples(node: Node, client: int, data: Data) -> dict[str, int]:
    """Training samples in all and by target; where they are private, 1 in all, and by target 1 if the client has it."""
    if allowed(node.experiment, "samples"):
        return {"num-examples": len(data)} | {
            f"num-examples/{t.name}": t.labelled(data.y[t.name]) for t in node.task.targets
        }
    held = dict(zip(node.experiment.task.targets, node.task.held[client], strict=True))
    pooled = node.experiment.run.placement == "pooled"
    return {"num-examples": 1} | {f"num-examples/{t.name}": int(pooled or held[t.name]) for t in node.task.targets}


def evaluate_client(node: Node, request: Request) -> Answer:
    """Evaluate the model that the client would use on its test part, and again after local fine-tuning if that is set.

    The answer has "evaluation" (model/target/metric; model is "used" or "finetuned") and "identity" (SHA-256 of the
    client's personal state, and whether it has any). A thorough evaluation adds "confusion" (of the used model, by class
    target: the counts, row by row) and, if evaluate.on has it, "source" in "evaluation": the used model on the source
    task's test set. Under DP only what `meadow.privacy.releases.allowed` permits.
    """
    config, client, own, seen = request.config, request.client, node.task.client(request.client), node.view
    context = open_context(node, request, before=config["round"] + 1)
    lasting = context.personal | flat(context.memory)
    sha256 = arrays_sha256(lasting) if allowed(node.experiment, "hashes") else ""
    reply: dict[str, Values] = {"identity": {"personal": sha256, "trained": bool(lasting)}}
    if not allowed(node.experiment, "metrics"):
        return Answer(client, reply)
    context.load(node.algorithm.used(context))
    test = seen.data(f"{client}/test", own.test)
    if config["thorough"]:
        found, counts = examine(seen.model, test, seen.task)
        reply["confusion"] = {target: matrix.flatten().tolist() for target, matrix in counts.items()}
    else:
        found = evaluate(seen.model, test, seen.task)
    scores = {f"used/{key}": value for key, value in found.items()}
    if config["thorough"] and "source" in node.experiment.evaluate.on:
        again = seen.data("source/test", source_data(node.experiment).test)
        scores |= {f"source/{key}": value for key, value in evaluate(seen.model, again, seen.task).items()}
    if config["finetune"]:
        plan, epochs = node.experiment.local, node.experiment.evaluate.fine_tune_epochs
        training = Training(
            seen.data(f"{client}/train", own.train), config["round"] + 1, client, plan, epochs,
            validation=context.validation, memory=context.memory.get(LOOP), source=context.source,
        )  # fmt: skip
        train(seen.model, training, seen.task, node.experiment)
        found = evaluate(seen.model, test, seen.task, thorough=True)
        scores |= {f"finetuned/{key}": value for key, value in found.items()}
    reply["evaluation"] = scores
    return Answer(client, reply)


def open_context(node: Node, request: Request, before: int, pooled: bool = False) -> LocalContext:
    """The client's context at the start of a round: the received arrays, and its state from rounds before `before`.

    `pooled`: its data are those of all clients. On return the model holds the arrays that the client starts from.
    """
    config, client, seen = request.config, request.client, node.view
    store = store_of(node, config["run"])
    received, sent_along = split_auxiliary(request.arrays)
    personal, memory = split_auxiliary(store.load(client, before, config.get("void", [])))
    context = LocalContext(
        experiment=node.experiment,
        task=seen.task,
        roles=node.roles,
        whole=node.model,
        model=seen.model,
        trainers=node.trainers,
        data=node.task.client(client).train,
        round=config["round"],
        client=client,
        received=received,
        auxiliary=by_kind(sent_along),
        memory=by_kind(memory),
        initial=lambda: _initial(node, store),
        personal=personal,
        work=config.get("work", 1.0),
        validation=_validation(node, client),
        source=_source(node, client),
        observers=node.observers,
    )
    context.load(context.start())
    data = seen.data("pool", node.task.pool()) if pooled else seen.data(f"{client}/train", context.data)
    if client in attackers(node.experiment) and node.experiment.attack.kind in ON_LABELS:
        data = with_wrong_labels(data, node.task.targets)
    return replace(context, data=data)


def _validation(node: Node, client: int) -> Data | None:
    """The client's validation part; None if no setting uses it or it is empty."""
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
    """The source domain's samples that the client trains on as well; None without `[adapt]`."""
    experiment, pooled = node.experiment, node.experiment.run.placement == "pooled"
    if experiment.adapt.method == "none":
        return None
    own = experiment.adapt.where == "clients" or experiment.adapt.method == "match"
    key = f"{client}/source" if own and not pooled else "source"
    return node.view.data(key, source_samples(experiment, None if pooled else client))


def size_of(node: Node, client: int) -> int:
    """Number of samples that the client trains on: its own, or all if pooled."""
    pooled = node.experiment.run.placement == "pooled"
    return len(node.task.pool() if pooled else node.task.client(client).train)


def store_of(node: Node, run: str) -> Store:
    """The node's store of a run; one object, because it counts the bytes that it keeps in memory."""
    if run not in node._stores:
        node._stores[run] = Store(node.state_root, run, node.memory)
    return node._stores[run]


def _initial(node: Node, store: Store) -> Arrays:
    """The arrays that every client starts from: sent once if pretrained, else derived from the seed."""
    if store.run not in node._initial:
        node._initial[store.run] = store.base() if node.experiment.task.pretrained else initial_state(node.experiment)
    return node._initial[store.run]
