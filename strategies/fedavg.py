"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS 2017).

Server, algorithm 1: w_{t+1} = sum_k (n_k / n) w_k over the cohort, n_k the client's training samples.
Client, algorithm 1 (ClientUpdate): plain local SGD; that is the training loop as it stands (`client/training.py`).

With `share` other than "all" the same average runs over the shared arrays only. FedPer (Arivazhagan et al. 2019,
algorithm 1) is this with share = "body".
"""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.blocks import average
from strategies.packing import block_of
from strategies.sharing import from_record, to_record


class FedAvg(Strategy):
    """Weighted mean of the clients' arrays, separately for each name, over those who trained it."""

    needs_sums_only = True
    """The strategy combines block sums (`strategies.packing.block_message`); it never sees a single client's arrays."""

    def __init__(self) -> None:
        self._arrays: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a client of the cohort (the grid's node ids), all with the same content."""
        self._arrays = arrays
        return _same_for_all(server_round, arrays, config, grid, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the block sums, in the order given; None if there are none or before `configure_train`."""
        blocks = [block_of(message) for message in replies]
        if not blocks or self._arrays is None:
            return None, None
        return to_record(average(blocks, from_record(self._arrays))), None

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


def _same_for_all(
    server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, message_type: str
) -> list[Message]:
    content = RecordDict({"arrays": arrays, "config": config})
    return [
        Message(content=content, message_type=message_type, dst_node_id=client, group_id=str(server_round))
        for client in sorted(grid.get_node_ids())
    ]
