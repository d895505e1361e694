"""The containers of docker-compose.yml: who is refused, what they survive, and that the bits are those of inline.

One stack plays one run, and the tests are its story in order: it starts, is stopped with Ctrl-C and goes on, turns strangers
away, loses a node, a network and its SuperLink, and ends by itself. Minutes long, needs Docker with docker-compose (or
Compose v2) and root: `pytest -m docker`. What takes longer still is also marked `slow`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_inline
from flwr.app import RecordDict

import client.app
from client.node import Node
from client.node import train_client as train_one
from config.load import load
from strategies.packing import Request

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parents[1]
PROJECT = "meadowtest"
CLIENTS = 8
HOSTED = {f"node-{i}": [2 * i, 2 * i + 1] for i in range(4)}
KILLED, CUT = "node-2", "node-1"


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

    def __init__(self, place: Path, preset: str, rounds: int) -> None:
        self.place = place
        self.overrides = [f"run.rounds={rounds}", f"partition.clients={CLIENTS}"]
        self.preset, self.total = preset, rounds
        self.run = place / "runs/test"
        self.log = place / "up.log"
        chosen = {"MEADOW_EXPERIMENT": preset, "MEADOW_OVERRIDES": " ".join(self.overrides), "MEADOW_RUN": "test"}
        self.environment = os.environ | chosen
        ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, place, ignore=ignore)

    def up(self, *files: str) -> None:
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                [*compose(), *files, "up", "--build"], cwd=self.place, env=self.environment, stdout=file, stderr=file
            )

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


@pytest.fixture(scope="module")
def engine() -> None:
    script = ROOT.parent / "shared" / "testbed" / "docker-up"
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        if not script.exists():
            pytest.skip("no Docker engine is running, and there is no ../shared/testbed/docker-up to start one")
        subprocess.run([str(script)], check=True, timeout=600)


@pytest.fixture(scope="module")
def stack(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack with its first round played."""
    stack = Stack(tmp_path_factory.mktemp("stack") / "meadow", "fedper", rounds=9)
    subprocess.run([*compose(), "down", "-v"], cwd=stack.place, env=stack.environment, capture_output=True, timeout=120)
    stack.up()
    try:
        stack.until(stack.rounds, 900)  # the image may have to be built
        yield stack
    finally:
        stack.down()


