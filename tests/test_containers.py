"""The containers of docker-compose.yml: the same bits as inline, a node that is killed, and who is refused.

Needs Docker and docker-compose (or Compose v2); minutes long: `pytest -m docker`.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_inline

from config.load import load

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parents[1]
ROUNDS = 4
PROJECT = "meadowtest"
NODE_KILLED = "node-2"


def compose() -> list[str]:
    if shutil.which("docker-compose"):
        return ["docker-compose", "-p", PROJECT]
    return ["docker", "compose", "-p", PROJECT]


def docker(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout)


def container(service: str) -> str:
    found = docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}",
                   "--filter", f"label=com.docker.compose.service={service}").stdout.split()  # fmt: skip
    return found[0] if found else ""


@pytest.fixture(scope="module")
def engine() -> None:
    script = ROOT.parent / "shared" / "testbed" / "docker-up"
    if docker("info").returncode != 0 and script.exists():
        subprocess.run([str(script)], check=True, timeout=600)
    if docker("info").returncode != 0:
        pytest.skip("no Docker engine is running")


@pytest.fixture(scope="module")
def stack(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A checkout of its own with the stack up, in the middle of a run; the log of `up`, and the folder."""
    place = tmp_path_factory.mktemp("stack") / "meadow"
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache")
    shutil.copytree(ROOT, place, ignore=ignore)
    (place / "runs").mkdir()
    os.chown(place / "runs", 1000, 1000)
    environment = os.environ | {"MEADOW_OVERRIDES": f"run.rounds={ROUNDS}", "MEADOW_RUN": "test"}
    log = place / "up.log"
    with log.open("w") as file:
        up = subprocess.Popen([*compose(), "up", "--build"], cwd=place, env=environment, stdout=file, stderr=file)
        try:
            _until(lambda: (place / "runs/test/rounds.jsonl").exists(), 600, log)
            yield log, place
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)
            subprocess.run([*compose(), "down", "-v"], cwd=place, env=environment, capture_output=True, timeout=120)


def _until(happened: object, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < end, log.read_text()[-5000:]
        time.sleep(1)


def test_containers_are_hardened(stack: tuple[Path, Path]) -> None:
    for service in ("superlink", "serverapp", "proxy", "run", "node-0", "node-3"):
        facts = json.loads(docker("inspect", container(service)).stdout)[0]
        host = facts["HostConfig"]
        assert facts["Config"]["User"] == "1000", service
        assert host["ReadonlyRootfs"] and host["Init"] and host["CapDrop"] == ["ALL"]
        assert "no-new-privileges:true" in host["SecurityOpt"] and host["PidsLimit"] > 0 and host["Memory"] > 0
        mounts = {m["Destination"]: m["RW"] for m in facts["Mounts"]}
        assert mounts["/own"] is False
    files = docker("exec", container("node-1"), "find", "/own", "-type", "f").stdout.split()
    shared = sorted(Path(f).name for f in files if "client-" in f)
    assert shared == sorted(f"client-{c}.safetensors" for c in range(5, 10))  # its own clients, and nobody else's
    assert not [f for f in files if "ca.key" in f or "test.safetensors" in f]


def from_node(code: str) -> str:
    """What a Python program in a node's container, on the nodes' network, prints."""
    done = docker("exec", "-i", container("node-0"), "python3", "-c", code)
    return (done.stdout + done.stderr).strip()


ASK = """
import ssl, urllib.request, urllib.error
context = ssl.create_default_context(cafile={ca!r})
request = urllib.request.Request({url!r}, data={data}, method={method!r})
try:
    print(urllib.request.urlopen(request, timeout=20, context=context).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError as error:
    print(type(error).__name__, error)
"""
CA = "/own/keys/ca.crt"


def ask(url: str, method: str = "GET", data: str = "None", ca: str = CA) -> str:
    return from_node(ASK.format(url=url, method=method, data=data, ca=ca))


def test_who_is_refused(stack: tuple[Path, Path]) -> None:
    assert ask("https://proxy:9092/health") == "200"
    assert ask("https://proxy:9092/v1/control/list-runs", "POST", "b''") == "403"
    assert ask("https://proxy:9092/v1/runtime/acquire-task", "POST", "b''") == "403"
    assert ask("https://proxy:9092/v1/fleet/push-object", "POST", "b'x' * 34_000_000").startswith(("413", "URLError"))
    assert ask("https://proxy:9092/v1/fleet/pull-messages", "POST", "b''")[0] == "4"  # no signature, no message
    assert ask("http://proxy:9092/health") == "400"  # plaintext to the TLS port
    assert "CERTIFICATE_VERIFY_FAILED" in ask("https://proxy:9092/health", ca="/etc/ssl/certs/ca-certificates.crt")
    assert "URLError" in ask("https://superlink:9091/health")  # another network


def test_a_node_with_an_unregistered_key_is_refused(stack: tuple[Path, Path]) -> None:
    start = (
        "python3 -m deploy.keys /tmp/other stranger && FLWR_HOME=/tmp/other/flwr timeout 25 flower-supernode --port 9199 "
        "--superlink proxy:9092 --root-certificates /own/keys/ca.crt --max-retries 1 "
        "--auth-supernode-private-key /tmp/other/stranger/node.key"
    )
    done = docker("exec", container("node-0"), "sh", "-c", start)
    assert done.returncode != 0 and "SuperNode ID" not in done.stdout + done.stderr
    told = subprocess.run(["docker", "logs", container("superlink")], capture_output=True, text=True)
    assert "/v1/fleet/activate-node][ApiError" in told.stdout + told.stderr


def test_a_killed_node_comes_back_and_the_bits_are_those_of_the_inline_engine(
    stack: tuple[Path, Path], tmp_path: Path
) -> None:
    log, place = stack
    before = json.loads(docker("inspect", container(NODE_KILLED)).stdout)[0]
    subprocess.run(["kill", "-9", str(before["State"]["Pid"])], check=True)
    end = time.monotonic() + 90
    while json.loads(docker("inspect", container(NODE_KILLED)).stdout)[0]["RestartCount"] == before["RestartCount"]:
        assert time.monotonic() < end
        time.sleep(1)
    summary = place / "runs/test/summary.json"
    _until(summary.exists, 500, log)
    found = json.loads(summary.read_text())
    assert found["status"] == "done" and (place / "runs/test/rounds.jsonl").read_text().count("\n") == ROUNDS
    failed = [f["client"] for line in (place / "runs/test/rounds.jsonl").open() for f in json.loads(line)["failed"]]
    expected = run_inline(load("fedavg", [f"run.rounds={ROUNDS}"]), tmp_path)
    assert found["split_sha256"] == expected["split_sha256"]
    if not failed:  # the node was between two rounds when it was killed
        assert found["model_sha256"] == expected["model_sha256"]
    assert set(failed) <= set(range(10, 15))  # the clients of the node that was killed


def test_the_stack_ends_by_itself_with_the_report(stack: tuple[Path, Path]) -> None:
    log, place = stack
    _until(lambda: not docker("ps", "-q", "--filter", f"label=com.docker.compose.project={PROJECT}").stdout, 90, log)
    assert (place / "runs/test/report.html").exists()
    states = [json.loads(docker("inspect", container(s)).stdout)[0]["State"] for s in ("run", "superlink", "node-0")]
    assert [state["ExitCode"] for state in states] == [0, 0, 0]
