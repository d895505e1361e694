"""The containers of docker-compose.yml: who is refused, what they survive, and that the bits are those of inline.

One stack plays one run, and the tests are its story in order: it starts, is stopped with Ctrl-C and goes on, loses a node, a
network and its coordinator, turns strangers away, and ends by itself. Then it plays a private run, and one with a node of
another version. Minutes long, needs Docker with docker-compose (or Compose v2) and root: `pytest -m docker`. What takes
longer still is also marked `slow`.
"""

import functools
import io
import json
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from helpers.runs import clients_answer, run_with
from helpers.stack import (
    PROJECT,
    PROXY,
    PULL,
    REFUSED,
    ROOT,
    Stack,
    ask,
    compose,
    container,
    docker,
    inspect,
    kill,
    playing,
    start_engine,
)
from meadow.client.answers import train_client
from meadow.client.node import Node
from meadow.strategies.check import load
from meadow.strategies.wire.packing import Answer, Request

pytestmark = pytest.mark.docker

CLIENTS = 8

ROUNDS = 20
"""Enough that no test of the story comes after the last round."""

HOSTED = {f"node-{i}": [2 * i, 2 * i + 1] for i in range(4)}

KILLED, CUT = "node-2", "node-1"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    start_engine()
    place = tmp_path_factory.mktemp("stack") / "meadow"
    with playing(Stack(place, "fedper", ROUNDS, f"partition.clients={CLIENTS}")) as stack:
        yield stack


def test_ctrl_c_leaves_a_run_that_goes_on(stack: Stack) -> None:
    stack.until(lambda: "event=round round=1 " in docker("logs", container("run")), 30)
    stack.process.send_signal(signal.SIGINT)
    stack.process.wait(180)
    assert inspect("run")["State"]["ExitCode"] == 3
    played = stack.rounds()
    assert played and (stack.run / "manifest.json").exists()
    assert "MEADOW_RUN=test" in docker("logs", container("run"))
    stack.up()
    stack.after_round(len(played) + 1)
    assert stack.rounds()[: len(played)] == played  # not one round was played again


def test_a_node_that_is_killed_in_a_round_is_back_within_90_seconds(stack: Stack) -> None:
    before, after = kill_in_a_round(stack)
    personal = {path for path in before if "/clients/" in path}
    assert {int(path.split("/")[2]) for path in personal} == set(HOSTED[KILLED])
    assert before.items() <= after.items()  # byte for byte


def kill_in_a_round(stack: Stack) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """SIGKILL to a node that has just got its part of a round, and see it back and take part; the clients' files before, and
    as it found them when it was back."""
    at_work(stack, KILLED)
    before = files(KILLED)
    kill(KILLED)
    killed = time.monotonic()
    since = len(docker("logs", container(KILLED)))
    stack.until(lambda: "Receiving: " in docker("logs", container(KILLED))[since:], 200)
    took = time.monotonic() - killed
    after = files(KILLED)
    print(f"{KILLED} was back after {took:.0f} s")
    assert took < 90, took
    stack.until(stack.lost, 200)
    assert {client for _, client in stack.lost()} == set(HOSTED[KILLED])  # the round went on without these
    stack.until(lambda: not stack.rounds()[-1]["failed"], 200)  # and then they took part again
    return before, after


def at_work(stack: Stack, node: str) -> None:
    """Wait until a node has received its part of a round."""

    def begun() -> int:
        return docker("logs", container(node)).count("Received successfully")

    before = begun()
    stack.until(lambda: begun() > before, 200)


def files(node: str) -> dict[str, bytes]:
    """Each file of the clients' state in a node: personal layers, ledgers."""
    words = ["docker", "exec", container(node), "tar", "-C", "/state/clients", "-c", "."]
    done = subprocess.run(words, capture_output=True, check=True, timeout=60)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        return {m.name.removeprefix("./"): archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]


def healthy(service: str) -> bool:
    return bool(inspect(service)["State"]["Health"]["Status"] == "healthy")


def cut_off(node: str, seconds: float) -> None:
    network = f"{PROJECT}_nodes"
    assert not docker("network", "disconnect", network, container(node))
    time.sleep(seconds)
    assert not docker("network", "connect", "--alias", node, network, container(node))


def test_a_node_without_network_for_30_seconds_costs_only_time(stack: Stack) -> None:
    """It is cut off while it trains, and its reply waits. (A message that is on its way when the cut comes is lost.)"""
    lost, played = stack.lost(), len(stack.rounds())
    at_work(stack, CUT)
    cut_off(CUT, 30)
    stack.after_round(played + 1)
    assert stack.lost() == lost


