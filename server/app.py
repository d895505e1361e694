"""The Flower ServerApp, the same on every grid. It reads the experiment from the run configuration and runs it."""

import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from meadow.config.load import from_flat
from meadow.runtime.logs import log_lines
from meadow.server.run import run_experiment
from meadow.strategies import check
from meadow.tasks.splits.shares import use_share
from meadow.tasks.task import settle

use_share(os.environ.get("MEADOW_SHARE", ""))
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment. `out` names the run folder; empty means `runs/NAME-TIME` in the current folder."""
    log_lines()
    experiment = settle(from_flat(context.run_config))
    check(experiment)
    out = Path(str(context.run_config.get("out") or f"runs/{experiment.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    run_experiment(grid, experiment, out.resolve(), resume=bool(context.run_config.get("resume", False)))
