"""Whole blocks of clients, of which one sum leaves: trained at once where a trainer can (`client/trainers/kernel.py`), or
one client after another.

At once only where clients do nothing but plain local training of a model that they share whole: FedAvg, and every algorithm
that differs from it at the server alone. All others go through `meadow.client.node.train_client`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from meadow.client.node import Facts, Node, samples, size_of
from meadow.client.trainers.job import Training
from meadow.client.trainers.kernel import KernelTrainer
from meadow.strategies import equal_weights
from meadow.strategies.protocol import ClientAlgorithm
from meadow.strategies.roles import name_weights
from meadow.strategies.wire.packing import Answer, NodeReply, Request, Values
from meadow.strategies.wire.replies import arrays_fault, weight_fault

from meadow.arrays.named import Arrays
from meadow.arrays.sums import Span, WeightedSum, weighted_sum
from meadow.tasks.data import Data
from meadow.tasks.evaluation import evaluate, load_into, names_of

log = logging.getLogger("meadow.client")


def train_blocks(
    node: Node, requests: Sequence[Request], blocks: Sequence[tuple[int, Sequence[int]]]
) -> tuple[NodeReply, list[Request]]:
    """Train those of the whole blocks that can be trained together; returns what came of them, and the other requests.

    A block with a client that fails, or whose arrays are not finite, is among the others: there each is judged alone.
    """
    done = NodeReply([])
    trainer = node.trainers.chosen().trainer if blocks else None
    if not isinstance(trainer, KernelTrainer) or not _plain(node):
        return done, list(requests)
    # One dictionary for all blocks: kernels take over what is new to them once.
    first, received = requests[0], requests[0].arrays
    asked, left = {request.client: request for request in requests}, {request.client for request in requests}
    at_once, names = trainer.blocks_at_once, set(names_of(node.model))
    for begin in range(0, len(blocks), at_once):
        part = blocks[begin : begin + at_once]
        try:
            together = [[asked[client] for client in clients] for _, clients in part]
            same = all(each.arrays is received and each.config is first.config for block in together for each in block)
            if not same or "work" in first.config or received.keys() != names:
                continue
            found = _train(node, trainer, first.config, received, [clients for _, clients in part])
        except Exception:  # whatever a client's data does, it is met again one by one
            log.debug("blocks %s go one by one", [index for index, _ in part], exc_info=True)
            continue
        for (index, clients), answered in zip(part, found, strict=True):
            if answered is not None:
                done.answers.extend(answered[0])
                done.sums[index, index + 1] = answered[1]
                left -= set(clients)
    return done, [request for request in requests if request.client in left]


def add_up(
    node: Node, answers: list[Answer], sent: Mapping[int, Arrays], blocks: Sequence[tuple[int, Sequence[int]]]
) -> NodeReply:
    """Replace the arrays of each whole block by their weighted sum, unless one of its clients failed or is at fault.

    Such a block goes to the server client by client, where each reply is judged alone by the same rules. `sent`: the
    arrays that each client was sent.
    """
    given = {a.client: a for a in answers}
    sums: dict[Span, WeightedSum] = {}
    for index, clients in blocks:
        block = [given[client] for client in clients]
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
    """Looked up once for each client: for a small model it takes as long as a step."""
    found = node.facts.get(client)
    return found or node.facts.put(client, Facts(node.trainers.choice(data), samples(node, client, data)), 1)


def _plain(node: Node) -> bool:
    """Whether every client's part of a round is plain local training from what it received, and it keeps nothing."""
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
    """The blocks' answers and sums, by the blocks' clients; None of a block where anything is not finite, and of all if
    another trainer is the one for a client."""
    round_, local = config["round"], node.experiment.local
    scores = dict[int, Values]()
    if config["evaluate"]:
        node.clock.now("evaluate")
        load_into(node.model, received)
        for client in (client for block in clients for client in block):
            data = node.view.data(f"{client}/test", node.task.client(client).test)
            scores[client] = evaluate(node.view.model, data, node.view.task)
    node.clock.now("open")
    own = {client: node.task.client(client).train for block in clients for client in block}
    facts = {client: _facts(node, client, data) for client, data in own.items()}
    if any(each.choice.trainer is not trainer for each in facts.values()):
        return [None] * len(clients)
    known = {client: each.samples for client, each in facts.items()}
    equal = equal_weights(node.experiment)
    counts = {c: name_weights(about, received, equal) for c, about in known.items()}
    trainings = [[Training(own[client], round_, client, local) for client in block] for block in clients]
    node.clock.now("train")
    trained, totals = node.trainers.train_blocks(
        trainer, received, trainings, [[counts[client] for client in block] for block in clients]
    )
    node.clock.now("reduce")
    found = list[tuple[list[Answer], WeightedSum] | None]()
    for block, each, total in zip(clients, trained, totals, strict=True):
        whole = all(counts[client][name] > 0 for client in block for name in received)
        if total is None or not whole:
            found.append(None)
            continue
        answers = []
        for client, one in zip(block, each, strict=True):
            metrics: dict[str, Any] = {**known[client], "steps": one.steps}
            metrics |= {f"loss/{target}": value for target, value in one.losses.items()}
            values: dict[str, Values] = {"metrics": metrics}
            if client in scores:
                values["evaluation"] = scores[client]
            answers.append(Answer(client, values, summed=True))
        node.trainers.count(facts[block[0]].choice, len(block))
        weights = {name: sum(counts[client][name] for client in block) for name in received}
        found.append((answers, WeightedSum(total, weights)))
    return found
