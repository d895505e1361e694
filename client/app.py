"""The Flower ClientApp, the same on every grid. Messages come packed for all clients of a node (`strategies/packing.py`).

query: join a run, with the arrays that every client starts from; the reply is this node's line of the roll call.
train and evaluate: answer for each client in the pack.
"""

import json

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.node import add_up, answer, evaluate_client, hosted_here, open_node, train_client
from client.store import Store
from config.identity import code_sha256, versions
from privacy.releases import allowed
from strategies.packing import NodeReply, pack_replies, unpack_requests
from strategies.sharing import from_record

app = ClientApp()


@app.query()
def join(message: Message, context: Context) -> Message:
    """Join a run: keep the base arrays, and say which clients are here, with which code, versions and data."""
    node = open_node(context)
    run_id = str(message.content.config_records["config"]["run"])
    if base := from_record(message.content.array_records["base"]):
        Store(node.state_root, run_id).put_base(base)
    clients = list(hosted_here(context, node.experiment.partition.clients))
    roll = ConfigRecord(
        {
            "clients": clients,
            "simulated": node.keeper.simulated,
            "sizes": [len(node.task.client(c).train) if allowed(node.experiment, "samples") else 1 for c in clients],
            "code": code_sha256(),
            "data": node.task.dataset.sha256,
            "split": node.task.split.sha256,
            "versions": json.dumps(versions()),
        }
    )
    return Message(RecordDict({"roll": roll}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients in the pack."""
    requests, blocks = unpack_requests(message.content)
    node = open_node(context)
    answers = answer(node, requests, train_client)
    sent = from_record(requests[0].content.array_records["arrays"])
    return Message(pack_replies(add_up(node, answers, sent, blocks)), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the clients in the pack."""
    requests, _ = unpack_requests(message.content)
    return Message(pack_replies(NodeReply(answer(open_node(context), requests, evaluate_client))), reply_to=message)
