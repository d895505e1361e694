"""Clients that misbehave, a listener that stops a run, and many clients, as a user's own objects (copied to each try)."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from meadow.config import schema
from meadow.server.listeners import Listener, RoundDone, RunBegins
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult
from meadow.tasks.data import Part, Raw

ROUND, CLIENT = 2, 1
"""Who misbehaves, and when."""

Fault = Callable[[ClientResult], ClientResult]


def _raises(result: ClientResult) -> ClientResult:
    raise ValueError("as planned \x1b[2J")


def _exits(result: ClientResult) -> ClientResult:
    raise SystemExit(0)


def _interrupts(result: ClientResult) -> ClientResult:
    raise KeyboardInterrupt


def _hangs(result: ClientResult) -> ClientResult:
    time.sleep(10**6)
    return result


def _hangs_in_c(result: ClientResult) -> ClientResult:
    ctypes.PyDLL(None).sleep(10**6)  # with Python's lock
    return result


def _ends(result: ClientResult) -> ClientResult:
    os._exit(0)


def _crashes(result: ClientResult) -> ClientResult:
    os.kill(os.getpid(), signal.SIGSEGV)
    return result


def _fills(value: float) -> Fault:
    return lambda result: replace(result, model={n: np.full_like(a, value) for n, a in result.model.items()})


def _shape(result: ClientResult) -> ClientResult:
    return replace(result, model={n: a.reshape(-1)[:-1] for n, a in result.model.items()})


def _more(result: ClientResult) -> ClientResult:
    return replace(result, auxiliary={"nobody": {"asked": np.zeros(9, np.float32)}})


def _algorithm(fault: Fault) -> Algorithm:
    """FedAvg, but for what one client does in one round."""

    class Client(ClientAlgorithm):
        def train(self, context: ClientContext) -> ClientResult:
            result = super().train(context)
            return fault(result) if (context.round, context.client) == (ROUND, CLIENT) else result  # type: ignore[attr-defined]

    return Algorithm(FedAvg, client=Client(), averages=True, trains_once=True)


RAISES, EXITS, INTERRUPTS = _algorithm(_raises), _algorithm(_exits), _algorithm(_interrupts)
HANGS, HANGS_IN_C, ENDS, CRASHES = (_algorithm(fault) for fault in (_hangs, _hangs_in_c, _ends, _crashes))
NAN, HUGE, SHAPE, MORE = (_algorithm(fault) for fault in (_fills(float("nan")), _fills(3e38), _shape, _more))


class Half(Listener):
    """Stops the run after half of its rounds."""

    def run_begins(self, run: RunBegins) -> None:
        self.last = int(run.experiment["run"]["rounds"]) // 2

    def round_done(self, done: RoundDone) -> str | None:
        return "as planned" if done.round == self.last else None


def many(task: schema.Task) -> Raw:
    """Five samples for each of 3,000 clients."""
    draw = np.random.default_rng(1)
    x = draw.normal(size=(15_000, 4)).astype(np.float32)
    y, owner = (x[:, 0] > 0).astype(np.int64), np.repeat([f"{i:04}" for i in range(3000)], 5)
    test = Part(torch.from_numpy(x[:20].copy()), {"y": y[:20]})
    return Raw("many", Part(torch.from_numpy(x), {"y": y}, owner), test, kinds={"y": "class"})
