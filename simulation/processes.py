"""The processes engine: a real SuperLink and SuperNodes on loopback, started with Flower's own commands.

Each run has its own ports, private ``FLWR_HOME`` folders and logs in the run folder, and no process outlives the call
(`simulation/children.py`). Verified with flwr 1.41.0.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from meadow.arrays.files import writing
from meadow.config.load import to_flat
from meadow.config.schema import Experiment
from meadow.native import build
from meadow.runtime.errors import RunStopped, UserError
from meadow.runtime.objects import user_paths
from meadow.simulation.bundle import write_app
from meadow.simulation.children import MEMORY, Children, children, free_port, tail
from meadow.simulation.grid import node_settings

Value = bool | int | float | str

CONNECTION = "meadow"
START_TIMEOUT = 60.0
"""Seconds that a SuperLink may take to answer its health check (importing flwr takes 0.7 s on an idle core)."""
EXECUTOR_POLL = 0.1
"""Seconds between a SuperExec's polls for a task; Flower's default is 1 s."""
_STOPPED = f"{RunStopped.__module__}.{RunStopped.__name__}: "
STATUS_GRACE = 10.0
"""Seconds that Flower may take to give a run that ended its final status."""

_SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(EXECUTOR_POLL),
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


def run_processes(experiment: Experiment, out: Path, resume: bool, nodes: int) -> None:
    """Run the experiment in `out` on one SuperLink and `nodes` SuperNodes on loopback.

    `resume`: continue the run in `out`. Logs are in `out/logs`: `superlink`, `serverapp` (with the ServerApp's output),
    `node-i` (with its ClientApps' output) and `run`. The clients' state is in `out/state`. Raises RuntimeError with the
    end of the relevant log when the run fails or a process dies.
    """
    out = out.resolve()  # the processes run in other folders, where a relative path would mean another place
    logs, work = out / "logs", out / "flower"
    config: dict[str, Value] = {**to_flat(experiment), "out": str(out), "resume": resume}
    with writing(work):
        app = write_app(work / "app")
    with (
        children(logs) as group,
        superlink(group, work) as link,
        supernodes(group, link, nodes, work, out / "state"),
    ):
        run_app(group, link, app, config)


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink: its address, and the ``FLWR_HOME`` whose ``config.toml`` names it."""

    address: str
    home: Path
    work: Path


def environment(home: Path) -> dict[str, str]:
    """The environment of a child: ours, without the caller's ``FLWR_*`` variables and with a private ``FLWR_HOME``.

    A caller's variable that switches on gRPC or names another home would change the run. The folders of ``PYTHONPATH``
    stay, as absolute paths, because a user's modules are there. Flower puts the app bundle before them, so Meadow's code
    still comes from the bundle; the roll call compares its hash. Bundles have no compiled code: children use ours.
    Connections to loopback bypass proxies.
    """
    home.mkdir(parents=True, exist_ok=True)
    kept = {key: text for key, text in os.environ.items() if not key.startswith("FLWR_")}
    # Flower's processes start each other by name, so PATH must list this interpreter's folder first.
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    kept.setdefault("MEADOW_NATIVE", str(Path(build.__file__).parent))
    for name in ("no_proxy", "NO_PROXY"):
        kept[name] = ",".join([*filter(None, [kept.get(name)]), "127.0.0.1", "localhost"])
    own = {"PATH": path, "PYTHONPATH": os.pathsep.join(user_paths()), "FLWR_HOME": str(home)}
    return MEMORY | kept | _SETTINGS | own


def command(name: str) -> str:
    """The path of one of Flower's commands, which are in this interpreter's folder."""
    return str(Path(sys.executable).parent / name)


@contextmanager
def superlink(group: Children, work_dir: Path, simulation: bool = False) -> Iterator[SuperLink]:
    """A SuperLink with its SuperExec on a free port of 127.0.0.1, ready for ``flwr run``.

    With ``--isolation process`` we start the SuperExec. A SuperLink would start it in another session, where signals to our
    process group reach neither it nor its ServerApp.
    """
    work, home = work_dir / "superlink", work_dir / "superlink" / "flwr"
    with free_port() as port:
        address = f"127.0.0.1:{port}"
        home.mkdir(parents=True, exist_ok=True)
        connection = {"address": address, "insecure": True}
        (home / "config.toml").write_text(
            tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}), encoding="utf-8"
        )
        options = ["--simulation"] if simulation else []
        group.start(
            "superlink",
            [
                *(command("flower-superlink"), "--insecure", "--isolation", "process"),
                *("--host", "127.0.0.1", "--port", str(port), *options),
            ],
            work,
            environment(home),
        )
        executor = [command("flower-superexec"), "--insecure", "--runtime-api-address", address]
        group.start("serverapp", executor, work, environment(home))
        wait_healthy(group, address)
        yield SuperLink(address, home, work)


