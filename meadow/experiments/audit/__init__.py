"""`meadow audit`: run an experiment's real training code with canaries, and compare the result with its privacy claim.

Example-level DP: canaries and the experiment's own model go through `meadow.client.loop.training.train`, with permits from
a client's ledger. Client-level DP: canary clients go through the server's aggregation. Local DP: canary updates go through
the client's release. In each case a short run of the experiment follows: does the ledger have all that was trained?
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
    """All checks of an experiment under DP. Raises UserError without DP, or if the run would be refused."""
    experiment = settle(experiment)
    check(experiment)
    if experiment.privacy.unit == "none":
        raise UserError(
            'privacy.unit = "none": this experiment claims no privacy to audit; write "example", "client" or "local"'
        )
    task = open_task(experiment)
    protection(experiment, task, roles_of(experiment, task.new_model()))
    parts = {"example": example.checks, "client": clients.central_checks, "local": clients.local_checks}
    with one_thread():
        return [*parts[experiment.privacy.unit](experiment, task), *ledgers.checks(experiment)]
