"""The operator's side of the SuperLink: who may take part. `python -m deploy.control list | register | revoke NODE`.

register  every public key in the coordinator's keys (NODE.pub); one that is known already stays so
revoke    a node, at once and for good: its key can never be registered again; a new key for it: `deploy/keys.py`
list      name, status and Flower's id of each

Which Flower id a name has is noted in nodes.json when its key is registered.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w

from config.durable import write_json

KEYS = Path(os.environ.get("MEADOW_OWN", "/own")) / "keys"
STATE = Path(os.environ.get("MEADOW_HOME", "/state"))
CONNECTION = "meadow"
_FILE = STATE / "nodes.json"


def log(event: str, level: str = "INFO", **facts: object) -> None:
    """One line an event."""
    print(" ".join([f"level={level} service=run event={event}", *(f"{k}={v}" for k, v in facts.items())]), flush=True)


def connect() -> None:
    """Tell Flower's command where the SuperLink is, and whom to trust."""
    home = (STATE / "flwr").absolute()
    os.environ["FLWR_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    address = os.environ.get("MEADOW_SUPERLINK", "superlink:9091")
    connection = {"address": address, "root-certificates": str((KEYS / "ca.crt").absolute())}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}}))


def flwr(*words: str) -> Any:
    """What a `flwr` command answers with --format json; an empty mapping if it fails."""
    command = ["flwr", *words, CONNECTION, "--format", "json"]
    try:
        return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
    except (ValueError, subprocess.TimeoutExpired):
        return {}


def register() -> int:
    """Register every key that is not known yet; how many nodes may take part."""
    nodes = _nodes()
    keys = {_name(key): key for key in sorted(KEYS.glob("*.pub"))}
    new = [name for name in keys if name not in nodes]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda name: flwr("supernode", "register", str(keys[name])), new)
        for name, answer in zip(new, answers, strict=True):
            if answer.get("success"):
                nodes[name] = {"id": int(answer["node-id"]), "revoked": False}
                log("register", node=keys[name].stem, id=answer["node-id"])
            else:
                log("register", level="WARNING", node=keys[name].stem, answer=json.dumps(answer))
    write_json(_FILE, nodes)
    return sum(name in nodes and not nodes[name]["revoked"] for name in keys)


def revoke(node: str) -> int:
    """Revoke a node: all its keys that were registered. The exit status."""
    nodes = _nodes()
    found = [name for name, about in nodes.items() if name.split()[0] == node and not about["revoked"]]
    for name in found:
        answer = flwr("supernode", "unregister", str(nodes[name]["id"]))
        if answer.get("success"):
            nodes[name]["revoked"] = True
        log("revoke", level="INFO" if nodes[name]["revoked"] else "ERROR", node=node, answer=json.dumps(answer))
    write_json(_FILE, nodes)
    if not found:
        log("revoke", level="ERROR", node=node, answer=json.dumps(f"no such node; there are: {sorted(nodes)}"))
    return 0 if found and all(nodes[name]["revoked"] for name in found) else 1


def online() -> int:
    """How many SuperNodes are online."""
    return sum(node.get("status") == "online" for node in flwr("supernode", "list").get("nodes", []))


def show() -> None:
    """Print the nodes: name, status, Flower's id."""
    status = {int(node["node-id"]): node["status"] for node in flwr("supernode", "list").get("nodes", [])}
    for name, about in sorted(_nodes().items()):
        print(f"{name.split()[0]:12} {status.get(about['id'], 'unregistered'):12} {about['id']}")


def _nodes() -> dict[str, Any]:
    """What was registered from here: by name and key, Flower's id and whether it was revoked."""
    return dict(json.loads(_FILE.read_text())) if _FILE.exists() else {}


def _name(path: Path) -> str:
    """A node's name and its key: to Flower a node whose key was changed is another one."""
    return f"{path.stem} {path.read_text().split()[1]}"


def main(words: list[str]) -> int:
    """The exit status."""
    connect()
    match words:
        case ["list"]:
            show()
            return 0
        case ["register"]:
            return 0 if register() else 1
        case ["revoke", node]:
            return revoke(node)
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
