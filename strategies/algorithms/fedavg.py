"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS 2017).

Server, algorithm 1: w_{t+1} = sum_k (n_k / n) w_k over the cohort, n_k the client's training samples.
Client, algorithm 1 (ClientUpdate): plain local SGD; that is the training loop as it stands (`client/loop/training.py`).

With `share` other than "all" the same average runs over the shared arrays only. FedPer (Arivazhagan et al. 2019,
algorithm 1) is this with share = "body", FedBN (Li et al. 2021) with "all-but-norms", LG-FedAvg (Liang et al. 2020) with
"head", FedSim (Pillutla et al. 2022, algorithm 2) with any split: shared and personal layers are trained together.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from meadow.strategies.protocol import Algorithm, Setup

from meadow.arrays.flower import from_record, to_record
from meadow.arrays.named import Arrays
from meadow.arrays.sums import WeightedSum, add, as_before, mean

Changes = Mapping[str, npt.NDArray[np.float64]]


class FedAvg(Strategy):
    """Weighted mean of the clients' arrays, separately for each name, over those who trained it.

    The base of Meadow's other strategies: most override `combine`, and `extra`, `state` and `load_state` if they keep
    something. One that must see each client's arrays sets `needs_sums_only = False` and overrides `aggregate_train`.
    """

    needs_sums_only = True
    """The strategy combines block sums (`meadow.strategies.wire.packing.block_message`); it never sees a single
    client's arrays."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._before: Arrays = {}

    def extra(self, arrays: Arrays) -> Arrays:
        """What goes to the clients beside the shared `arrays`; each comes back under its name, in the same shape."""
        return {}

    def combine(self, total: WeightedSum, before: Arrays) -> Arrays:
        """The new shared arrays, out of the sum over the cohort of weight times array, and those that were sent."""
        if self.setup.settings.server_lr == 1:
            return mean(total, before)
        return self.stepped(changes(total, before), before)

    def stepped(self, step: Changes, before: Arrays) -> Arrays:
        """before + server_lr * step, for the names that have a step, in the dtype of `before`. Running statistics are
        moved by the whole step, whatever the rate: they are no parameters."""
        rates = dict.fromkeys(self.setup.roles.buffers, 1.0)
        rate = self.setup.settings.server_lr
        new = {name: before[name].astype(np.float64) + rates.get(name, rate) * move for name, move in step.items()}
        return {name: as_before(new[name], old) if name in new else old for name, old in before.items()}

    def judge(self, metrics: Mapping[str, Any], size: int) -> str:
        """Why a reply's metrics cannot be used by this strategy, or "". `size`: the client's declared samples."""
        return ""

    def state(self) -> Arrays:
        """What the strategy keeps from round to round, in arrays that it does not change later; it goes into checkpoints."""
        return {}

    def load_state(self, arrays: Arrays) -> None:
        """Put back what `state` returned."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a client of the cohort (the grid's node ids), all with the same content."""
        self._before = from_record(arrays)
        sent = to_record(self._before | self.extra(self._before))
        return _same_for_all(server_round, sent, config, grid, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the block sums, in the order given; None if there are none."""
        blocks = [block_of(message) for message in replies]
        if not blocks:
            return None, None
        return to_record(self.combine(add(blocks), self._before)), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a client, all with the same content."""
        return _same_for_all(server_round, arrays, config, grid, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing: `server/evaluation.py` summarises the clients' metrics alike for every strategy."""
        return None

    def summary(self) -> None:
        """Nothing to log: the resolved experiment stands in the run folder."""


def block_of(message: Message) -> WeightedSum:
    """The sum in the one message that a strategy built on sums takes."""
    weights = {k: float(cast(float, v)) for k, v in message.content.metric_records["weights"].items()}
    arrays = cast(dict[str, npt.NDArray[np.float64]], from_record(message.content.array_records["arrays"]))
    return WeightedSum(arrays, weights)


def changes(total: WeightedSum, before: Arrays) -> dict[str, npt.NDArray[np.float64]]:
    """For each name of `before` that somebody sent, mean minus before, in float64: the pseudo-gradient's opposite."""
    return {n: total.sums[n] / total.weights[n] - before[n].astype(np.float64) for n in before if n in total.sums}


def _same_for_all(
    server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, message_type: str
) -> list[Message]:
    content = RecordDict({"arrays": arrays, "config": config})
    return [
        Message(content=content, message_type=message_type, dst_node_id=client, group_id=str(server_round))
        for client in sorted(grid.get_node_ids())
    ]


FEDAVG = Algorithm(FedAvg)
