"""The entry of a container: `python -m deploy.service superlink|serverapp|proxy|node`.

It starts Flower's own program (or nginx) for that service with the settings of the environment, and ends it with status 0
as soon as the run has ended, which `deploy/submit.py` says by writing the file that MEADOW_ENDED names (empty: never, as
on a node that serves many runs). Any other end of the program is a failure, and the container is started again.

The same without containers, as plain processes: MEADOW_OWN and MEADOW_HOME name the folders that are /own and /state there,
and MEADOW_SUPERLINK, MEADOW_BIND, MEADOW_LISTEN, MEADOW_NODE_PORT the addresses (docs/deploy.md).
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from meadow.runtime.identity import ROOT, code_sha256
from meadow.runtime.logs import tell

KEYS = Path(os.environ.get("MEADOW_OWN", "/own")) / "keys"
STATE = Path(os.environ.get("MEADOW_HOME", "/state"))
MOURNING = 5.0
"""Seconds that a node stays away after its process died, so that the ServerApp sees it and gives up the lost replies."""


def superlink() -> list[str]:
    """Flower's SuperLink with TLS, node authentication, its database on a volume, the ServerApp in another container."""
    host, port = os.environ.get("MEADOW_BIND", "0.0.0.0:9091").rsplit(":", 1)
    return [
        *("flower-superlink", "--host", host, "--port", port, "--isolation", "process"),
        *("--ssl-ca-certfile", str(KEYS / "ca.crt"), "--ssl-certfile", str(KEYS / "server.crt")),
        *("--ssl-keyfile", str(KEYS / "server.key"), "--enable-supernode-auth"),
        *("--superexec-auth-secret-file", str(KEYS / "superexec.secret"), "--database", str(STATE / "superlink.db")),
        "--disable-runtime-dependency-installation",
    ]


def serverapp() -> list[str]:
    """Flower's SuperExec, which starts the ServerApp of a run in this container."""
    address = os.environ.get("MEADOW_SUPERLINK", "superlink:9091")
    return [
        *("flower-superexec", "--runtime-api-address", address, "--root-certificates", str(KEYS / "ca.crt")),
        *("--superexec-auth-secret-file", str(KEYS / "superexec.secret")),
    ]


def proxy() -> list[str]:
    """nginx before the SuperLink."""
    scratch = tempfile.mkdtemp(prefix="proxy-")
    words = {
        "KEYS": str(KEYS.absolute()),
        "SCRATCH": scratch,
        "LISTEN": os.environ.get("MEADOW_LISTEN", "9092"),
        "SUPERLINK": os.environ.get("MEADOW_SUPERLINK", "superlink:9091"),
    }
    text = (ROOT / "deploy/nginx.conf").read_text()
    for word, value in words.items():
        text = re.sub(rf"\b{word}\b", value, text)
    file = Path(scratch) / "nginx.conf"
    file.write_text(text)
    return ["/usr/sbin/nginx", "-c", str(file)]


def node() -> list[str]:
    """Flower's SuperNode, which starts the ClientApp in this container; the runtime API is on loopback."""
    index, count = int(os.environ["MEADOW_NODE"]), int(os.environ["MEADOW_NODES"])
    facts = (
        f'partition-id={index} num-partitions={count} state="{(STATE / "clients").absolute()}" code="{code_sha256()}"'
    )
    return [
        *("flower-supernode", "--superlink", os.environ.get("MEADOW_SUPERLINK", "proxy:9092")),
        *("--root-certificates", str(KEYS / "ca.crt"), "--auth-supernode-private-key", str(KEYS / "node.key")),
        *("--port", os.environ.get("MEADOW_NODE_PORT", "9094"), "--node-config", facts),
    ]


def bury(node_id: int) -> bool:
    """Tell the SuperLink that this node's process died; whether that was news.

    By itself Flower believes in a dead SuperNode for up to 60 s, waits for its reply, and refuses its successor. The call is
    the one that a SuperNode makes when it ends in order (flwr 1.41, `supernode/fleet_http_connection.py`).
    """
    # Imported here: the other services start sooner without.
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = load_ssh_private_key((KEYS / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signed = NodeAuthHttpInterceptor(key, key.public_key())
    address = os.environ.get("MEADOW_SUPERLINK", "proxy:9092")
    try:
        with FleetHttpClient.from_server_address(address, False, str(KEYS / "ca.crt"), interceptors=[signed]) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except httpx.HTTPError:
        return False
    return True


def admit() -> None:
    """Register the nodes' keys as soon as the SuperLink answers, so that no node comes too early and has to start twice."""
    import httpx

    from deploy import control

    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            control.register()
            return
        except httpx.HTTPError:
            time.sleep(0.2)


SERVICES = {"superlink": superlink, "serverapp": serverapp, "proxy": proxy, "node": node}


def main(name: str) -> int:
    """Run the service until it ends by itself or the run has ended; the exit status of the container."""
    os.environ["FLWR_HOME"] = str((STATE / "flwr").absolute())
    STATE.mkdir(parents=True, exist_ok=True)
    os.environ["MEADOW_SERVICE"] = name
    ended = os.environ.get("MEADOW_ENDED", "")
    tell(f"level=INFO service={name} event=start")
    last = STATE / "node-id"
    if name == "node" and last.exists() and bury(int(last.read_text())):
        tell("level=WARNING service=node event=died-before")
        time.sleep(MOURNING)
    child = subprocess.Popen(
        SERVICES[name](), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    threading.Thread(target=_tell, args=(name, child.stdout), daemon=True).start()
    if name == "superlink":
        threading.Thread(target=admit, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.terminate())
    while child.poll() is None:
        if ended and Path(ended).exists():
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
            tell(f"level=INFO service={name} event=end reason=the-run-has-ended")
            return 0
        time.sleep(0.5)
    tell(f"level=WARNING service={name} event=end status={child.returncode}")
    return 1 if child.returncode >= 0 else 128 - child.returncode


_NODE_ID = re.compile(r"SuperNode ID: (\d+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b[ :]*")


def _tell(name: str, lines: Iterable[str]) -> None:
    """Print what the program says as one line an event: level, service, text. Calls that went well are left out: each node
    asks every few seconds whether there is something to do."""
    for line in lines:
        if name == "node" and (found := _NODE_ID.search(line)):
            (STATE / "node-id").write_text(found.group(1))
        text = _COLOUR.sub("", line).strip()
        if not text or text.startswith("level="):
            if text:
                tell(text.replace(" ", f" service={name} ", 1))
            continue
        if " 200" in text and "HTTP/1" in text:
            continue
        found = _LEVEL.search(text[:60])
        level = found.group(1) if found else "INFO"
        rest = (text[found.end() :] if found else text).strip()
        if rest:
            tell(f"level={level} service={name} text={json.dumps(rest, ensure_ascii=False)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