@pytest.mark.parametrize("service", ["superlink", "serverapp"])
def test_what_is_killed_at_the_coordinator_costs_no_round(stack: Stack, service: str) -> None:
    played, restarts, lost = stack.rounds(), inspect(service)["RestartCount"], stack.lost()
    assert len(played) < stack.total
    kill(service)
    stack.until(lambda: inspect(service)["RestartCount"] > restarts, 60)
    stack.until(lambda: len(stack.rounds()) > len(played), 400)
    assert stack.rounds()[: len(played)] == played and stack.lost() == lost


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
    output = docker("exec", container("node-3"), "sh", "-c", start)
    assert "status 0" not in output and "SuperNode ID" not in output
    assert "[code: 2004] Failed to activate SuperNode." in output
    assert "/v1/fleet/activate-node][ApiError:2004]" in docker("logs", container("superlink"))


def test_containers_are_hardened(stack: Stack) -> None:
    for service in ("superlink", "serverapp", "proxy", "run", *HOSTED):
        facts = inspect(service)
        host = facts["HostConfig"]
        assert facts["Config"]["User"] == "1000", service
        assert host["ReadonlyRootfs"] and host["Init"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"]
        assert "no-new-privileges:true" in host["SecurityOpt"] and host["PidsLimit"] > 0 and host["Memory"] > 0
        assert host["PortBindings"] in (None, {})
        stack.until(functools.partial(healthy, service), 60)
        assert {m["Destination"]: m["RW"] for m in facts["Mounts"]}["/own"] is False
    hands_over = inspect("runs-folder")["HostConfig"]  # the one that is root, to give ./runs to the others' user
    assert (hands_over["CapDrop"], hands_over["CapAdd"], hands_over["NetworkMode"]) == (["ALL"], ["CHOWN"], "none")
    for node, clients in HOSTED.items():  # its own clients, and nobody else's; neither the CA's key nor the test set
        files = {Path(f).name for f in docker("exec", container(node), "find", "/own", "-type", "f").split()}
        assert files == {*(f"client-{c}.safetensors" for c in clients), *_COMMON}


_COMMON = ("ca.crt", "node.key", "share.json", "experiment.toml")


def test_it_ends_by_itself_with_the_bits_of_the_inline_engine(stack: Stack, tmp_path: Path) -> None:
    stack.process.wait(900)
    assert stack.process.returncode == 0
    services = ("run", "superlink", "serverapp", "proxy", *HOSTED)
    assert {service: inspect(service)["State"]["ExitCode"] for service in services} == dict.fromkeys(services, 0)
    assert (stack.run / "report.html").exists()
    assert (found := summary(stack))["status"] == "done" and len(stack.rounds()) == stack.total
    expected = inline_with_losses(stack, tmp_path)
    assert [found[key] for key in SAME] == [expected[key] for key in SAME]


SAME = ("split_sha256", "model_sha256", "personal_sha256")


def summary(stack: Stack) -> dict[str, Any]:
    return dict(json.loads((stack.run / "summary.json").read_text()))


def inline_with_losses(stack: Stack, out: Path) -> dict[str, Any]:
    """The same experiment on the inline engine, where the clients that were lost in a round are lost too.

    One that had trained when its reply was lost keeps what it learned for itself; its node's log says so.
    """
    lost = stack.lost()
    logs = "".join(docker("logs", container(node)) for node in HOSTED)
    trained = {tuple(map(int, found)) for found in re.findall(r'round=(\d+) client=(\d+) text="trained"', logs)}

    def lossy(node: Node, request: Request) -> Answer:
        which = (request.config["round"], request.client)
        if which not in lost or which in trained:
            reply = train_client(node, request)
        if which in lost:
            raise ConnectionError("this node's reply was lost in that round")
        return reply

    return run_with(clients_answer(lossy), load(stack.preset, stack.overrides), out / "inline")


def test_logs_are_one_line_an_event(stack: Stack) -> None:
    for service in ("run", "superlink", "serverapp", *HOSTED):
        lines = docker("logs", container(service)).splitlines()
        assert lines and [line for line in lines if not line.startswith("level=")] == []
    lines = docker("logs", container("node-0")).splitlines()
    assert any(line.startswith("level=INFO service=node round=1 client=1 text=") for line in lines)
    assert "level=INFO service=run event=round round=1 clients=8 failed=[] " in docker("logs", container("run"))


def test_the_image_is_small_and_holds_no_compiler_and_no_secret(stack: Stack) -> None:
    image = json.loads(docker("image", "inspect", inspect("run")["Image"]))[0]
    assert image["Size"] < 2.5e9
    find = r"find / -xdev \( -name 'gcc*' -o -name 'cc1*' -o -name 'g++*' -o -name clang \) -type f -perm /111"
    secrets = (
        r"find /app /state /own /volumes /home \( -name '*.key' -o -name '*.pub' -o -name '*.secret' -o -name .git \)"
    )
    inside = ("run", "--rm", "--network", "none", image["Id"])
    assert docker(*inside, "sh", "-c", f"({find}; {secrets}) 2>/dev/null") == ""
    lists = [(ROOT / "deploy" / f"requirements{kind}.txt").read_text() for kind in ("", "-cpu")]
    pinned = {package(line) for text in lists for line in re.findall(r"^\S+==\S+", text, re.M)}
    assert {package(line) for line in docker(*inside, "python3", "-c", PACKAGES).split()} == pinned


def package(line: str) -> tuple[str, str]:
    """The name, as packages are compared, and the version of "Name==version"."""
    name, _, version = line.partition("==")
    return canonicalize_name(name), version


PACKAGES = """
from importlib.metadata import distributions
print(*{f"{d.name}=={d.version}" for d in distributions(path=["/opt/packages"])})
"""


def test_a_ledger_outlives_the_kill_of_its_node(stack: Stack, tmp_path: Path) -> None:
    """A second run on the same stack, under differential privacy: its noise is secret, so its bits are its own. It also has
    another CA, another certificate of the server and another secret of the SuperExec than the first."""
    rotated = [f"/volumes/coordinator/keys/{name}" for name in ("ca.crt", "ca.key", "superexec.secret")]
    subprocess.run(
        [*compose(), "run", "--rm", "--no-deps", "setup", "rm", *rotated],
        cwd=stack.place, env=stack.environment, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    private = ("privacy.unit=example", "privacy.epsilon=8", "privacy.sample_rate=0.05", f"partition.clients={CLIENTS}")
    stack.choose("private", "fedper", 6, *private)
    stack.up()
    stack.until(stack.rounds, 400)
    before, _ = kill_in_a_round(stack)
    while stack.process.poll() is None and not (stack.run / "summary.json").exists():
        after = files(KILLED)
        time.sleep(0.5)
    stack.process.wait(200)
    assert (found := summary(stack))["status"] == "done"
    assert 0 < found["privacy"]["epsilon"]["max"] <= 8
    ledgers = {path: content for path, content in before.items() if path.endswith(".ledger")}
    assert len(ledgers) == len(HOSTED[KILLED])
    lost = len({round_ for round_, _ in stack.lost()})
    for path, content in ledgers.items():
        assert after[path].startswith(content) and len(after[path]) > len(content)  # nothing rewritten, rounds added
        entries = after[path].splitlines()[1:]
        # Every round that counted was charged; so may be one whose release never left.
        assert stack.total - lost <= len(entries) <= stack.total
    assert after["ledgers/secret"] == before["ledgers/secret"]


def test_a_node_of_another_version_is_refused(stack: Stack) -> None:
    """The last of the story: the stack starts once more, with other code on a node. `up` ends with the run's status."""
    (stack.place / "changed.py").write_text("# another version\n")
    volume = "./changed.py:/app/client/__init__.py:ro"
    (stack.place / "changed.yml").write_text(json.dumps({"services": {"node-3": {"volumes": [volume]}}}))
    stack.choose("other", "fedper", 2, f"partition.clients={CLIENTS}")
    stack.up("--exit-code-from", "run", files=["docker-compose.yml", "changed.yml"])
    assert stack.process.wait(300) == 3
    assert inspect("run")["State"]["ExitCode"] == 3
    output = docker("logs", container("run"))
    assert "has another code than the server" in output and "install the same Meadow" in output
    (told,) = set(re.findall(r"code (\w{12}) here, (\w{12}) there", docker("logs", container("node-3"))))
    assert told[0] != told[1]


@pytest.mark.slow
def test_a_node_without_network_for_120_seconds_is_missed_and_comes_back(tmp_path: Path) -> None:
    start_engine()
    with playing(Stack(tmp_path / "meadow", "fedavg", 24, f"partition.clients={CLIENTS}")) as stack:
        cut_off(CUT, 120)
        assert {client for _, client in stack.lost()} == set(HOSTED[CUT])  # the rounds went on
        stack.until(lambda: not stack.rounds()[-1]["failed"], 200)
        stack.process.wait(900)
        assert summary(stack)["model_sha256"] == inline_with_losses(stack, tmp_path)["model_sha256"]
