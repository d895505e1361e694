"""Train whole blocks of clients and send one weighted sum per block.

A kernel (`client/trainers/kernel.py`) trains a block at once if its clients do plain local training of a fully shared model:
FedAvg, and every algorithm that differs from it only at the server. `meadow.client.answers.train_client` trains all others.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, fault, weighted_sum
from meadow.client.answers import validation_scores
from meadow.client.loop.training import Training
from meadow.client.node import Facts, Node, samples, size_of
from meadow.client.trainers.kernel import KernelTrainer
from meadow.runtime.hand import costs_its_client, take
from meadow.strategies import equal_weights
from meadow.strategies.protocol import ClientAlgorithm
from meadow.strategies.roles import name_weights
from meadow.strategies.wire.packing import Answer, NodeReply, Request, Values
from meadow.strategies.wire.replies import arrays_fault, weight_fault
from meadow.tasks.data import Data
from meadow.tasks.evaluation import evaluate, load_into, names_of

log = logging.getLogger("meadow.client")


def train_blocks(
    node: Node, requests: Sequence[Request], blocks: Sequence[tuple[int, Sequence[int]]]
) -> tuple[NodeReply, list[Request]]:
    """Train the blocks that a kernel can train at once. Returns their reply, and the requests that are left.

    The requests of a block are left if one of its clients fails or its arrays are not finite: each client is then trained
    and checked on its own.
    """
    done = NodeReply([])
    trainer = node.trainers.chosen().trainer if blocks else None
    if not isinstance(trainer, KernelTrainer) or not _plain(node):
        return done, list(requests)
    # All blocks share one dictionary of arrays, so a kernel copies it once.
    first, received = requests[0], requests[0].arrays
    asked, left = {request.client: request for request in requests}, {request.client for request in requests}
    at_once, names = trainer.blocks_at_once, set(names_of(node.model))
    for begin in range(0, len(blocks), at_once):
        part = blocks[begin : begin + at_once]
        try:
            packed = [asked[client] for _, clients in part for client in clients]
            same = all(each.arrays is received and each.config is first.config for each in packed)
            if not same or "work" in first.config or received.keys() != names:
                continue
            found = _train(node, trainer, first.config, received, [clients for _, clients in part])
        except BaseException as error:  # the same clients are trained again, one by one, which attributes the error
            if not costs_its_client(error):
                raise
            log.debug("blocks %s go one by one", [index for index, _ in part], exc_info=True)
            continue
        for (index, clients), answered in zip(part, found, strict=True):
            if answered is not None:
                done.answers.extend(answered[0])
                done.sums[index, index + 1] = answered[1]
                left -= set(clients)
    take()
    return done, [request for request in requests if request.client in left]


def add_up(
    node: Node, answers: list[Answer], sent: Mapping[int, Arrays], blocks: Sequence[tuple[int, Sequence[int]]]
) -> NodeReply:
    """Replace the arrays of each whole block by their weighted sum, unless one of its clients failed or is invalid.

    Such a block goes to the server client by client, and the server checks each reply by the same rules. `sent`: the
    arrays that each client received.
    """
    by_client = {a.client: a for a in answers}
    sums: dict[Span, WeightedSum] = {}
    for index, clients in blocks:
        block = [by_client[client] for client in clients]
        updates: list[tuple[float | Mapping[str, float], Arrays]] = []
        for each in block:
            received = sent[each.client]
            if each.values is None or weight_fault(each.metrics, size_of(node, each.client)):
                break
            if arrays_fault(each.arrays, each.metrics, received) or node.stages.judge(each.arrays or {}, received):
                break
            weights = name_weights(each.metrics, received, equal_weights(node.experiment))
            updates.append((weights, cast(Arrays, each.arrays)))
        else:
            sums[index, index + 1] = weighted_sum(updates)
            for each in block:
                each.summed, each.arrays = True, None
    return NodeReply(answers, sums)


def _facts(node: Node, client: int, data: Data) -> Facts:
    """Cached for each client: computing them takes as long as a step of a small model."""
    found = node.facts.get(client)
    return found or node.facts.put(client, Facts(node.trainers.choice(data), samples(node, client, data)), 1)


def _plain(node: Node) -> bool:
    """Whether each client only trains plainly from the received model, and keeps no state."""
    experiment, chosen = node.experiment, type(node.algorithm)
    return (
        chosen.train is ClientAlgorithm.train
        and chosen.used is ClientAlgorithm.used
        and experiment.run.placement == "federated"
        and experiment.privacy.unit == "none"
        and node.stages.plain
        and experiment.attack.kind == "none"
        and not (node.roles.personal or node.roles.fixed)
    )


def _train(
    node: Node, trainer: KernelTrainer, config: Values, received: Arrays, clients: Sequence[Sequence[int]]
) -> Sequence[tuple[list[Answer], WeightedSum] | None]:
    """Answers and weighted sum of each block. A block is None if one of its arrays is not usable; all blocks are None if
    another trainer was chosen for one of the clients."""
    round_, local = config["round"], node.experiment.local
    scores = dict[int, dict[str, Values]]()
    if config["evaluate"]:
        node.clock.now("evaluate")
        load_into(node.model, received)
        for client in (client for block in clients for client in block):
            take(client)
            data = node.view.data(f"{client}/test", node.task.client(client).test)
            tested = evaluate(node.view.model, data, node.view.task)
            scores[client] = {"evaluation": tested, "validation": validation_scores(node, client)}
    node.clock.now("open")
    take(*(client for block in clients for client in block))
    own = {client: node.task.client(client).train for block in clients for client in block}
    facts = {client: _facts(node, client, data) for client, data in own.items()}
    if any(each.choice.trainer is not trainer for each in facts.values()):
        return [None] * len(clients)
    equal = equal_weights(node.experiment)
    counts = {client: name_weights(each.samples, received, equal) for client, each in facts.items()}
    trainings = [[Training(own[client], round_, client, local) for client in block] for block in clients]
    node.clock.now("train")
    weights = [[counts[client] for client in block] for block in clients]
    trained, totals = trainer.train_blocks(received, trainings, weights)
    node.clock.now("reduce")
    found = list[tuple[list[Answer], WeightedSum] | None]()
    for block, each, total in zip(clients, trained, totals, strict=True):
        summed = {name: sum(counts[client][name] for client in block) for name in received}
        whole = all(counts[client][name] > 0 for client in block for name in received)
        if total is None or not whole or fault(total, received, summed, summed=True):
            found.append(None)
            continue
        answers = []
        for client, one in zip(block, each, strict=True):
            metrics: dict[str, Any] = {**facts[client].samples, "steps": one.steps}
            metrics |= {f"loss/{target}": value for target, value in one.losses.items()}
            values: dict[str, Values] = {"metrics": metrics, **scores.get(client, {})}
            answers.append(Answer(client, values, summed=True))
        node.trainers.count(facts[block[0]].choice, len(block))
        found.append((answers, WeightedSum(total, summed)))
    return found
