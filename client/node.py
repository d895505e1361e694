"""A node: a process that hosts clients. It opens their data and state."""

import functools
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from flwr.app import Context
from torch import nn

from meadow.arrays.lru import LRU
from meadow.arrays.memory import find
from meadow.arrays.named import Arrays, by_kind, split_auxiliary
from meadow.client.context import LocalContext, Observer, with_wrong_labels
from meadow.client.loop.anchors import teaches
from meadow.client.loop.training import keeps
from meadow.client.release import Ledgers
from meadow.client.store import SHARED_MEMORY, Store
from meadow.client.trainers.choose import Choice, Trainers, check_device, trainers_of
from meadow.config.load import from_flat
from meadow.config.schema import Experiment
from meadow.privacy.releases import allowed
from meadow.runtime.clock import Clock
from meadow.runtime.module_cache import enable_cache
from meadow.strategies import algorithm, check
from meadow.strategies.attacks import ON_LABELS, attackers
from meadow.strategies.protocol import ClientAlgorithm, Roles
from meadow.strategies.roles import roles_of
from meadow.strategies.stages import Stages, stages_of
from meadow.strategies.wire.packing import Request
from meadow.strategies.wire.states import known_state
from meadow.tasks.data import Data, concatenate
from meadow.tasks.features import View, view
from meadow.tasks.numerics import placed
from meadow.tasks.readers.domains import source_samples
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


def samples(node: Node, client: int, data: Data) -> dict[str, int]:
    """Training samples in all and by target; where they are private, 1 in all, and by target 1 if the client has it."""
    if allowed(node.experiment, "samples"):
        return {"num-examples": len(data)} | {
            f"num-examples/{t.name}": t.labelled(data.y[t.name]) for t in node.task.targets
        }
    held = dict(zip(node.experiment.task.targets, node.task.held[client], strict=True))
    pooled = node.experiment.run.placement == "pooled"
    return {"num-examples": 1} | {f"num-examples/{t.name}": int(pooled or held[t.name]) for t in node.task.targets}


def open_context(node: Node, request: Request, before: int, pooled: bool = False) -> LocalContext:
    """The client's context at the start of a round: the received arrays, and its state from rounds before `before`.

    `pooled`: its data are those of all clients. On return the model holds the arrays that the client starts from.
    """
    config, client, seen = request.config, request.client, node.view
    store = store_of(node, config["run"])
    received, sent_along = split_auxiliary(request.arrays)
    personal, memory = split_auxiliary(load_state(node, request, before))
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


def load_state(node: Node, request: Request, before: int) -> Arrays:
    """The state of the request's client from rounds before `before` (`Store.load`). Raises LostState."""
    config = request.config
    known = known_state(config, request.client)
    return store_of(node, config["run"]).load(request.client, before, config.get("void", []), known)


def _initial(node: Node, store: Store) -> Arrays:
    """The arrays that every client starts from: sent once if pretrained, else derived from the seed."""
    if store.run not in node._initial:
        node._initial[store.run] = store.base() if node.experiment.task.pretrained else initial_state(node.experiment)
    return node._initial[store.run]
