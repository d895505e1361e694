"""Starts Ray on this machine or joins a running cluster (`engine.address`).

Imports neither torch nor Flower, so that a command can start Ray while another thread imports them and opens the data.
"""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from meadow.runtime.errors import UserError
from meadow.runtime.identity import ROOT
from meadow.runtime.objects import user_paths
from meadow.simulation.children import MEMORY

_PATIENCE = 10.0
"""Seconds within which a cluster must accept a connection."""
_TOKEN = secrets.token_hex(32)
"""Ray listens at all addresses of the machine. A Ray that `start_ray` starts answers this process and its children only."""
_mine = False
"""Whether `start_ray` started or joined Ray: `stop_ray` leaves a session that existed before alone."""


def start_ray(count: int, threads: int, address: str = "") -> None:
    """Start Ray with room for `count` workers (0: one per core), or join the cluster at `address`.

    Does nothing if this process already uses Ray. Raises UserError if no cluster answers at `address`.
    """
    global _mine
    if ray.is_initialized():
        return
    if not address or os.environ.get("RAY_AUTH_MODE", "token") == "token":
        # The variable alone would be too late: Ray reads it when it is imported.
        Config.initialize('{"AUTH_MODE": "token"}')
        AuthenticationTokenLoader.instance().reset_cache()
    on_term = signal.getsignal(signal.SIGTERM)
    variables = _environment(threads)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        host, _, port = address.rpartition(":")
        try:
            if port.isdecimal():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
            ray.init(address=address, runtime_env={"env_vars": variables}, **quiet)
        except (AuthenticationError, RuntimeError) as error:
            raise UserError(
                f'engine.address = "{address}": Ray could not join ({str(error).splitlines()[0]}); every machine needs the '
                "cluster's token, in ~/.ray/auth_token or RAY_AUTH_TOKEN (docs/cluster.md)"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(
                f'engine.address = "{address}": no Ray cluster answers there ({str(error).splitlines()[0]}); start one with '
                '`ray start --head`, or write engine.address = "" for Ray on this machine alone'
            ) from None
    else:
        # Ray starts workers in advance. They inherit these variables (with a runtime_env, Ray would start other workers
        # and waste the first ones) and import the client's code at once.
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, "RAY_preload_python_modules": "meadow.client.app"}
        with _variables(variables | own):
            ray.init(address="local", num_cpus=count or os.cpu_count(), include_dashboard=False, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray's own handler would abort the run
    _mine = True


def stop_ray() -> None:
    """Stop what `start_ray` started, or leave the cluster that it joined."""
    global _mine
    if _mine:
        ray.shutdown()
        _mine = False


def _environment(threads: int) -> dict[str, str]:
    """The environment variables that a worker needs when it starts."""
    return {
        **MEMORY,
        "PYTHONPATH": os.pathsep.join([*user_paths(), str(ROOT)]),
        "OMP_NUM_THREADS": str(threads),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    }


@contextmanager
def _variables(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
