"""The ranking of methods: as plain data and as a table for the terminal, and the format of its numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from meadow.experiments import words
from meadow.experiments.pairs import compare_paired
from meadow.experiments.results import (
    ALONE,
    RunResult,
    by_method,
    counted,
    higher_is_better,
    is_share,
    primary_metric,
    targets_of,
)
from meadow.experiments.tables import Cell

Methods = dict[str, list[RunResult]]
Row = dict[str, Any]


def ranking(runs: Sequence[RunResult]) -> list[Row]:
    """One row for each target and method, the best for the clients first; plain numbers, None if not measured.

    client_mean, client_weighted, client_worst_decile, client_std (over the clients), global, last10_clients,
    last10_global, finetuned, source_before and source_after (score on the source task) are means over the runs, one for
    each of `seeds` seeds and `folds` folds. *_seed_std are their standard deviations (n - 1; None for one run). gain and
    its interval compare with `local`, positive is better; `lost` of `lost_of` pairs of client and run do worse than under
    it. bytes_up, bytes_down, bytes_saved (None: none), trained_parameters and seconds are means for one run.
    """
    methods = by_method(runs)
    rows: list[Row] = []
    for target in targets_of(runs):
        metric = primary_metric(runs, target)
        higher = higher_is_better(metric)
        alone = learners_of(methods, target).get(ALONE, [])
        found = [_row(n, group, target, metric, alone) for n, group in learners_of(methods, target).items()]

        def order(row: Row, higher: bool = higher) -> tuple[bool, float]:
            value = row["client_mean"] if row["client_mean"] is not None else row["global"]
            return row["client_mean"] is None, (-value if higher else value) if value is not None else float("inf")

        rows += [{**row, "rank": rank} for rank, row in enumerate(sorted(found, key=order), start=1)]
    return rows


def ranking_table(runs: Sequence[RunResult]) -> Table:
    """The main columns of the ranking for a terminal, one section for each target."""
    rows = ranking(runs)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for head in ("clients' mean", "worst tenth", "global", "lost vs alone", "sent", "time"):
        table.add_column(head, justify="right")
    for target in dict.fromkeys(row["target"] for row in rows):
        part = [row for row in rows if row["target"] == target]
        table.add_row(Text(f"{words.metric_label(target, part[0]['metric'])} of {target}", "bold"))
        for row in part:
            cells = [cell(row, part, key) for key in ("client_mean", "client_worst_decile", "global", "lost")]
            texts = [f"{each.text} {each.small}".strip() for each in cells]
            styled = [Text(text, "bold" if each.best else "") for text, each in zip(texts, cells, strict=True)]
            sent = words.bytes_text(row["bytes_up"] + row["bytes_down"])
            table.add_row(Text(flagged(row)), *styled, sent, words.seconds_text(row["seconds"]))
        table.add_section()
    return table


def learners_of(methods: Methods, target: str) -> Methods:
    return {n: found for n, group in methods.items() if (found := [r for r in group if target in r.experiment.learned])}


def _row(name: str, group: Sequence[RunResult], target: str, metric: str, alone: Sequence[RunResult]) -> Row:
    runs = counted(group)
    over_clients = [v for run in runs if (v := run.final("clients", target, metric))]
    versus = compare_paired(runs, counted(alone), target, metric) if name != ALONE and alone else None
    client_means = [v.get("mean") for v in over_clients]
    shared = [run.final("global", target, metric) for run in runs]
    tuned = [float(np.mean(list(s.values()))) for run in runs if (s := run.scores(target, metric, "finetuned"))]
    return {
        "target": target, "metric": metric, "rank": 0, "method": name,
        "seeds": len({run.seed for run in runs}), "folds": max(run.experiment.evaluate.folds for run in runs),
        "counted": len(runs), "started": len(group),
        "statuses": [run.status for run in group],
        "rounds": max(run.rounds_done for run in group),
        "pooled": group[0].experiment.run.placement == "pooled",
        "client_mean": mean_of(client_means), "client_mean_seed_std": _deviation(client_means),
        "client_std": mean_of([v.get("std") for v in over_clients]),
        "client_weighted": mean_of([v.get("weighted") for v in over_clients]),
        "client_worst_decile": mean_of([v.get("worst_decile") for v in over_clients]),
        "global": mean_of(shared), "global_seed_std": _deviation(shared),
        "last10_clients": mean_of([run.last10("clients", target, metric) for run in runs]),
        "last10_global": mean_of([run.last10("global", target, metric) for run in runs]),
        "finetuned": mean_of(tuned),
        "source_before": mean_of([run.forgetting(target, metric).get("before") for run in runs]),
        "source_after": mean_of([run.forgetting(target, metric).get("after") for run in runs]),
        "gain": versus.mean if versus else None,
        "gain_low": versus.interval[0] if versus and versus.interval else None,
        "gain_high": versus.interval[1] if versus and versus.interval else None,
        "lost": versus.lost if versus else None, "lost_of": versus.clients if versus else None,
        **{key: mean_of([run.cost[key] for run in runs]) for key in ("bytes_up", "bytes_down", "seconds")},
        "bytes_saved": mean_of([run.cost.get("bytes_saved") or None for run in runs]),
        "trained_parameters": mean_of([run.cost.get("trained_parameters") for run in runs]),
    }  # fmt: skip


def flagged(row: Row) -> str:
    """The method's name, with a note if not all of its runs are done."""
    states = row["statuses"]
    if set(states) == {"done"}:
        return str(row["method"])
    if "running" in states and row["counted"] == len(states):
        return f"{row['method']} (so far)"
    return f"{row['method']} ({states.count('done')} of {len(states)} done)"


