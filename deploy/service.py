"""The entry of a container: `python -m deploy.service superlink|serverapp|proxy|node`.

It starts the service's own program (Flower's or nginx) with the settings of the environment. It ends with status 0 when the
run has ended: `deploy/submit.py` then writes the file that MEADOW_ENDED names (empty: never, as on a node that serves many
runs). If the program ends in any other way, the service has failed and its container restarts.

Without containers the services are plain processes: MEADOW_OWN and MEADOW_HOME replace the folders /own and /state, and
MEADOW_SUPERLINK, MEADOW_BIND, MEADOW_LISTEN and MEADOW_NODE_PORT set the addresses (docs/deploy.md).
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
from meadow.runtime.logs import print_line

KEYS = Path(os.environ.get("MEADOW_OWN", "/own")) / "keys"
STATE = Path(os.environ.get("MEADOW_HOME", "/state"))
ABSENCE = 5.0
"""Seconds that a restarted node waits, so that the ServerApp notices its death and stops waiting for its replies."""


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
    """nginx in front of the SuperLink."""
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


def register_nodes() -> None:
    """Register the nodes' keys as soon as the SuperLink answers, before a node connects and would have to restart."""
    import httpx

    from deploy import control

    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            control.register()
            return
        except httpx.HTTPError:
            time.sleep(0.2)


def _report_death(node_id: int) -> bool:
    from deploy import control  # here, so that the other services start sooner

    return control.report_death(node_id, os.environ.get("MEADOW_SUPERLINK", "proxy:9092"))


SERVICES = {"superlink": superlink, "serverapp": serverapp, "proxy": proxy, "node": node}


def main(name: str) -> int:
    """Run the service until its program or the run ends; return the container's exit status."""
    os.environ["FLWR_HOME"] = str((STATE / "flwr").absolute())
    STATE.mkdir(parents=True, exist_ok=True)
    os.environ["MEADOW_SERVICE"] = name
    ended = os.environ.get("MEADOW_ENDED", "")
    print_line(f"level=INFO service={name} event=start")
    last = STATE / "node-id"
    if name == "node" and last.exists() and _report_death(int(last.read_text())):
        print_line("level=WARNING service=node event=died-before")
        time.sleep(ABSENCE)
    child = subprocess.Popen(
        SERVICES[name](), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    threading.Thread(target=_relay, args=(name, child.stdout), daemon=True).start()
    if name == "superlink":
        threading.Thread(target=register_nodes, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.terminate())
    while child.poll() is None:
        if ended and Path(ended).exists():
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
            print_line(f"level=INFO service={name} event=end reason=the-run-has-ended")
            return 0
        time.sleep(0.5)
    print_line(f"level=WARNING service={name} event=end status={child.returncode}")
    return 1 if child.returncode >= 0 else 128 - child.returncode


_NODE_ID = re.compile(r"SuperNode ID: (\d+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b[ :]*")


def _relay(name: str, lines: Iterable[str]) -> None:
    """Print the program's output as one line per event: level, service, text.

    Successful calls are omitted, because each node polls for tasks every few seconds.
    """
    for line in lines:
        if name == "node" and (found := _NODE_ID.search(line)):
            (STATE / "node-id").write_text(found.group(1))
        text = _COLOUR.sub("", line).strip()
        if not text or text.startswith("level="):
            if text:
                print_line(text.replace(" ", f" service={name} ", 1))
            continue
        if " 200" in text and "HTTP/1" in text:
            continue
        found = _LEVEL.search(text[:60])
        level = found.group(1) if found else "INFO"
        rest = (text[found.end() :] if found else text).strip()
        if rest:
            print_line(f"level={level} service={name} text={json.dumps(rest, ensure_ascii=False)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
