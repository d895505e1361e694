"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS 2017).

Server, algorithm 1: w_{t+1} = sum_k (n_k / n) w_k over the cohort, n_k the client's training samples.
Client, algorithm 1 (ClientUpdate): plain local SGD, the default training loop (`client/loop/training.py`).

The average is over the shared arrays. FedPer (Arivazhagan et al. 2019, algorithm 1) is FedAvg with share = "body",
FedBN (Li et al. 2021) with "all-but-norms", LG-FedAvg (Liang et al. 2020) with "head", and FedSim (Pillutla et al.
2022, algorithm 2) with any split.
"""

from collections.abc import Mapping

from meadow.arrays.named import Arrays, Float64, Named
from meadow.arrays.sums import WeightedSum, as_before, mean
from meadow.strategies.protocol import Algorithm, ServerAlgorithm, Setup, State


class FedAvg(ServerAlgorithm[WeightedSum]):
    """The weighted mean of each array over the clients that trained it."""

    def update(self, state: State, total: WeightedSum, model: Arrays) -> tuple[Arrays, State]:
        if self.setup.settings.server_lr == 1:
            return mean(total, model), state
        return stepped(self.setup, changes(total, model), model), state


def changes(total: WeightedSum, model: Arrays) -> Named:
    """Mean minus model, for each name of `model` that a client sent: the negative pseudo-gradient."""
    return Named({n: total.sums[n] / total.weights[n] - model[n].astype("f8") for n in model if n in total.sums})


def stepped(setup: Setup, step: Mapping[str, Float64], model: Arrays) -> Arrays:
    """model + server_lr * step, for the names of `step`, in the dtypes of `model`. Running statistics, which are not
    parameters, get the whole step."""
    rates = dict.fromkeys(setup.roles.buffers, 1.0)
    moved = {n: model[n].astype("f8") + rates.get(n, setup.settings.server_lr) * move for n, move in step.items()}
    return {name: as_before(moved[name], old) if name in moved else old for name, old in model.items()}


FEDAVG = Algorithm(FedAvg, averages=True, is_plain=True, titles={"all": "FedAvg", "body": "FedPer"})
FEDSIM = Algorithm(FedAvg, averages=True, is_plain=True)
