"""The report's figures, each with a caption and a description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from meadow.experiments.budgets import figures as budgets
from meadow.experiments.budgets.costs import Line
from meadow.experiments.budgets.sentences import payers_caption, utility_caption
from meadow.experiments.pairs import Paired, compare_paired
from meadow.experiments.pictures import confusion, plots, roc, splits, style
from meadow.experiments.ranking import Methods, Row
from meadow.experiments.report.sentences import most_repeats
from meadow.experiments.results import ALONE, RunResult, counted


@dataclass(frozen=True)
class Picture:
    """A figure of the report. `about`: its description for screen readers; `svg`: one element, ready for a page."""

    id: str
    about: str
    caption: str
    svg: Markup


def drawn(figure: Figure, id_: str, about: str, caption: str) -> Picture:
    """A figure as inline SVG. matplotlib escapes the texts in it."""
    return Picture(id_, about, caption, Markup(style.to_svg(figure, id_)))


def of_target(learners: Methods, target: str, part: Sequence[Row]) -> list[Picture]:
    """All figures of a target: `learners` in the order of the experiments, `part` the ranking's rows of the target."""
    metric = part[0]["metric"]
    ordered = {row["method"]: list(learners[row["method"]]) for row in part}
    paired = _against_alone(learners, target, metric)
    runs = [run for group in learners.values() for run in group]
    curves = any(len(run.curve(place, target, metric)[0]) for run in runs for place in ("clients", "global"))
    pictures = []
    if curves:
        longest = most_repeats(part)
        caption = (f"Lines are means over {longest}, bands one standard deviation. " if longest else "") + (
            "A method without a curve for the global test set has no single shared model."
        )
        figure = plots.learning_curves(learners, target, metric)
        pictures.append(drawn(figure, f"{target}-curves", f"Learning curves of {target}", caption))
    if any(len(run.curve("validation", target, "loss")[0]) for run in runs):
        caption = "Where the training loss falls while the validation loss rises, the model overfits: stop earlier."
        figure = plots.learning_curves(learners, target, "loss", plots.LOSSES, one_scale=True)
        pictures.append(drawn(figure, f"{target}-losses", f"Training and validation loss of {target}", caption))
    if any(run.scores(target, metric) for run in runs):
        lost = " Orange: clients that do worse than under local, on the same split." if paired else ""
        caption = (
            "A dot for each client and run: the metric of the model that the client uses. Bar: the clients' mean. "
            f"Diamond: the mean of the worst tenth.{lost}"
        )
        figure = plots.client_dots({n: list(counted(g)) for n, g in ordered.items()}, target, metric, paired)
        pictures.append(drawn(figure, f"{target}-dots", f"{target}: each client by method", caption))
    if curves:
        free = len({row["bytes_up"] > 0 for row in part}) > 1
        caption = "The clients' mean against the bytes and the seconds spent so far." + (
            " Methods at 0 B send nothing." if free else ""
        )
        figure = plots.cost_curves(learners, target, metric)
        pictures.append(drawn(figure, f"{target}-cost", f"{target} against bytes and seconds", caption))
    shown = _evaluated(ordered)
    return [*pictures, *_confusion_matrices(shown, target), *_roc_curves(shown, learners, target)]


def of_budgets(lines: Sequence[Line], target: str, metric: str) -> list[Picture]:
    """The figures of what privacy costs in a target."""
    figure, about = budgets.utility(lines, target, metric), f"Utility of {target} against the privacy budget"
    pictures = [drawn(figure, f"{target}-budgets", about, utility_caption(lines))]
    if paying := [line for line in lines if any(c.clients for c in line.costs(target, metric).values())]:
        figure, about = budgets.who_pays(paying, target, metric), f"Who pays for the privacy of {target}"
        pictures.append(drawn(figure, f"{target}-payers", about, payers_caption(paying, target, metric)))
    return pictures


