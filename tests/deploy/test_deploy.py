"""Deployment without containers: keys, what a node says of itself, who is let in, and the services as plain processes."""

import datetime
import io
import json
import os
import re
import ssl
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from compose_spec import PyCompose
from cryptography import x509

from deploy import keys
from helpers.runs import run_inline
from meadow.runtime.identity import ROOT, code_sha256
from meadow.simulation.children import free_port
from meadow.strategies.check import load

OVERRIDES = ["run.rounds=2", "partition.clients=4"]


def test_keys_are_made_once_and_a_new_node_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEADOW_SERVER_NAMES", "coordinator.example, 10.1.2.3")
    keys.main(tmp_path, ["node-0"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    keys.main(tmp_path, ["node-0", "node-1"])
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    new = {str(path.relative_to(tmp_path)) for path in after.keys() - before.keys()}
    assert before.items() <= after.items()
    assert new == {"node-1/node.key", "node-1/ca.crt", "coordinator/node-1.pub"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in after} == {0o600}
    server = x509.load_pem_x509_certificate(after[tmp_path / "coordinator/server.crt"])
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"superlink", "proxy", "coordinator.example"} <= set(names.get_values_for_type(x509.DNSName))
    assert "10.1.2.3" in map(str, names.get_values_for_type(x509.IPAddress))
    server.verify_directly_issued_by(x509.load_pem_x509_certificate(after[tmp_path / "node-1/ca.crt"]))


@pytest.mark.parametrize("why", ["another CA", "another name", "it ends soon"])
def test_what_no_longer_serves_is_made_anew(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.main(tmp_path, ["node-0"])
    folder = tmp_path / "coordinator"
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    now = datetime.datetime.now(datetime.UTC)
    if why == "another CA":
        for name in ("ca.crt", "ca.key"):
            (folder / name).unlink()
    elif why == "another name":
        monkeypatch.setenv("MEADOW_SERVER_NAMES", "new.example")
    else:
        now += datetime.timedelta(days=keys.DAYS) - keys.RENEWAL
    keys.main(tmp_path, ["node-0"], now=now)
    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    new = {str(path) for path in after if after[path] != before[path]}
    server = {"coordinator/server.crt", "coordinator/server.key"}
    assert new == server | ({"coordinator/ca.crt", "coordinator/ca.key", "node-0/ca.crt"} if "CA" in why else set())
    certificate = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "node-0/ca.crt").read_bytes()))


def test_a_deployed_node_names_the_code_that_is_installed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.common.config import parse_config_args  # what the SuperNode does with --node-config

    from deploy import service

    monkeypatch.setenv("MEADOW_NODE", "2")
    monkeypatch.setenv("MEADOW_NODES", "4")
    words = service.node()
    facts = parse_config_args([words[words.index("--node-config") + 1]])
    assert facts == {"partition-id": 2, "num-partitions": 4, "state": "/state/clients", "code": code_sha256()}


def test_flower_bundles_the_app_whole(tmp_path: Path) -> None:
    """The bundle has the code hash that the checkout has; and Flower takes every pattern of `fab-include`."""
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        bundle.extractall(tmp_path)
    ask = "from meadow.runtime.identity import ROOT, code_sha256; print(ROOT, code_sha256())"
    clean = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path), code_sha256()]


def test_a_run_that_flower_refuses_is_not_waited_for() -> None:
    """flwr 1.41 ends with 0 when `--format json` tells of a failure."""
    from deploy.submit import _refusal

    answer = {"success": False, "error-message": "why not"}
    assert "why not" in _refusal(subprocess.CompletedProcess([], 0, json.dumps(answer), ""))
    assert _refusal(subprocess.CompletedProcess([], 1, "", "no such host")) == "no such host"
    assert _refusal(subprocess.CompletedProcess([], 0, json.dumps({"success": True, "run-id": 7}), "")) == ""


@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/coordinator.yml", "deploy/node.yml"])
def test_the_compose_files_are_valid_by_the_compose_specification(name: str) -> None:
    """docker-compose 1.29 reads them in `tests/deploy/test_containers.py`."""
    set_text = re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)\}", lambda found: found[1] or "1", (ROOT / name).read_text())
    merged = yaml.safe_dump(yaml.safe_load(set_text))  # the specification leaves `<<` to YAML
    PyCompose.from_yaml(merged).validate()
    with pytest.raises(ValueError, match="read_onli"):
        PyCompose.from_yaml(merged.replace("read_only", "read_onli"))


