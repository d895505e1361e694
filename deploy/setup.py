"""The one-shot service that prepares a start: keys and certificates, and each machine's share of the data.

`python -m deploy.setup NODES`: below MEADOW_FEDERATION (in a container /volumes), `coordinator` and `node-0` .. get `keys/`
(made once, `deploy/keys.py`) and `share/` (dealt anew for the experiment in MEADOW_EXPERIMENT and MEADOW_OVERRIDES,
`meadow deal`).
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from deploy import keys

VOLUMES = Path(os.environ.get("MEADOW_FEDERATION", "/volumes"))
ENDED = Path("/ended/status")


def main(nodes: int) -> int:
    """Prepare; the exit status of `meadow deal`."""
    ENDED.unlink(missing_ok=True)
    names = [f"node-{i}" for i in range(nodes)]
    keys.main(VOLUMES, names, "keys")
    experiment = os.environ.get("MEADOW_EXPERIMENT") or "fedavg"
    overrides = shlex.split(os.environ.get("MEADOW_OVERRIDES", ""))
    deal = [sys.executable, "-m", "experiments", "deal", experiment, *overrides]
    # All the data is here; a share that this machine's environment names is what is about to be made.
    environment = {key: value for key, value in os.environ.items() if key != "MEADOW_SHARE"}
    return subprocess.call([*deal, "--nodes", str(nodes), "--out", str(VOLUMES), "--below", "share"], env=environment)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
