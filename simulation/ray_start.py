"""Starts Ray on this machine or joins a running cluster (`engine.address`).

Imports neither torch nor Flower, so that a command can start Ray while another thread imports them and opens the data.
"""

import atexit
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

from meadow.runtime.errors import RunStopped, UserError
from meadow.runtime.identity import ROOT
from meadow.runtime.objects import user_paths
from meadow.simulation.children import MEMORY
from meadow.simulation.scratch import Scratch

log = logging.getLogger("meadow.simulation")

_PATIENCE = 10.0
"""Seconds within which a cluster must accept a connection."""
_ATTEMPTS = 3
_TOKEN = secrets.token_hex(32)
"""Ray listens at all addresses of the machine. A Ray that `start_ray` starts answers this process and its children only."""
_scratch: Scratch | None = None
"""The folder of the Ray that `start_ray` started."""
_mine = False
"""Whether `start_ray` started or joined Ray: `stop_ray` leaves a session that existed before alone."""


def start_ray(count: int, threads: int, address: str = "") -> None:
    """Start Ray with room for `count` workers (0: one per core), or join the cluster at `address`.

    Does nothing if this process already uses Ray. Raises UserError if no cluster answers at `address`, RunStopped if Ray
    does not start on this machine.
    """
    global _mine, _scratch
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
        _scratch = Scratch()
        with _variables(variables | own):
            _init(num_cpus=count or os.cpu_count(), _temp_dir=str(_scratch.path), **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray's own handler would abort the run
    _mine = True


def _init(**settings: Any) -> None:
    """Start Ray on this machine. Under load its processes may miss each other: several attempts. Raises RunStopped."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            ray.init(address="local", include_dashboard=False, **settings)
            return
        except Exception as error:  # Ray raises many types when its processes do not start in time
            ray.shutdown()
            if not left:
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                raise RunStopped(
                    f"Ray did not start in {_ATTEMPTS} attempts ({reason}); is the machine overloaded? Run the "
                    "command again, or with --engine inline"
                ) from None
            log.warning("Ray did not start (%s); trying again", type(error).__name__)


def stop_ray() -> None:
    """Stop what `start_ray` started, or leave the cluster that it joined."""
    global _mine, _scratch
    if _mine:
        ray.shutdown()
        _mine = False
    if _scratch is not None:
        _scratch.remove()
        _scratch = None


atexit.register(stop_ray)


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