def of_split(run: RunResult) -> Picture:
    """The split of a run; its caption is above it on the page."""
    return drawn(splits.picture(run.split), "split", "Samples of each client by part and by label", "")


def _against_alone(learners: Methods, target: str, metric: str) -> dict[str, Paired]:
    alone = counted(learners.get(ALONE, []))
    if not alone:
        return {}
    found = {n: compare_paired(counted(g), alone, target, metric) for n, g in learners.items() if n != ALONE}
    return {name: versus for name, versus in found.items() if versus}


def _evaluated(ordered: Methods) -> Methods:
    """Each method's first run with an evaluation.json; of a cross-validation all folds of that seed."""
    shown = {}
    for name, group in ordered.items():
        if ended := [run for run in group if run.evaluation]:
            shown[name] = [run for run in ended if run.seed == ended[0].seed]
    return shown


def _confusion_matrices(shown: Methods, target: str) -> list[Picture]:
    """A matrix for each method; for a single method one of the global test set and one of the clients."""
    folds = ", the folds added up" if any(len(runs) > 1 for runs in shown.values()) else ""
    panels = {name: found for name, runs in shown.items() if (found := _confusion(runs, "clients", target))}
    where = " on the clients' own test samples, for the model that each client uses"
    if len(shown) == 1:
        (name,) = shown
        fold = f", fold {shown[name][0].fold}" if folds else ""  # all folds share these samples: not added up
        both = {
            f"Global test set{fold}": _confusion(shown[name][:1], "global", target),
            "Clients' test samples": panels.get(name),
        }
        panels, where = {title: found for title, found in both.items() if found}, ""
    if not panels:
        return []
    few = len(next(iter(panels.values()))["classes"]) <= confusion.MOST_NUMBERS
    caption = (
        f"Seed {next(iter(shown.values()))[0].seed}{folds}. Rows: the true {target}; columns: the predicted one{where}. "
        f"Colour: the share of its row{'; numbers: counts' if few else ''}."
    )
    about = f"Confusion matrices of {target}"
    return [drawn(confusion.confusion_matrices(panels), f"{target}-confusion", about, caption)]


def _roc_curves(shown: Methods, methods: Methods, target: str) -> list[Picture]:
    """A curve for each method; for a single method a curve for each class."""
    curves: dict[str, roc.Roc] = {}
    about = "on the global test set."
    for name, runs in shown.items():
        found = (runs[0].evaluation.get("global") or {}).get(target, {}).get("roc") or {}
        own = {c: (np.array(r["false_positive"]), np.array(r["true_positive"]), r["auroc"]) for c, r in found.items()}
        if len(own) == 1:
            curves[name] = next(iter(own.values()))
            about = f"of {next(iter(own))} on the global test set."
        elif own and len(shown) == 1:
            curves = {f"{target} {c}" if c.isdecimal() else c: curve for c, curve in own.items()}
            about = "of each class against all others on the global test set."
        elif own:
            curves[name] = roc.mean_roc(list(own.values()))
            about = "on the global test set: the mean over the classes, each against all others."
    if not curves:
        return []
    absent = " Methods without a single shared model have no curve." if len(curves) < len(shown) > 1 else ""
    fold = f", fold {first.fold}" if (first := next(iter(shown.values()))[0]).fold else ""
    caption = f"Seed {first.seed}{fold}. ROC {about}{absent} The diagonal is chance."
    return [drawn(roc.roc_curves(curves, methods), f"{target}-roc", f"ROC curves of {target}", caption)]


def _confusion(runs: Sequence[RunResult], place: str, target: str) -> confusion.Confusion | None:
    """The confusion matrix of a target, summed over the runs; None if no run has one."""
    found: list[Mapping[str, Any]] = [
        one for run in runs if "confusion" in (one := (run.evaluation.get(place) or {}).get(target, {}))
    ]
    if not found:
        return None
    return {"classes": found[0]["classes"], "confusion": np.sum([one["confusion"] for one in found], axis=0)}
