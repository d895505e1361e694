"""Write the report: gather its parts as plain values and render the template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from meadow.arrays.files import write_bytes
from meadow.experiments.budgets import sentences as budgets
from meadow.experiments.budgets.costs import lines_of
from meadow.experiments.pictures import splits
from meadow.experiments.pictures.style import COLOURS
from meadow.experiments.ranking import learners_of, ranking
from meadow.experiments.report import figures, runs, sentences, tables
from meadow.experiments.results import RunResult, by_method, find_runs, primary_metric, targets_of
from meadow.experiments.words import metric_name
from meadow.privacy.releases import NOT_PROTECTED


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs under `paths` to `out` (or to report.html in the folder `out`) and return its path.

    The file is self-contained and is written atomically. Raises UserError as `find_runs` does, RunStopped if it cannot be
    written.
    """
    page = render(find_runs(paths))
    path = out / "report.html" if out.is_dir() else out
    write_bytes(path, page.encode(errors="backslashreplace"))  # a name in no encoding
    return path


def render(found: Sequence[RunResult]) -> str:
    """The report as the text of one HTML page."""
    templates = Environment(
        loader=PackageLoader("meadow.experiments.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = templates.get_template("page.html.j2")
    return page.render(page=contents(found), colours=COLOURS, not_protected=NOT_PROTECTED)


def contents(found: Sequence[RunResult]) -> dict[str, Any]:
    """The parts of the page, as the template expects them."""
    methods, rows = by_method(found), ranking(found)
    names = list(methods)
    several = len(names) > 1
    return {
        "title": f"{len(names)} methods compared" if several else f"{names[0]}, {sentences.seeds_text(found)}",
        "facts": [fact for fact in _facts(found) if fact],
        "warnings": sentences.warnings(found),
        "answer": budgets.answer(found) or sentences.answer(methods, rows),
        "claims": sentences.claims(methods),
        "budgets": _budgets(found),
        "targets": [
            {
                "name": target,
                "note": sentences.target_note(part),
                "ranking": tables.ranking_of(part),
                "metrics": tables.metrics_table(learners, target, part),
                "pictures": figures.of_target(learners, target, part),
            }
            for target in targets_of(found)
            for part in [[row for row in rows if row["target"] == target]]
            for learners in [learners_of(methods, target)]
        ],
        "split": _split(found),
        "methods": tables.settings_table(methods),
        "runs": [runs.entry(name, run) for name, group in methods.items() for run in group],
    }


def _facts(found: Sequence[RunResult]) -> list[str]:
    first, seeds = found[0].experiment, len({run.seed for run in found})
    folds = max(run.experiment.evaluate.folds for run in found)
    return [
        f"{first.task.dataset}, {first.partition.clients} clients, {first.partition.law} split",
        f"{max(run.experiment.run.rounds for run in found)} rounds, {sentences.count_text(seeds, 'seed')}"
        + (f", {folds}-fold cross-validation" if folds else ""),
        f"model {first.task.model}",
        str(found[0].manifest.get("created", ""))[:10],
    ]


def _budgets(found: Sequence[RunResult]) -> list[dict[str, Any]]:
    """The cost of privacy in each target; [] if the runs have no budgets to compare."""
    lines = lines_of(found)
    return [
        {
            "heading": f"{metric_name(metric).capitalize()} of {target}",
            "about": budgets.about(lines),
            "pictures": figures.of_budgets(lines, target, metric),
            "table": budgets.table(lines, target, metric),
        }
        for target in (targets_of(found) if lines else [])
        for metric in [primary_metric(found, target)]
    ]


def _split(found: Sequence[RunResult]) -> dict[str, Any] | None:
    """The split of the first seed as a figure, and those of all seeds as a table; None if no run has one."""
    by_seed = {(run.seed, run.fold): run for run in found if run.split.get("sizes")}
    if not by_seed:
        return None
    first = by_seed[min(by_seed)]
    return {
        "of": sentences.seed_of(first),
        "caption": splits.picture_caption(first.split),
        "picture": figures.of_split(first),
        "table": tables.splits_table([by_seed[at] for at in sorted(by_seed)]),
    }
