"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS 2017).

Server, algorithm 1: w_{t+1} = sum_k (n_k / n) w_k over the cohort, n_k the client's training samples.
Client, algorithm 1 (ClientUpdate): plain local SGD; that is the training loop as it stands (`client/loop/training.py`).

With `share` other than "all" the same average runs over the shared arrays only. FedPer (Arivazhagan et al. 2019,
algorithm 1) is this with share = "body", FedBN (Li et al. 2021) with "all-but-norms", LG-FedAvg (Liang et al. 2020)
with "head", FedSim (Pillutla et al. 2022, algorithm 2) with any split: shared and personal layers are trained together.
"""

from collections.abc import Mapping

from meadow.strategies.protocol import Algorithm, ServerAlgorithm, Setup, State

from meadow.arrays.named import Arrays, Float64, Named
from meadow.arrays.sums import WeightedSum, as_before, mean


class FedAvg(ServerAlgorithm[WeightedSum]):
    """Weighted mean of the clients' arrays, separately for each name, over those who trained it."""

    def update(self, state: State, total: WeightedSum, model: Arrays) -> tuple[Arrays, State]:
        if self.setup.settings.server_lr == 1:
            return mean(total, model), state
        return stepped(self.setup, changes(total, model), model), state


def changes(total: WeightedSum, model: Arrays) -> Named:
    """For each name of `model` that somebody sent, mean minus model: the pseudo-gradient's opposite."""
    return Named({n: total.sums[n] / total.weights[n] - model[n].astype("f8") for n in model if n in total.sums})


def stepped(setup: Setup, step: Mapping[str, Float64], model: Arrays) -> Arrays:
    """model + server_lr * step, for the names that have a step, in the dtype of `model`. Running statistics are moved
    by the whole step, whatever the rate: they are no parameters."""
    rates = dict.fromkeys(setup.roles.buffers, 1.0)
    moved = {n: model[n].astype("f8") + rates.get(n, setup.settings.server_lr) * move for n, move in step.items()}
    return {name: as_before(moved[name], old) if name in moved else old for name, old in model.items()}


FEDAVG = Algorithm(FedAvg, averages=True, is_plain=True, titles={"all": "FedAvg", "body": "FedPer"})
FEDSIM = Algorithm(FedAvg, averages=True, is_plain=True)
