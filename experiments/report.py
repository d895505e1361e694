"""What runs have shown: the ranking as plain data, as a table for the terminal, and the report, one HTML file."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from config import load
from experiments import plots
from experiments.results import (
    ALONE, PRIMARY, Paired, RunResult, by_method, compare_paired, counted, find_runs, primary_metric, targets_of,
)  # fmt: skip

Methods = dict[str, list[RunResult]]
Row = dict[str, Any]

CSS = (
    f":root {{ color-scheme: light dark; {plots.css_variables(dark=False)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {plots.css_variables(dark=True)} }} }}\n"
    """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 1.2rem; margin: 3.2rem 0 .3rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 2rem 0 .2rem; }
p { max-width: 52rem; margin: .4rem 0 .8rem; }
.facts, .note, figcaption, summary span { color: var(--muted); }
.facts { margin: .35rem 0 1.4rem; }
.note, figcaption { font-size: .875rem; }
.answer { font-size: 1.08rem; padding: .1rem 0 .1rem 1.1rem; border-left: 3px solid var(--m0); max-width: 54rem; }
.warn { padding: .5rem .9rem; border: 1px solid var(--loser); border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .8rem 0 .4rem; min-width: 60%; }
th { font-weight: 500; color: var(--muted); vertical-align: bottom; }
th, td { text-align: right; padding: .34rem .7rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .left { text-align: left; padding-left: 0; }
.left + .left { padding-left: .7rem; }
thead tr:last-child th, tbody tr { border-bottom: 1px solid var(--rule); }
th.group { text-align: center; }
th.group span { display: block; border-bottom: 1px solid var(--rule); }
td small { color: var(--muted); font-size: .8rem; }
figure { margin: 1.2rem 0 1.8rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
details { border-bottom: 1px solid var(--rule); padding: .45rem 0; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .7rem 0 .7rem 1.1rem;
  font-size: .875rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .8125rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { margin: .3rem 0; white-space: pre-wrap; max-height: 16rem; overflow: auto; }
@media print { body { padding: 0; } details:not([open]) > *:not(summary) { display: block; } }
"""
)


def ranking(runs: Sequence[RunResult]) -> list[Row]:
    """One row a target and method, the best for the clients first; plain numbers, None where not measured.

    client_mean, client_weighted, client_worst_decile, client_std (over the clients), global, last10_clients, last10_global
    and finetuned are means over the seeds; *_seed_std are standard deviations over seeds (n - 1; None for one seed).
    gain and its interval are against `local`, oriented so that positive is better; lost of lost_of pairs of client and
    seed do worse than alone. bytes_up, bytes_down and seconds are of one run, the mean over seeds.
    """
    methods = by_method(runs)
    rows: list[Row] = []
    for target in targets_of(runs):
        metric = primary_metric(runs, target)
        higher = PRIMARY.get(metric, True)
        alone = _learners(methods, target).get(ALONE, [])
        found = [_row(n, group, target, metric, alone) for n, group in _learners(methods, target).items()]

        def order(row: Row, higher: bool = higher) -> tuple[bool, float]:
            value = row["client_mean"] if row["client_mean"] is not None else row["global"]
            return row["client_mean"] is None, (-value if higher else value) if value is not None else float("inf")

        rows += [{**row, "rank": rank} for rank, row in enumerate(sorted(found, key=order), start=1)]
    return rows


def ranking_table(runs: Sequence[RunResult]) -> Table:
    """The ranking for a terminal: what matters of it, one section a target."""
    rows = ranking(runs)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("method")
    for head in ("clients' mean", "worst tenth", "global", "lost vs alone", "sent", "time"):
        table.add_column(head, justify="right")
    for target in dict.fromkeys(row["target"] for row in rows):
        part = [row for row in rows if row["target"] == target]
        table.add_row(f"[bold]{plots.metric_label(target, part[0]['metric'])} of {target}[/bold]")
        for row in part:
            text = [
                _number(row["client_mean"], row["metric"]) + _plus_minus(row["client_mean_seed_std"], row["metric"]),
                _number(row["client_worst_decile"], row["metric"]),
                _number(row["global"], row["metric"]),
            ]
            for at, key in enumerate(("client_mean", "client_worst_decile", "global")):
                text[at] = f"[bold]{text[at]}[/bold]" if _is_best(row, part, key) else text[at]
            lost = "" if row["lost"] is None else f"{row['lost']} of {row['lost_of']}"
            sent = plots.bytes_text(row["bytes_up"] + row["bytes_down"])
            table.add_row(_flag(row).strip(), *text, lost, sent, plots.seconds_text(row["seconds"]))
        table.add_section()
    return table


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs under `paths` to `out` (or to report.html in the folder `out`) and return its path.

    The file needs nothing outside itself. It appears complete or not at all. Raises UserError as `find_runs` does.
    """
    page = render(find_runs(paths))
    path = out / "report.html" if out.is_dir() else out
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)
    return path


def render(runs: Sequence[RunResult]) -> str:
    """The report as the text of one HTML page."""
    methods, rows = by_method(runs), ranking(runs)
    first = runs[0].experiment
    names = list(methods)
    title = f"{len(names)} methods compared" if len(names) > 1 else f"{names[0]}, {_seeds(methods[names[0]])}"
    facts = [
        f"{first.task.dataset}, {first.partition.clients} clients, {first.partition.law} split",
        f"{max(run.experiment.run.rounds for run in runs)} rounds, {max(len(g) for g in methods.values())} seeds",
        f"model {first.task.model}",
        str(runs[0].manifest.get("created", ""))[:10],
    ]
    body = [
        f'<h1>{escape(title)}</h1><p class="facts">{escape(" · ".join(fact for fact in facts if fact))}</p>',
        *(f'<p class="warn">{escape(text)}</p>' for text in warnings(runs)),
        f'<p class="answer">{escape(" ".join(answer(methods, rows)))}</p>',
        *(_target_section(methods, target, rows) for target in targets_of(runs)),
        _split_section(runs),
        _methods_section(methods),
        _runs_section(methods),
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Meadow: {escape(title)}</title><style>{CSS}</style></head>"
    )
    return f"{head}\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
