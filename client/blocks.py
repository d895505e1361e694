"""Whole blocks where faster kernels train their clients (`client/trainers/choose.py`), and what leaves is one sum.

Only where clients do nothing but plain local training of a model that they share whole: FedAvg, and every algorithm that
differs from it at the server alone. All others go through `meadow.client.node.train_client`, one client after another.
"""

import logging
from collections.abc import Sequence
from typing import Any, cast

from flwr.app import ConfigRecord, MetricRecord
from meadow.client.node import Facts, Node, samples
from meadow.client.trainers.choose import Fast
from meadow.strategies import equal_weights
from meadow.strategies.protocol import ClientAlgorithm
from meadow.strategies.roles import name_weights
from meadow.strategies.wire.packing import Answer, NodeReply, Request

from meadow.arrays.flower import from_record, to_content, to_metrics
from meadow.arrays.named import Arrays
from meadow.arrays.sums import WeightedSum
from meadow.tasks.data import Data
from meadow.tasks.evaluation import evaluate, load_into

log = logging.getLogger("meadow.client")


def train_blocks(
    node: Node, requests: Sequence[Request], blocks: Sequence[tuple[int, Sequence[int]]]
) -> tuple[NodeReply, list[Request]]:
    """Train those of the whole blocks that can be trained together; returns what came of them, and the other requests.

    A block with a client that fails, or whose arrays are not finite, is among the others: there each is judged alone.
    """
    done = NodeReply([])
    if not isinstance(node.fast, Fast) or not _plain(node) or not blocks:
        return done, list(requests)
    # One dictionary for all blocks: kernels take over what is new to them once.
    first, received = requests[0], from_record(requests[0].arrays)
    asked, left = {request.client: request for request in requests}, {request.client for request in requests}
    at_once = node.fast.kernels.blocks_at_once
    for begin in range(0, len(blocks), at_once):
        part = blocks[begin : begin + at_once]
        try:
            together = [[asked[client] for client in clients] for _, clients in part]
            same = all(
                each.arrays is first.arrays and each.config is first.config for block in together for each in block
            )
            if not same or "work" in first.config or received.keys() != node.fast.kernels.network.shapes.keys():
                continue
            found = _train(node, node.fast, first.config, received, [clients for _, clients in part])
        except Exception:  # whatever a client's data does, it is met again one by one
            log.debug("blocks %s go one by one", [index for index, _ in part], exc_info=True)
            continue
        for (index, clients), answered in zip(part, found, strict=True):
            if answered is not None:
                done.answers.extend(answered[0])
                done.sums[index, index + 1] = answered[1]
                left -= set(clients)
    return done, [request for request in requests if request.client in left]


def _facts(node: Node, fast: Fast, client: int, data: Data) -> Facts:
    """Looked up once for each client: for a small model it takes as long as a step."""
    found = node.facts.get(client)
    return found or node.facts.put(client, Facts(fast.covers(data), samples(node, client, data)), 1)


def _plain(node: Node) -> bool:
    """Whether every client's part of a round is plain local training from what it received, and it keeps nothing."""
    experiment, chosen = node.experiment, type(node.algorithm)
    return (
        chosen.train is ClientAlgorithm.train
        and chosen.used is ClientAlgorithm.used
        and experiment.run.placement == "federated"
        and experiment.privacy.unit == "none"
        and experiment.attack.kind == "none"
        and not experiment.cohort.max_norm
        and not (node.roles.personal or node.roles.fixed)
    )


def _train(
    node: Node, fast: Fast, config: ConfigRecord, received: Arrays, clients: Sequence[Sequence[int]]
) -> Sequence[tuple[list[Answer], WeightedSum] | None]:
    """The blocks' answers and sums, by the blocks' clients; None of a block where anything is not finite, and of all if a
    client has what kernels do not cover."""
    round_, local = int(cast(int, config["round"])), node.experiment.local
    scores = dict[int, MetricRecord]()
    if config["evaluate"]:
        node.clock.now("evaluate")
        load_into(node.model, received)
        for client in (client for block in clients for client in block):
            data = node.view.data(f"{client}/test", node.task.client(client).test)
            scores[client] = to_metrics(evaluate(node.view.model, data, node.view.task))
    node.clock.now("open")
    own = {client: node.task.client(client).train for block in clients for client in block}
    facts = {client: _facts(node, fast, client, data) for client, data in own.items()}
    if not all(each.covered for each in facts.values()):
        return [None] * len(clients)
    known = {client: each.samples for client, each in facts.items()}
    members = [[fast.member(own[client], round_, client, local) for client in block] for block in clients]
    counts = {c: name_weights(about, received, equal_weights(node.experiment)) for c, about in known.items()}
    node.clock.now("train")
    outcome = fast.kernels.train(
        received, members, fast.rates(round_, local), [[counts[client] for client in block] for block in clients]
    )
    node.clock.now("reduce")
    losses = iter(outcome.losses)
    found = list[tuple[list[Answer], WeightedSum] | None]()
    for block, total in zip(members, outcome.totals, strict=True):
        answers = []
        for member in block:
            trained = fast.trained(member, next(losses))
            metrics: dict[str, Any] = {**known[member.client], "steps": trained.steps}
            metrics |= {f"loss/{target}": value for target, value in trained.losses.items()}
            content: dict[str, MetricRecord] = {"metrics": to_metrics(metrics)}
            if member.client in scores:
                content["evaluation"] = scores[member.client]
            answers.append(Answer(member.client, to_content(content), summed=True))
        weights = {name: sum(counts[m.client][name] for m in block) for name in received}
        whole = all(counts[m.client][name] > 0 for m in block for name in received)
        found.append((answers, WeightedSum(total, weights)) if total is not None and whole else None)
    return found
