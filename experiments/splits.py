"""The table of a split that `meadow show --split` prints: who holds how much of what, before anything is run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.table import Table
from rich.text import Text

from config.schema import Experiment
from server.rounds import split_table
from tasks.data import Target
from tasks.laws import Ints
from tasks.task import Task

MOST_ROWS = 40
"""Clients that have a row each; of more, tenths by size have."""

MOST_LABELS = 20
"""Labels that have a column each; of more, the table says how many each client has."""


def facts(experiment: Experiment, task: Task) -> dict[str, Any]:
    """The split as a run's split.json has it."""
    split = task.split
    return {"law": split.law, "tries": split.tries, "sha256": split.sha256, **split_table(experiment, task)}


def label_names(target: Target) -> list[str]:
    """What the labels that `tasks.partition.strata` makes of a target are called."""
    if target.kind in ("value", "quantiles"):
        return [*(f"tenth {i}" for i in range(1, 11)), "missing"]
    return [*(target.names or map(str, range(target.size))), "missing"]


def table(split: Mapping[str, Any], names: Sequence[str]) -> Group:
    """A split.json to be printed. `names`: those of the labels.

    A row a client, of more than MOST_ROWS clients the smallest, the tenths by size with their means, and the largest.
    """
    sizes, labels = np.array(split["sizes"]), np.array(split["labels"])
    clients = len(sizes)
    tries = f"{split['tries']} {'try' if split['tries'] == 1 else 'tries'}"
    lines = [
        f"law {split['law']}, {tries}: {clients:,} clients with {sizes.sum():,} samples",
        f"hash {split['sha256']}",
    ]
    if "left_out" in split:
        few = split["left_out"]
        lines.append(f"left out: {few['clients']:,} of the data's own clients, with {few['samples']:,} samples")
    holders = split.get("holds", {})
    many, wide = clients > MOST_ROWS, labels.shape[1] > MOST_LABELS
    if many:
        lines += [f"target {target}: held by {len(who):,} clients" for target, who in holders.items()]
    columns = ["samples", "train", "validation", "test", *(["labels"] if wide else names[: labels.shape[1]])]
    of_label = (labels > 0).sum(axis=1, keepdims=True) if wide else labels
    values = np.column_stack([sizes.sum(axis=1), sizes, of_label])
    made = Table(box=None, header_style="dim", caption=_caption(split, many, wide), caption_justify="left")
    made.add_column("clients" if many else "client")
    for column in columns:
        made.add_column(column, justify="right")
    if holders and not many:
        made.add_column("holds")
    if many:
        for row, group in _tenths(sizes.sum(axis=1)):
            mean = values[group].mean(axis=0)
            made.add_row(row, *(f"{v:,.0f}" if len(group) == 1 else f"{v:,.1f}" for v in mean))
    else:
        for client in range(clients):
            name = f"{client} {split['names'][client]}" if "names" in split else str(client)
            mine = [target for target, who in holders.items() if client in who]
            made.add_row(Text(name), *(f"{v:,}" for v in values[client]), *([", ".join(mine)] if holders else []))
    return Group(*(Text(line) for line in lines), made)


def _tenths(sizes: Ints) -> list[tuple[str, npt.NDArray[np.intp]]]:
    """The smallest client, the tenths by size, the largest client: (what a row is called, its clients)."""
    order = np.argsort(sizes, kind="stable")
    rows = [(f"tenth {i + 1} ({len(group):,})", group) for i, group in enumerate(np.array_split(order, 10))]
    return [(f"smallest: {order[0]}", order[:1]), *rows, (f"largest: {order[-1]}", order[-1:])]


def _caption(split: Mapping[str, Any], many: bool, wide: bool) -> str:
    what = f"how many labels of {split['target']} a client has" if wide else f"samples by {split['target']}"
    return f"{what}; means over clients, in tenths by size" if many else what
