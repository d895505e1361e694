"""Strategies whose clients hang, end their process or interrupt it. They are FedAvg, but for what one client does."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import cast

from meadow.client.context import LocalContext
from meadow.strategies.algorithms.fedavg import FedAvg
from meadow.strategies.protocol import Algorithm, ClientAlgorithm, ClientContext, ClientResult

ROUND, CLIENT = 2, 5
"""Who misbehaves, and when."""


class Cancelled(BaseException):
    """An error that is no Exception."""


def _hang() -> None:
    time.sleep(10**6)


def _hang_in_c() -> None:
    ctypes.PyDLL(None).sleep(10**6)  # keeps Python's lock


def _exit() -> None:
    os._exit(0)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _cancel() -> None:
    raise Cancelled


def _interrupt_later() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    signal.signal(signal.SIGALRM, signal.default_int_handler)


def _faulty(*faults: Callable[[], object]) -> Algorithm:
    """The first is the fault of CLIENT, the next that of the client after it."""

    class Client(ClientAlgorithm):
        def train(self, context: ClientContext) -> ClientResult:
            own = cast(LocalContext, context)
            if own.round == ROUND and own.client - CLIENT in range(len(faults)):
                faults[own.client - CLIENT]()
            return super().train(context)

    return Algorithm(FedAvg, client=Client(), averages=True, trains_once=True)


HANGS, HANGS_IN_C = _faulty(_hang), _faulty(_hang_in_c)
EXITS, CRASHES = _faulty(_exit), _faulty(_crash)
FREEZES = _faulty(_freeze)
MANY = _faulty(_hang, _exit, _crash)
INTERRUPTS, CANCELS, INTERRUPTS_LATER = _faulty(_interrupt), _faulty(_cancel), _faulty(_interrupt_later)
FINE = _faulty()
"""FedAvg, one client after another as the others."""