@contextmanager
def supernodes(group: Children, link: SuperLink, nodes: int, work_dir: Path, state: Path) -> Iterator[None]:
    """``nodes`` SuperNodes, node *i* with the *i*-th share of the clients, whose state is in ``state``.

    Each has its own ``FLWR_HOME``, like nodes on different machines: two nodes that unpack the app into one folder at the
    same time would read each other's incomplete files.
    """
    with ExitStack() as ports:
        for index in range(nodes):
            work = work_dir / f"node-{index}"
            port = ports.enter_context(free_port())
            settings = inline_config(node_settings(index, nodes, state))
            group.start(
                f"node-{index}",
                [
                    *(command("flower-supernode"), "--insecure", "--superlink", link.address),
                    *("--host", "127.0.0.1", "--port", str(port), "--node-config", settings),
                ],
                work,
                environment(work / "flwr"),
            )
        yield


def wait_healthy(group: Children, address: str) -> None:
    """Wait until ``GET /health`` answers 200; raise RuntimeError if a child ends first or after START_TIMEOUT."""
    deadline = time.monotonic() + START_TIMEOUT
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        group.require_alive()
        try:
            with direct.open(f"http://{address}/health", timeout=1.0) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    log = tail(group.running[0].log)
    raise RuntimeError(f"nothing answered at http://{address}/health within {START_TIMEOUT:g} s\n{log}")


def inline_config(config: Mapping[str, Value]) -> str:
    """``key=value`` pairs in the one-line form of ``--node-config``; text is quoted and may contain one kind of quote."""
    pairs = []
    for key, value in config.items():
        if isinstance(value, str):
            quote = '"' if not set(value) & set('"\\') else "'"
            if quote in value or "\n" in value:
                raise UserError(
                    f"{key} = {value!r}: Flower does not accept this value; use a path without quotes or line breaks"
                )
            pairs.append(f"{key}={quote}{value}{quote}")
        else:
            pairs.append(f"{key}={str(value).lower()}")
    return " ".join(pairs)


def run_app(
    group: Children,
    link: SuperLink,
    app_dir: Path,
    run_config: Mapping[str, Value],
    federation_config: Mapping[str, Value] | None = None,
) -> None:
    """Submit the app, follow it to its end, and raise ``RuntimeError`` unless it completed.

    ``flwr run --stream`` always ends with 0, so the run's status comes from ``flwr ls``.
    """
    overrides = link.work / "run-config.toml"
    overrides.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
    options = ["--run-config", str(overrides), "--stream"]
    if federation_config:
        options += ["--federation-config", inline_config(federation_config)]
    submitted = group.start(
        "run", [command("flwr"), "run", str(app_dir.resolve()), CONNECTION, *options], link.work, environment(link.home)
    )
    while submitted.process.poll() is None:
        for child in group.running:
            if child is not submitted and child.process.poll() is not None:
                group.require_alive()
        time.sleep(0.05)
    group.forget(submitted)
    if submitted.process.returncode != 0:
        raise RuntimeError(
            f"flwr run refused the app (exit code {submitted.process.returncode}).\n{tail(submitted.log)}"
        )
    status, details = run_status(link)
    if status != "finished:completed":
        for line in tail(submitted.log, 200).splitlines():  # a folder that cannot be written has no summary
            if line.startswith(_STOPPED):
                raise RunStopped(line.removeprefix(_STOPPED))
        if "No heartbeat" in details:  # a task's process that fails tells why
            raise RunStopped(
                f"the ServerApp was ended, or gave no sign of life ({submitted.log}); continue with --resume"
            )
        logs = [submitted.log, *(child.log for child in group.running if child.name.startswith("node-"))]
        raise RuntimeError(f"the run ended as {status}: {details}\n" + "\n".join(tail(log, 25) for log in logs))


def run_status(link: SuperLink) -> tuple[str, str]:
    """Status and details of the newest run, once its status is final (``finished:...``)."""
    deadline = time.monotonic() + STATUS_GRACE
    while True:
        answer = subprocess.run(
            [command("flwr"), "ls", CONNECTION, "--limit", "1", "--format", "json"],
            cwd=link.work,
            env=environment(link.home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,
        )
        try:
            newest = json.loads(answer.stdout)["runs"][0]
        except (ValueError, LookupError):
            raise RuntimeError(f"flwr ls did not list the run: {answer.stdout}{answer.stderr}") from None
        status, details = str(newest["status"]), str(newest.get("status-details", ""))
        if status.startswith("finished:") or time.monotonic() > deadline:
            return status, details
        time.sleep(0.2)