def test_the_image_is_of_exact_versions_by_their_hashes() -> None:
    """The packages that the project asks for by an exact version have that one; the base image has a digest."""
    lists = [(ROOT / "deploy" / f"requirements{kind}.txt").read_text() for kind in ("", "-cpu", "-cuda")]
    for text in lists:
        hashed = re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:\w{64}", text, re.M)
        assert len(hashed) == len(re.findall(r"^\w", text, re.M)) > 0
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    exact = [re.sub(r"\[.*\]", "", name) for name in asked if "==" in name]
    assert len(exact) > 3 and [name for name in exact if f"\n{name} " not in "".join(lists)] == []
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "--require-hashes" in dockerfile and re.search(
        r"^FROM \$\{BASE:-\S+@sha256:\w{64}\} AS base$", dockerfile, re.M
    )
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.M)[1:]) == {"base"}


class Federation:
    """SuperLink, SuperExec and two SuperNodes as plain processes on loopback, with TLS and node keys."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self.folder, self.ports = folder, ports
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self, who: str, **more: object) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "MEADOW_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        machine = self.folder / "federation" / (who if who.startswith("node") else "coordinator")
        ours = {
            "PATH": path, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "MEADOW_OWN": str(machine), "MEADOW_SHARE": str(machine / "share"), "MEADOW_HOME": str(self.folder / who),
            "MEADOW_FEDERATION": str(self.folder / "federation"), "MEADOW_RUNS": str(self.folder / "runs"),
            "MEADOW_BIND": f"127.0.0.1:{self.ports[0]}", "MEADOW_SUPERLINK": f"127.0.0.1:{self.ports[0]}",
            "MEADOW_NODES": "2", "OMP_NUM_THREADS": "1", "MEADOW_LOG": "lines",
        }  # fmt: skip
        return kept | ours | {key: str(value) for key, value in more.items()}

    def start(self, who: str, service: str, **more: object) -> None:
        with (self.folder / f"{who}.log").open("ab") as log:
            words = [sys.executable, "-m", "deploy.service", service]
            self.running[who] = subprocess.Popen(words, env=self.environment(who, **more), stdout=log, stderr=log)

    def start_node(self, index: int) -> None:
        self.start(f"node-{index}", "node", MEADOW_NODE=index, MEADOW_NODE_PORT=self.ports[1 + index])

    def command(self, *words: str, timeout: float = 300, **more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words], env=self.environment("operator", **more), capture_output=True, text=True,
            timeout=timeout,
        )  # fmt: skip

    def stop(self, who: str) -> None:
        process = self.running.pop(who)
        process.terminate()
        process.wait(30)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with ExitStack() as stack:
        here = Federation(tmp_path, [stack.enter_context(free_port()) for _ in range(3)])
        (tmp_path / "runs").mkdir()
        try:
            yield here
        finally:
            for who in list(here.running):
                here.stop(who)


@pytest.mark.slow
def test_plain_processes_with_tls_and_keys(federation: Federation, tmp_path: Path) -> None:
    made = federation.command("deploy.setup", "2", MEADOW_EXPERIMENT="fedavg", MEADOW_OVERRIDES=" ".join(OVERRIDES))
    assert made.returncode == 0, made.stderr
    federation.start("superlink", "superlink")
    _until_it_listens(federation.ports[0], tmp_path / "federation/coordinator/keys/ca.crt")
    federation.start("serverapp", "serverapp")
    assert federation.command("deploy.control", "register").returncode == 0
    for index in range(2):
        federation.start_node(index)
    ended = federation.command("deploy.submit", MEADOW_RUN="plain")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "runs/plain/summary.json").read_text())
    expected = run_inline(load("fedavg", OVERRIDES), tmp_path / "inline")
    assert found["model_sha256"] == expected["model_sha256"]

    # A node that is revoked is out at once, and neither its old key nor registering again brings it back.
    listed = federation.command("deploy.control", "list").stdout.split()
    assert listed[0::3] == ["node-0", "node-1"] and listed[1::3] == ["online", "online"]
    assert federation.command("deploy.control", "revoke", "node-1").returncode == 0
    assert federation.command("deploy.control", "revoke", "node-7").returncode == 1
    federation.command("deploy.control", "register")
    federation.stop("node-1")
    federation.start_node(1)
    assert federation.running["node-1"].wait(60) == 1
    assert "Failed to activate SuperNode" in (tmp_path / "node-1.log").read_text()

    # With a new key, it is another node, and comes back.
    (tmp_path / "federation/node-1/keys/node.key").unlink()
    keys.main(tmp_path / "federation", ["node-0", "node-1"], "keys")
    federation.command("deploy.control", "register")
    federation.start_node(1)
    end = time.monotonic() + 60
    while federation.command("deploy.control", "list").stdout.split()[1::3].count("online") < 2:
        assert time.monotonic() < end, (tmp_path / "node-1.log").read_text()


def _until_it_listens(port: int, ca: Path) -> None:
    import urllib.request

    end = time.monotonic() + 90
    while True:
        try:
            context = ssl.create_default_context(cafile=str(ca))
            with urllib.request.urlopen(f"https://127.0.0.1:{port}/health", timeout=2, context=context):
                return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.2)
