"""What the run, compare and sweep commands print at their end."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape


def close_group(summaries: Sequence[Any], quiet: bool, as_json: bool) -> None:
    """Print the results of several runs, and exit with their status."""
    from meadow.experiments.api import exit_status
    from meadow.experiments.ranking import ranking, ranking_table
    from meadow.experiments.results import find_runs

    folder = summaries[0].folder.parent
    runs = find_runs([folder])
    result = {"ranking": ranking(runs), "runs": [asdict(s) | {"folder": str(s.folder)} for s in summaries]}
    close(quiet, as_json, result, ranking_table(runs), folder, summaries)
    raise typer.Exit(exit_status(summaries))


def close(quiet: bool, as_json: bool, result: object, table: object, folder: Path, summaries: Sequence[Any]) -> None:
    """Print the results: as JSON, or as a table with the trainers and the report's path."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    console = Console(stderr=as_json)
    for summary in summaries:
        if summary.status != "done":
            Console(stderr=True).print(f"{summary.name}: {summary.status}: {escape(summary.reason)}", soft_wrap=True)
    if not quiet:
        if table is not None:
            console.print(table)
        for summary in summaries:
            counts = ", ".join(f"{name} {count:,}" for name, count in summary.engine.get("training", {}).items())
            console.print(f"{summary.name}: trained by {counts or 'no trainer'}", soft_wrap=True)
        console.print(f"report: {folder / 'report.html'}", soft_wrap=True)
