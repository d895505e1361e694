"""The containers of docker-compose.yml in a checkout of their own, for tests and figures: start, look, ask, break, stop."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = "meadowtest"
LOCAL_BASE = "python:3.11-slim"
"""Where no registry is in reach, an image of this name that was made there; it has no digest."""


def start_engine() -> None:
    """Have a Docker engine run, started by the script that MEADOW_DOCKER_UP names if need be, or skip the test."""
    _run_engine()
    if docker("image", "inspect", "--format", "{{.RepoDigests}}", LOCAL_BASE).strip() == "[]":
        os.environ.setdefault("MEADOW_BASE", LOCAL_BASE)


def _run_engine() -> None:
    if engine_answers():
        return
    if not (script := os.environ.get("MEADOW_DOCKER_UP")):
        pytest.skip("no Docker engine is running, and MEADOW_DOCKER_UP names no script that starts one")
    with tempfile.TemporaryFile("w+") as output:  # a file, because the engine that it starts keeps its streams
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([script], stdout=output, stderr=output, timeout=600)
        output.seek(0)
        if not engine_answers():
            pytest.skip(f"no Docker engine can be started here: {output.read().strip()[-300:]}")


def engine_answers() -> bool:
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def docker(*words: str, timeout: float = 120) -> str:
    """What a docker command prints, on both streams."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout)
    return done.stdout + done.stderr


def compose() -> list[str]:
    words = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    return [*words, "-p", PROJECT]


def container(service: str) -> str:
    by = (f"label=com.docker.compose.project={PROJECT}", f"label=com.docker.compose.service={service}")
    return docker("ps", "-aq", "--filter", by[0], "--filter", by[1]).split()[0]


def inspect(service: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(docker("inspect", container(service)))[0]
    return facts


def kill(service: str) -> None:
    """SIGKILL to a container's first process, from outside: `docker kill` would count as stopped by hand."""
    os.kill(inspect(service)["State"]["Pid"], signal.SIGKILL)


class Stack:
    """A checkout of its own with its containers, and the run in it."""

    def __init__(self, place: Path, preset: str, rounds: int, *overrides: str) -> None:
        self.place = place
        self.log = place / "up.log"
        self.choose("test", preset, rounds, *overrides)
        ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, place, ignore=ignore)

    def choose(self, name: str, preset: str, rounds: int, *overrides: str) -> None:
        """What the next `up` plays, and the name of its run folder."""
        self.run, self.preset, self.total = self.place / "runs" / name, preset, rounds
        self.overrides = [f"run.rounds={rounds}", *overrides]
        chosen = {"MEADOW_EXPERIMENT": preset, "MEADOW_OVERRIDES": " ".join(self.overrides), "MEADOW_RUN": name}
        self.environment = os.environ | chosen

    def up(self, *options: str, files: Sequence[str] = ()) -> None:
        words = [*compose(), *(word for file in files for word in ("-f", file)), "up", "--build", *options]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(words, cwd=self.place, env=self.environment, stdout=log, stderr=log)

    def down(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(120)
        subprocess.run(
            [*compose(), "down", "-v"], cwd=self.place, env=self.environment, capture_output=True, timeout=120
        )

    def until(self, happened: Callable[[], object], seconds: float) -> float:
        """Wait for something; the seconds that it took."""
        began = time.monotonic()
        while not happened():
            assert time.monotonic() < began + seconds, self.log.read_text()[-6000:]
            assert self.process.poll() is None or happened(), self.log.read_text()[-6000:]
            time.sleep(0.2)
        return time.monotonic() - began

    def rounds(self) -> list[dict[str, Any]]:
        path = self.run / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def after_round(self, number: int) -> None:
        self.until(lambda: len(self.rounds()) >= number, 400)

    def lost(self) -> set[tuple[int, int]]:
        """Who took no part in which round, as (round, client)."""
        return {(record["round"], failure["client"]) for record in self.rounds() for failure in record["failed"]}


ASK = """
import json, ssl, sys, urllib.request, urllib.error
for ask in json.load(sys.stdin):
    context = ssl.create_default_context(cafile=ask.get("ca", "/own/keys/ca.crt"))
    data = None if "bytes" not in ask else b"x" * ask["bytes"]
    request = urllib.request.Request(ask["url"], data=data, headers=ask.get("headers", {}))
    try:
        print(json.dumps(str(urllib.request.urlopen(request, timeout=20, context=context).status)))
    except urllib.error.HTTPError as error:
        print(json.dumps(f"{error.code} {error.read().decode(errors='replace').strip()}"))
    except OSError as error:
        print(json.dumps(f"{type(error).__name__} {error}"))
"""
PROXY = "https://proxy:9092"
PULL = {"url": f"{PROXY}/v1/fleet/pull-messages", "bytes": 0, "headers": {"Content-Type": "application/protobuf"}}


def ask(*requests: dict[str, Any], node: str = "node-0") -> list[str]:
    """What a program in a node's container, on the nodes' network, is answered: status and body, or why there is none."""
    words = ["docker", "exec", "-i", container(node), "python3", "-c", ASK]
    done = subprocess.run(words, input=json.dumps(requests), capture_output=True, text=True, timeout=120)
    return [json.loads(line) for line in done.stdout.splitlines()]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a call of the Control API": ({"url": f"{PROXY}/v1/control/list-runs", "bytes": 0}, "403 Only /v1/fleet/"),
    "a call of the Runtime API": ({"url": f"{PROXY}/v1/runtime/acquire-task", "bytes": 0}, "403 Only /v1/fleet/"),
    # nginx answers and closes while the body is still being sent; a client sees the one or the other
    "a body over the limit": ({**PULL, "bytes": 34_000_000}, "413 |Broken pipe|Connection reset"),
    "a call without a signature": (PULL, "401 .*Invalid SuperNode authentication"),
    "plaintext": ({"url": "http://proxy:9092/health"}, "400 .*plain HTTP request was sent to HTTPS port"),
    "another CA": ({"url": f"{PROXY}/health", "ca": "/etc/ssl/certs/ca-certificates.crt"}, "CERTIFICATE_VERIFY_FAILED"),
    "the SuperLink itself": ({"url": "https://superlink:9091/health"}, "name resolution|Name or service not known"),
}


@contextmanager
def playing(stack: Stack) -> Iterator[Stack]:
    """The stack up, with its first round played; then down, its volumes deleted."""
    subprocess.run([*compose(), "down", "-v"], cwd=stack.place, env=stack.environment, capture_output=True, timeout=120)
    stack.up()
    try:
        stack.until(stack.rounds, 900)  # the image may have to be built
        yield stack
    finally:
        stack.down()
