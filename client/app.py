"""The Flower ClientApp, the same on every grid. One message carries the requests to all clients of a node
(`strategies/wire/packing.py`).

query: join a run and store the arrays that every client starts from; the reply is this node's entry in the roll call.
train, evaluate: process each client's request.
"""

import json
import logging
import os
import time
from collections.abc import Sequence

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from meadow.arrays.flower import from_record
from meadow.arrays.folding import fold_for_wire
from meadow.client.answers import Handler, answer, check_state, evaluate_client, train_client
from meadow.client.blocks import add_up, train_blocks
from meadow.client.node import hosted_here, open_node, store_of
from meadow.client.store import Store
from meadow.privacy.releases import allowed
from meadow.runtime.errors import RunStopped
from meadow.runtime.identity import code_sha256, versions
from meadow.runtime.logs import log_lines, printable
from meadow.strategies.wire.packing import (
    Answer,
    NodeReply,
    Request,
    add_spans,
    pack_replies,
    unpack_requests,
    whole_spans,
)
from meadow.tasks.numerics import kernels
from meadow.tasks.splits.shares import use_share

log = logging.getLogger("meadow.client")

log_lines()
use_share(os.environ.get("MEADOW_SHARE", ""))


def join(message: Message, context: Context) -> Message:
    """Join a run: store the base arrays, and report the hosted clients and the code, versions and data of this node."""
    node = open_node(context)
    run_id = str(message.content.config_records["config"]["run"])
    if base := from_record(message.content.array_records["base"]):
        Store(node.state_root, run_id).put_base(base)
    here = hosted_here(context, node.experiment.partition.clients)
    reported = allowed(node.experiment, "samples")
    sizes = node.task.split.sizes[here.start : here.stop, 0] if reported else np.ones(len(here), dtype=np.int64)
    # A deployed node reports the Meadow that is installed on it, not the code that the app bundle brought.
    installed = str(context.node_config.get("code") or code_sha256())
    if installed != code_sha256():
        log.error(
            "this node runs another version of Meadow than the coordinator (code %.12s here, %.12s there), so the "
            "coordinator will refuse it: install the same version",
            installed,
            code_sha256(),
        )
    roll = ConfigRecord(
        {
            "clients": [here.start, here.stop],
            "simulated": node.ledgers.simulated,
            "sizes": sizes.astype("<i8").tobytes(),
            "code": installed,
            "data": node.task.dataset.sha256,
            "split": node.task.split.sha256,
            "versions": json.dumps(versions()),
            "keeps": node.keeps,
        }
    )
    return Message(RecordDict({"roll": roll}), reply_to=message)


def train(message: Message, context: Context, alone: Handler | None = None) -> Message:
    """Train the clients in the pack: block by block where a trainer can, the others one by one.

    alone: answers for each client by itself, in place of blocks and `train_client`.
    """
    began = time.perf_counter()
    requests, blocks = unpack_requests(message.content)
    node = open_node(context)
    node.clock.start("open", began)
    with kernels(node.model):
        by_block, others = train_blocks(node, requests, blocks) if alone is None else (NodeReply([]), requests)
        one_by_one = answer(node, others, alone or train_client)
    node.clock.now("reduce")
    sent = {request.client: request.arrays for request in requests}
    rest = [block for block in blocks if (block[0], block[0] + 1) not in by_block.sums]
    reply = add_up(node, one_by_one, sent, rest)
    answers = sorted([*by_block.answers, *reply.answers], key=lambda answered: answered.client)
    _log_outcomes("trained", sorted(requests, key=lambda request: request.client), answers)
    whole = NodeReply(answers, by_block.sums | reply.sums)
    whole.trainings = node.trainers.trainings.take()
    add_spans(whole, whole_spans(message.content))
    if node.ledgers.simulated and node.experiment.privacy.unit == "none":  # times may reveal private samples
        whole.times = node.clock.read()
    return Message(pack_replies(whole), reply_to=message)


def evaluate(message: Message, context: Context, each: Handler = evaluate_client) -> Message:
    """Evaluate the clients in the pack, by `each` of them; or only check their states."""
    requests, _ = unpack_requests(message.content)
    node = open_node(context)
    if "check" in requests[0].config:  # when a run is resumed
        return Message(pack_replies(NodeReply(answer(node, requests, check_state))), reply_to=message)
    with kernels(node.model):
        answers = answer(node, requests, each)
    if requests[0].config["thorough"]:  # at a run's end
        try:
            store_of(node, requests[0].config["run"]).settle(hosted_here(context, node.experiment.partition.clients))
        except RunStopped as full:  # the states stay in memory: the run is not done
            answers = [Answer(each.client, error=str(full)) for each in answers]
    _log_outcomes("evaluated", requests, answers)
    return Message(pack_replies(NodeReply(answers)), reply_to=message)


def _log_outcomes(verb: str, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    for request, answered in zip(requests, answers, strict=True):
        which = {"round": request.config["round"], "client": answered.client}
        if answered.values is None:
            log.error("failed: %s", printable(answered.error.strip().splitlines()[-1]), extra=which)
        else:
            log.info(verb, extra=which)


app = ClientApp(mods=[fold_for_wire])
app.query()(join)
app.train()(train)
app.evaluate()(evaluate)
