"""A federation over several machines, as docs/deploy.md has it: the coordinator's compose file and a node's for each of two
others, which are folders of this machine here. A run, a node revoked and let in again with a new key, all secrets changed.

Minutes long: `pytest -m 'docker and slow'`.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import run_inline
from helpers.stack import ROOT, docker, start_engine
from meadow.strategies.check import load

pytestmark = [pytest.mark.docker, pytest.mark.slow]
OVERRIDES = ["run.rounds=2", "partition.clients=4"]
PORT = 19092
RUN = ("run", "--rm", "run", "python3", "-m", "deploy.control")


class Hosts:
    """The coordinator's machine and two others."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.gateway = docker("network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}").strip()
        for folder in ("federation", "runs", "node-0", "node-1"):
            (place / folder).mkdir(parents=True)
            os.chown(place / folder, 1000, 1000)

    def compose(self, machine: str, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
        """docker-compose on that machine, in the environment that docs/deploy.md sets there."""
        file = "coordinator" if machine == "coordinator" else "node"
        own = self.place / machine
        environment = {
            "MEADOW_NODES": 2, "MEADOW_SERVER_NAMES": self.gateway, "MEADOW_PORT": PORT, "MEADOW_NODE": machine[-1],
            "MEADOW_FEDERATION": self.place / "federation", "MEADOW_RUNS": self.place / "runs",
            "MEADOW_SUPERLINK": f"{self.gateway}:{PORT}", "MEADOW_KEYS": own / "keys", "MEADOW_SHARE": own / "share",
            "MEADOW_OVERRIDES": " ".join(OVERRIDES),
        }  # fmt: skip
        return subprocess.run(
            ["docker-compose", "-p", f"meadow{machine}", "-f", f"deploy/{file}.yml", *words],
            cwd=ROOT, env=os.environ | {key: str(value) for key, value in (environment | more).items()},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip

    def setup(self) -> None:
        done = self.compose("coordinator", "run", "--rm", "setup")
        assert done.returncode == 0, done.stdout + done.stderr

    def bring(self, node: str, *what: str) -> None:
        """Carry what a node got at the coordinator over to its machine."""
        for name in what:
            shutil.copytree(self.place / "federation" / node / name, self.place / node / name, dirs_exist_ok=True)
        subprocess.run(["chown", "-R", "1000:1000", str(self.place / node)], check=True)

    def control(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.compose("coordinator", *RUN, *words)

    def status(self) -> list[tuple[str, str]]:
        """Each node that was ever registered, and its status."""
        lines = [line.split() for line in self.control("list").stdout.splitlines() if line.startswith("node-")]
        return [(line[0], line[1]) for line in lines]

    def until(self, status: list[tuple[str, str]]) -> None:
        end = time.monotonic() + 200
        while (found := self.status()) != status:
            assert time.monotonic() < end, found
            time.sleep(1)

    def run(self, name: str) -> dict[str, Any]:
        done = self.compose("coordinator", "run", "--rm", "-e", f"MEADOW_RUN={name}", "run")
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads((self.place / "runs" / name / "summary.json").read_text()))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    start_engine()
    hosts = Hosts(tmp_path)
    try:
        yield hosts
    finally:
        for machine in ("node-0", "node-1", "coordinator"):
            hosts.compose(machine, "down", "-v")


def test_two_data_owners_and_a_coordinator(hosts: Hosts, tmp_path: Path) -> None:
    hosts.compose("coordinator", "build", "setup")
    hosts.setup()
    assert hosts.compose("coordinator", "up", "-d", "proxy", "serverapp").returncode == 0
    for node in ("node-0", "node-1"):
        hosts.bring(node, "keys", "share")
        assert hosts.compose(node, "up", "-d").returncode == 0
    expected = run_inline(load("fedavg", OVERRIDES), tmp_path / "inline")
    assert hosts.run("first")["model_sha256"] == expected["model_sha256"]

    # A node is revoked, is out, and comes back with a new key, as another node to Flower.
    assert hosts.control("revoke", "node-1").returncode == 0
    assert hosts.status() == [("node-0", "online"), ("node-1", "unregistered")]
    (tmp_path / "federation/node-1/keys/node.key").unlink()
    hosts.setup()
    hosts.bring("node-1", "keys")
    assert hosts.control("register").returncode == 0
    hosts.compose("node-1", "restart")
    hosts.until([("node-0", "online"), ("node-1", "unregistered"), ("node-1", "online")])

    # The CA, the server's certificate and the SuperExec's secret are changed.
    for secret in ("ca.crt", "ca.key", "superexec.secret"):
        (tmp_path / "federation/coordinator/keys" / secret).unlink()
    hosts.setup()
    hosts.compose("coordinator", "restart", "superlink", "proxy", "serverapp")
    for node in ("node-0", "node-1"):
        hosts.bring(node, "keys")
        hosts.compose(node, "restart")
    hosts.until([("node-0", "online"), ("node-1", "unregistered"), ("node-1", "online")])
    assert hosts.run("second")["model_sha256"] == expected["model_sha256"]