def test_containers_are_hardened(stack: Stack) -> None:
    for service in ("superlink", "serverapp", "proxy", "run", *HOSTED):
        facts = inspect(service)
        host = facts["HostConfig"]
        assert facts["Config"]["User"] == "1000", service
        assert host["ReadonlyRootfs"] and host["Init"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"]
        assert "no-new-privileges:true" in host["SecurityOpt"] and host["PidsLimit"] > 0 and host["Memory"] > 0
        assert facts["State"]["Health"]["Status"] == "healthy" and host["PortBindings"] in (None, {})
        assert {m["Destination"]: m["RW"] for m in facts["Mounts"]}["/own"] is False
    hands_over = inspect("runs-folder")["HostConfig"]  # the one that is root, to give ./runs to the others' user
    assert (hands_over["CapDrop"], hands_over["CapAdd"], hands_over["NetworkMode"]) == (["ALL"], ["CHOWN"], "none")
    for node, clients in HOSTED.items():  # its own clients, and nobody else's; neither the CA's key nor the test set
        files = {Path(f).name for f in docker("exec", container(node), "find", "/own", "-type", "f").split()}
        assert files == {*(f"client-{c}.safetensors" for c in clients), *_COMMON}


_COMMON = ("ca.crt", "node.key", "share.json", "experiment.toml")


def test_the_image_is_small_and_holds_no_compiler_and_no_secret(stack: Stack) -> None:
    image = json.loads(docker("image", "inspect", inspect("run")["Image"]))[0]
    assert image["Size"] < 2.5e9
    find = r"find / -xdev \( -name 'gcc*' -o -name 'cc1*' -o -name 'g++*' -o -name clang \) -type f -perm /111"
    secrets = (
        r"find /app /state /own /volumes /home \( -name '*.key' -o -name '*.pub' -o -name '*.secret' -o -name .git \)"
    )
    assert docker("run", "--rm", "--network", "none", image["Id"], "sh", "-c", f"({find}; {secrets}) 2>/dev/null") == ""


def test_ctrl_c_leaves_a_run_that_goes_on(stack: Stack) -> None:
    stack.process.send_signal(signal.SIGINT)
    stack.process.wait(180)
    assert inspect("run")["State"]["ExitCode"] == 3
    played = stack.rounds()
    assert played and (stack.run / "manifest.json").exists()
    assert "MEADOW_RUN=test" in docker("logs", container("run"))
    stack.up()
    stack.after_round(len(played) + 1)
    assert stack.rounds()[: len(played)] == played  # not one round was played again


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


def test_who_is_refused(stack: Stack) -> None:
    health, *answers = ask({"url": f"{PROXY}/health"}, *(request for request, _ in REFUSED.values()))
    assert health == "200"
    for (what, (_, expected)), answer in zip(REFUSED.items(), answers, strict=True):
        assert re.search(expected, answer, re.DOTALL), (what, answer)


# A node's own signed headers for a call that changes nothing, as its SuperNode makes them.
SIGN = """
import base64, json
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
key = load_ssh_private_key(open("/own/keys/node.key", "rb").read(), None)
time = now().isoformat()
public, signature = public_key_to_bytes(key.public_key()), sign_message(key, time.encode())
values = base64.b64encode(public).decode(), time, base64.b64encode(signature).decode()
print(json.dumps(dict(zip(("flwr-public-key", "flwr-timestamp", "flwr-signature"), values))))
"""


def test_a_nodes_headers_replayed_from_another_address_are_refused(stack: Stack) -> None:
    headers = json.loads(docker("exec", container("node-0"), "python3", "-c", SIGN))
    call = PULL | {"headers": PULL["headers"] | headers}
    first, again = ask(call, call)
    assert first == again == '401 {"detail":"Invalid SuperNode authentication"}'  # an empty message names no node
    assert ask(call, node="node-3") == ["401 These SuperNode headers were first used from another address."]


def test_a_node_with_an_unregistered_key_is_refused(stack: Stack) -> None:
    start = (
        "python3 -m deploy.keys /tmp/other stranger && FLWR_HOME=/tmp/other/flwr timeout 60 flower-supernode --port 9199 "
        "--superlink proxy:9092 --root-certificates /own/keys/ca.crt --max-retries 1 "
        "--auth-supernode-private-key /tmp/other/stranger/node.key; echo status $?"
    )
    said = docker("exec", container("node-3"), "sh", "-c", start)
    assert "status 0" not in said and "SuperNode ID" not in said
    assert "[code: 2004] Failed to activate SuperNode." in said
    assert "/v1/fleet/activate-node][ApiError:2004]" in docker("logs", container("superlink"))


def test_a_node_that_is_killed_in_a_round_is_back_within_90_seconds(stack: Stack) -> None:
    before, started = stack.rounds(), docker("logs", container(KILLED)).count("Receiving: train message")
    stack.until(lambda: docker("logs", container(KILLED)).count("Receiving: train message") > started, 120)
    state = personal(KILLED)
    kill(KILLED)
    killed = time.monotonic()
    since = len(docker("logs", container(KILLED)))
    stack.until(lambda: "Receiving: " in docker("logs", container(KILLED))[since:], 200)
    took = time.monotonic() - killed
    (stack.place / "back.txt").write_text(f"{took:.0f} s\n")
    assert took < 90, took
    assert state and state.items() <= personal(KILLED).items()  # byte for byte
    stack.after_round(len(before) + 2)
    lost = stack.lost()
    assert lost and {client for _, client in lost} == set(HOSTED[KILLED])  # the round went on without these
    stack.until(lambda: not stack.rounds()[-1]["failed"], 200)  # and then they took part again


def personal(node: str) -> dict[str, str]:
    """SHA-256 of each file of the clients' state in a node, personal layers above all."""
    lines = docker("exec", container(node), "sh", "-c", "find /state/clients -type f | xargs sha256sum").splitlines()
    return {path: digest for digest, path in (line.split() for line in lines)}


def cut_off(node: str, seconds: float) -> None:
    network = f"{PROJECT}_nodes"
    assert not docker("network", "disconnect", network, container(node))
    time.sleep(seconds)
    assert not docker("network", "connect", "--alias", node, network, container(node))


def test_a_node_without_network_for_30_seconds_costs_only_time(stack: Stack) -> None:
    lost, played = stack.lost(), len(stack.rounds())
    cut_off(CUT, 30)
    stack.after_round(played + 2)
    assert stack.lost() == lost


@pytest.mark.parametrize("service", ["superlink", "serverapp"])
def test_what_is_killed_at_the_coordinator_costs_no_round(stack: Stack, service: str) -> None:
    played, restarts, lost = stack.rounds(), inspect(service)["RestartCount"], stack.lost()
    assert len(played) < stack.total
    kill(service)
    stack.until(lambda: inspect(service)["RestartCount"] > restarts, 60)
    stack.until(lambda: len(stack.rounds()) > len(played), 400)
    assert stack.rounds()[: len(played)] == played and stack.lost() == lost


def test_it_ends_by_itself_with_the_bits_of_the_inline_engine(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.process.wait(400)
    assert stack.process.returncode == 0
    services = ("run", "superlink", "serverapp", "proxy", *HOSTED)
    assert {service: inspect(service)["State"]["ExitCode"] for service in services} == dict.fromkeys(services, 0)
    assert (stack.run / "report.html").exists()
    found, lost = json.loads((stack.run / "summary.json").read_text()), stack.lost()
    assert found["status"] == "done" and len(stack.rounds()) == stack.total

    def lossy(node: Node, request: Request) -> RecordDict:
        if (request.content.config_records["config"]["round"], request.client) in lost:
            raise ConnectionError("this node was dead in that round")
        return train_one(node, request)

    monkeypatch.setattr(client.app, "train_client", lossy)
    expected = run_inline(load(stack.preset, stack.overrides), tmp_path / "inline")
    assert found["split_sha256"] == expected["split_sha256"]
    assert found["model_sha256"] == expected["model_sha256"]
    assert found["personal_sha256"] == expected["personal_sha256"]


def test_logs_are_one_line_an_event(stack: Stack) -> None:
    for service in ("run", "superlink", "serverapp", *HOSTED):
        lines = docker("logs", container(service)).splitlines()
        assert lines and [line for line in lines if not line.startswith("level=")] == []
    lines = docker("logs", container("node-0")).splitlines()
    assert any(line.startswith("level=INFO service=node round=1 client=1 text=") for line in lines)
    assert "level=INFO service=run event=round round=1 clients=8 failed=[] " in docker("logs", container("run"))


def test_a_node_of_another_version_is_refused(stack: Stack) -> None:
    """The last test of the story: the stack is started once more, with other code on a node."""
    (stack.place / "changed.py").write_text("# another version\n")
    volume = "./changed.py:/app/client/__init__.py:ro"
    (stack.place / "changed.yml").write_text(json.dumps({"services": {"node-3": {"volumes": [volume]}}}))
    stack.environment |= {"MEADOW_RUN": "other"}
    stack.up("-f", "docker-compose.yml", "-f", "changed.yml")
    stack.process.wait(300)
    assert inspect("run")["State"]["ExitCode"] == 3
    said = docker("logs", container("run"))
    assert "has another code than the server" in said and "install the same Meadow" in said
