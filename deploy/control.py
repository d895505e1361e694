"""The operator's side of the SuperLink: who may take part. `python -m deploy.control list | register | revoke NODE`.

register  registers every new public key in the coordinator's keys (NODE.pub)
revoke    bars a node, at once and for good: its key cannot be registered again; `deploy/keys.py` makes a new one
list      prints each node's name, status and Flower id

It makes the same calls as the `flwr` command and a SuperNode, with Flower's own clients, but all in one process, where each
`flwr` command would start its own Python. In `deploy` only this module uses private parts of Flower (flwr 1.41). They are
not in `meadow/arrays/flower.py`, because no run needs them.
"""

import json
import os
import sys
from functools import cache
from pathlib import Path

import httpx
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from meadow.runtime.logs import print_line

KEYS = Path(os.environ.get("MEADOW_OWN", "/own")) / "keys"
STATE = Path(os.environ.get("MEADOW_HOME", "/state"))
ADDRESS = os.environ.get("MEADOW_SUPERLINK", "superlink:9091")
CONNECTION = "meadow"
REVOKED = "unregistered"


def log(event: str, level: str = "INFO", **facts: object) -> None:
    """Log an event as one line."""
    service = os.environ.get("MEADOW_SERVICE", "run")
    print_line(" ".join([f"level={level} service={service} event={event}", *(f"{k}={v}" for k, v in facts.items())]))


def connect() -> None:
    """Configure Flower's command with the SuperLink's address and the CA to trust."""
    home = (STATE / "flwr").absolute()
    os.environ["FLWR_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    connection = {"address": ADDRESS, "root-certificates": str((KEYS / "ca.crt").absolute())}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))


@cache
def _superlink() -> ControlHttpClient:
    # The SuperLink refuses clients of another Flower version; the client then reports that.
    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    return ControlHttpClient.from_server_address(ADDRESS, False, (KEYS / "ca.crt").read_bytes(), [version])


def nodes() -> list[NodeInfo]:
    """All nodes ever registered. Raises httpx.HTTPError if the SuperLink does not answer."""
    return list(_superlink().ListNodes(ListNodesRequest()).nodes_info)


def newest_run() -> Run | None:
    """The run submitted last, or None. Raises httpx.HTTPError if the SuperLink does not answer."""
    runs = _superlink().ListRuns(ListRunsRequest(limit=1)).run_dict
    return next(iter(runs.values()), None)


def stop(run: Run) -> None:
    """Stop a run. Raises httpx.HTTPError if the SuperLink does not answer or the run has ended."""
    _superlink().StopRun(StopRunRequest(run_id=run.run_id))


def register() -> int:
    """Register every new key; return the number of nodes that may take part."""
    status = {node.public_key: node.status for node in nodes()}
    admitted = 0
    for path in sorted(KEYS.glob("*.pub")):
        # The format that `flwr supernode register` sends.
        key = load_ssh_public_key(path.read_bytes()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if key not in status:
            request = RegisterNodeRequest(public_key=key, name=path.stem)
            log("register", node=path.stem, id=_superlink().RegisterNode(request).node_id)
        elif status[key] == REVOKED:
            log("revoked", level="WARNING", node=path.stem)
        admitted += status.get(key) != REVOKED
    return admitted


def revoke(name: str) -> int:
    """Revoke every key registered under a node's name; return the exit status."""
    known = nodes()
    admitted = [node for node in known if node.name == name and node.status != REVOKED]
    for node in admitted:
        _superlink().UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
        log("revoke", node=name, id=node.node_id)
    if not admitted:
        there = sorted({node.name for node in known if node.status != REVOKED})
        log(
            "revoke",
            level="ERROR",
            node=name,
            answer=json.dumps(f"no such node; the registered ones are {', '.join(there)}"),
        )
    return 0 if admitted else 1


def online() -> int:
    """The number of SuperNodes online. Raises httpx.HTTPError if the SuperLink does not answer."""
    return sum(node.status == "online" for node in nodes())


def report_death(node_id: int, address: str) -> bool:
    """Tell the SuperLink that this node's earlier process died; return whether it was still registered as alive.

    Otherwise Flower would take the dead SuperNode for alive for up to 60 s, wait for its reply, and refuse its successor. A
    SuperNode makes the same call when it shuts down normally.
    """
    key = load_ssh_private_key((KEYS / "node.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signed = NodeAuthHttpInterceptor(key, key.public_key())
    try:
        with FleetHttpClient.from_server_address(address, False, str(KEYS / "ca.crt"), interceptors=[signed]) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except httpx.HTTPError:
        return False
    return True


def main(words: list[str]) -> int:
    """Run a command; return the exit status."""
    try:
        match words:
            case ["list"]:
                for node in sorted(nodes(), key=lambda node: (node.name, node.registered_at)):
                    print(f"{node.name:12} {node.status:12} {node.node_id}")
                return 0
            case ["register"]:
                register()
                return 0
            case ["revoke", name]:
                return revoke(name)
            case _:
                print(__doc__)
                return 2
    except httpx.HTTPError as error:
        log("failed", level="ERROR", superlink=ADDRESS, answer=json.dumps(str(error)))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