def cell(row: Row, part: Sequence[Row], key: str) -> Cell:
    """The table cell for a value of a row; `part`: the rows of its target, of which the best one is marked."""
    value, metric = row[key], row["metric"]
    if value is None:
        return Cell()
    if key == "lost":
        return Cell(f"{value}", f"of {row['lost_of']}")
    if key == "trained_parameters":
        return Cell(f"{value:,.0f}")
    if key in ("bytes_up", "bytes_down", "bytes_saved"):
        return Cell(words.bytes_text(value) if value else "0")
    if key == "seconds":
        return Cell(words.seconds_text(value))
    deviation = row.get(f"{key}_seed_std")
    small = "" if deviation is None else f"± {number(deviation, metric)}"
    if key == "gain" and row["gain_low"] is not None:
        low, high = (number(row[end], metric, signed=True) for end in ("gain_low", "gain_high"))
        small = f"[{low}, {high}]"
    return Cell(number(value, metric, signed=key == "gain"), small, is_best(row, part, key))


def is_best(row: Row, part: Sequence[Row], key: str) -> bool:
    values = [other[key] for other in part if other[key] is not None and not is_aside(other, part)]
    if len(values) < 2 or row[key] is None or is_aside(row, part):
        return False
    lower = key == "client_std" or (key != "gain" and not higher_is_better(row["metric"]))
    return bool(row[key] == (min(values) if lower else max(values)))


def is_aside(row: Row, part: Sequence[Row]) -> bool:
    """Whether a row is a reference only: pooling needs all data in one place, so it is no choice among other methods."""
    return bool(row["pooled"]) and not all(other["pooled"] for other in part)


def number(value: float | None, metric: str, signed: bool = False) -> str:
    """A metric as text for a table: a fraction in percent, anything else with three decimals or four digits."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    decimals = 1 if is_share(metric) else max(0, 4 - len(str(int(abs(value)))))
    text = f"{100 * value if is_share(metric) else value:{sign},.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def unit(metric: str, target: str) -> str:
    """The unit of a difference between two values of the metric."""
    return " percentage points" if is_share(metric) else f" {words.unit_of(target, metric)}".rstrip()


def worded(value: float | None, metric: str, target: str) -> str:
    return number(value, metric) + ("%" if is_share(metric) else unit(metric, target))


def repeats(row: Row) -> str:
    """The number of runs behind a row's means and deviations: "3 seeds", "5 folds"; "" for a single run."""
    folds, seeds = f"{row['folds']} folds", f"{row['seeds']} seeds"
    if not row["folds"]:
        return seeds if row["seeds"] > 1 else ""
    return f"{seeds} of {folds} each" if row["seeds"] > 1 else folds


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the known values; None if all are unknown."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None
