"""A node's answers to the requests to its clients: train one, evaluate one."""

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from meadow.arrays.files import DamagedFile
from meadow.arrays.named import Arrays, arrays_sha256, flat
from meadow.client.context import LocalContext
from meadow.client.loop.training import LOOP, Training, train
from meadow.client.node import Node, load_state, open_context, samples, store_of
from meadow.client.release import Exhausted, PrivateRelease, charge, noised_update
from meadow.client.store import LostState
from meadow.config.schema import Experiment
from meadow.privacy.ledger import LedgerFault
from meadow.privacy.releases import allowed
from meadow.runtime.errors import UserError
from meadow.runtime.hand import costs_its_client, take
from meadow.strategies import algorithm
from meadow.strategies.protocol import ClientAlgorithm, ClientResult
from meadow.strategies.roles import name_weights
from meadow.strategies.wire.packing import Answer, Request, Values
from meadow.tasks.evaluation import evaluate, examine
from meadow.tasks.source import source_data

log = logging.getLogger("meadow.client")


Handler = Callable[[Node, Request], Answer]
"""Answers one request to one client."""


def answer(node: Node, requests: Sequence[Request], handler: Handler) -> list[Answer]:
    """Answer the requests in order. If a client raises, its own answer is the traceback, and the others continue.

    Under DP only the error's type leaves (and a LedgerFault's text); the node's log has the rest.
    """
    answers = []
    for request in requests:
        take(request.client)
        try:
            answers.append(handler(node, request))
        except LostState as fault:
            answers.append(Answer(request.client, error=f"client {request.client}: {fault}", lost=True))
        except LedgerFault as fault:
            answers.append(Answer(request.client, error=f"client {request.client}: {fault}"))
        except BaseException as error:  # of a client's data or model
            if not costs_its_client(error):
                raise
            if not allowed(node.experiment, "errors"):
                log.exception("client %d failed", request.client)
                text = f"{type(error).__name__}; see the node's log, or write privacy.release = errors"
            else:
                text = str(error) if isinstance(error, DamagedFile | UserError) else traceback.format_exc()
            answers.append(Answer(request.client, error=f"client {request.client}: {text}"))
    take()
    return answers


def train_client(node: Node, request: Request) -> Answer:
    """Run one client's round: evaluate its model if asked, train it, store its personal state, and return its answer.

    The answer has arrays (the trained shared ones and the algorithm's auxiliary ones, without heads for which the client
    has no labels), "metrics" (num-examples in all and by target, steps, loss by target, and the algorithm's own) and, if
    the request asks for it, "evaluation" (target/metric of the model that the client would use, on its test part) and
    "validation" (`_validation_scores`).

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
        reply["validation"] = _validation_scores(node, context)
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
    own = {name: result.model[name] for name in node.roles.personal}
    if diverged := next((name for name, array in own.items() if not np.isfinite(array).all()), None):
        raise UserError(f"{diverged} has values that are not finite after training; write a smaller local.lr")
    lasting = own | flat(result.memory)
    lasting |= context.remembered | left.memory
    if lasting:
        attempt, void = config.get("attempt", 1), config.get("void", [])
        store_of(node, config["run"]).save(client, context.round, lasting, config["keep-from"], attempt, void)
    node.clock.now("reduce")
    sent = left.arrays | {name: a for name, a in auxiliary.items() if weights[name] > 0}
    return Answer(client, reply, sent, kept=bool(lasting))


def check_state(node: Node, request: Request) -> Answer:
    """Read the client's state, and answer nothing. Raises LostState."""
    load_state(node, request, request.config["round"] + 1)
    return Answer(request.client, {})


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


def validation_scores(node: Node, client: int, model: str = "validation") -> dict[str, float]:
    """Scores of the loaded model on the client's validation part, by model/target/metric; empty if evaluate.validation is
    off or the part is empty."""
    part, seen = node.task.client(client).validation, node.view
    if not node.experiment.evaluate.validation or not len(part):
        return {}
    scores = evaluate(seen.model, seen.data(f"{client}/validation", part), seen.task)
    return {f"{model}/{key}": value for key, value in scores.items()}


def _validation_scores(node: Node, context: LocalContext) -> dict[str, float]:
    """`validation_scores` of the model that the client would use, which is loaded; and as "validation_shared" of the
    received one, if the algorithm lets clients use another. That one may be loaded afterwards."""
    scores = validation_scores(node, context.client)
    if scores and not node.roles.personal and type(node.algorithm).used is not ClientAlgorithm.used:
        context.load(context.start())
        scores |= validation_scores(node, context.client, "validation_shared")
    return scores


def evaluate_client(node: Node, request: Request) -> Answer:
    """Evaluate the model that the client would use on its test part, and again after local fine-tuning if that is set.

    The answer has "evaluation" (model/target/metric; model is "used" or "finetuned", or as in `_validation_scores`) and
    "identity" (SHA-256 of the client's personal state, and whether it has any). A thorough evaluation adds "confusion" (of
    the used model, by class target: the counts, row by row) and, if evaluate.on has it, "source" in "evaluation": the used
    model on the source task's test set. Under DP only what `meadow.privacy.releases.allowed` permits.
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
    scores |= _validation_scores(node, context)
    if config["finetune"]:
        context.load(node.algorithm.used(context))
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
