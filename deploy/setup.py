"""The one-shot service that prepares a start: keys, certificates, and each machine's share of the data.

`python -m deploy.setup NODES`: in MEADOW_FEDERATION (in a container /volumes), `coordinator` and `node-0` .. get `keys/`
(made once by `deploy/keys.py`) and `share/` (made each time by `meadow deal`, for MEADOW_EXPERIMENT and MEADOW_OVERRIDES).
If MEADOW_ENDED names a file, as under `docker compose up`, the service stays up until the file reports the end of the run,
because `up --exit-code-from run` stops everything as soon as any container ends.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from deploy import keys

VOLUMES = Path(os.environ.get("MEADOW_FEDERATION", "/volumes"))
READY = Path("/tmp/ready")
"""Exists once everything is prepared; the container's health check looks for it."""


def main(nodes: int) -> int:
    """Prepare everything, then wait if asked to; return the exit status of `meadow deal`."""
    ended = os.environ.get("MEADOW_ENDED", "")
    if ended:  # left by an earlier run
        Path(ended).unlink(missing_ok=True)
    names = [f"node-{i}" for i in range(nodes)]
    keys.main(VOLUMES, names, "keys")
    experiment = os.environ.get("MEADOW_EXPERIMENT") or "fedavg"
    overrides = shlex.split(os.environ.get("MEADOW_OVERRIDES", ""))
    deal = [sys.executable, "-m", "meadow", "deal", experiment, *overrides]
    # This machine has all the data; MEADOW_SHARE would name the share that is about to be made.
    environment = {key: value for key, value in os.environ.items() if key != "MEADOW_SHARE"}
    status = subprocess.call([*deal, "--nodes", str(nodes), "--out", str(VOLUMES), "--below", "share"], env=environment)
    if ended and status == 0:
        READY.touch()
        while not Path(ended).exists():
            time.sleep(0.5)
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
