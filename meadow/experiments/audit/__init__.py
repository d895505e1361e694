"""`meadow audit`: measures the mechanism of this experiment, through the code that trains, against what it claims.

Example-level: canaries and the experiment's own model go through `meadow.client.loop.training.train` with the permits
that a client's ledger gives. Client-level: canary clients go through the server's own combination. Local: canary
updates through the client's. Then a short run of the experiment itself: what was trained against what the ledgers say.
"""

from meadow.config.schema import Experiment
from meadow.experiments.audit import clients, example, ledgers
from meadow.privacy.statistics import Check
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import one_thread
from meadow.server.privacy import protection
from meadow.strategies import check
from meadow.strategies.roles import roles_of
from meadow.tasks.task import open_task, settle


def audit(experiment: Experiment) -> list[Check]:
    """All checks of an experiment under DP. Raises UserError if nothing is claimed, or if the run would be refused."""
    experiment = settle(experiment)
    check(experiment)
    if experiment.privacy.unit == "none":
        raise UserError('privacy.unit = "none": nothing is claimed, so there is nothing to audit')
    task = open_task(experiment)
    protection(experiment, task, roles_of(experiment, task.new_model()))
    parts = {"example": example.checks, "client": clients.central_checks, "local": clients.local_checks}
    with one_thread():
        return [*parts[experiment.privacy.unit](experiment, task), *ledgers.checks(experiment)]
