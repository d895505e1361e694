"""The report: what runs have shown, as one HTML file that opens offline."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from meadow.config import load
from meadow.config.schema import Experiment
from meadow.experiments import budgets, words
from meadow.experiments.pictures import plots, splits, style
from meadow.experiments.ranking import (
    Methods,
    Row,
    flag,
    is_aside,
    is_best,
    learners_of,
    mean_of,
    number,
    plus_minus,
    ranking,
    repeats,
    unit,
    worded,
)
from meadow.experiments.results import (
    ALONE,
    Paired,
    RunResult,
    by_method,
    compare_paired,
    counted,
    find_runs,
    higher_is_better,
    is_share,
    metrics_of,
    targets_of,
)
from meadow.experiments.words import metric_name
from meadow.privacy.releases import NOT_PROTECTED
from meadow.runtime.errors import UserError
from meadow.strategies import equal_weights

CSS = (
    f":root {{ color-scheme: light dark; {style.css_variables(dark=False)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {style.css_variables(dark=True)} }} }}\n"
    """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 73rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.25; letter-spacing: -.01em; margin: 0; }
h2 { font-size: 1.2rem; margin: 3.2rem 0 .3rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 2rem 0 .2rem; }
p { max-width: 52rem; margin: .4rem 0 .8rem; }
.facts, .note, figcaption, summary span { color: var(--muted); }
.facts { margin: .35rem 0 1.4rem; }
.note, figcaption { font-size: .875rem; }
.answer { font-size: 1.08rem; padding: .1rem 0 .1rem 1.1rem; border-left: 3px solid var(--m0); max-width: 54rem; }
.bare, .bare td { color: light-dark(#c00d1e, #ff6b6b); }
.warn { padding: .5rem .9rem; border: 1px solid var(--loser); border-radius: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .8rem 0 .4rem; min-width: 60%; }
th { font-weight: 500; color: var(--muted); vertical-align: bottom; }
th, td { text-align: right; padding: .34rem .55rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th.left, td.left { text-align: left; }
th.wrap { white-space: normal; max-width: 5.5rem; }
tr.aside td { color: var(--muted); }
thead tr:last-child th, tbody tr { border-bottom: 1px solid var(--rule); }
th.group { text-align: center; }
th.group span { display: block; border-bottom: 1px solid var(--rule); }
td small { color: var(--muted); font-size: .8rem; }
figure { margin: 1.2rem 0 1.8rem; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 44rem; height: auto; }
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


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of the runs under `paths` to `out` (or to report.html in the folder `out`) and return its path.

    The file needs nothing outside itself. It appears complete or not at all. Raises UserError as `find_runs` does.
    """
    page = render(find_runs(paths))
    path = out / "report.html" if out.is_dir() else out
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def render(runs: Sequence[RunResult]) -> str:
    """The report as the text of one HTML page."""
    methods, rows = by_method(runs), ranking(runs)
    first = runs[0].experiment
    names = list(methods)
    title = f"{len(names)} methods compared" if len(names) > 1 else f"{names[0]}, {_seeds(methods[names[0]])}"
    facts = [
        f"{first.task.dataset}, {first.partition.clients} clients, {first.partition.law} split",
        f"{max(run.experiment.run.rounds for run in runs)} rounds, {_count(len({run.seed for run in runs}), 'seed')}"
        + (f", {folds}-fold cross-validation" if (folds := max(run.experiment.evaluate.folds for run in runs)) else ""),
        f"model {first.task.model}",
        str(runs[0].manifest.get("created", ""))[:10],
    ]
    body = [
        f'<h1>{escape(title)}</h1><p class="facts">{escape(" · ".join(fact for fact in facts if fact))}</p>',
        *(f'<p class="warn">{escape(text)}</p>' for text in warnings(runs)),
        f'<p class="answer">{escape(" ".join(budgets.answer(runs) or answer(methods, rows)))}</p>',
        *(f'<p class="note">{escape(name)}: {escape(said)}.</p>' for name, said in _claims(methods).items()),
        budgets.section(runs),
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


def answer(methods: Methods, rows: Sequence[Row]) -> list[str]:
    """What came out, in sentences, for the first target: the best method, the next, who lost, and what it cost."""
    rows = [row for row in rows if row["target"] == rows[0]["target"]]
    target, metric = rows[0]["target"], rows[0]["metric"]
    real = [row for row in rows if row["client_mean"] is not None]
    if not real:
        value = rows[0]["global"]
        told = f"The {metric_name(metric)} of {target} on the global test set is {worded(value, metric, target)}."
        return [_why_nothing(methods) if value is None else told]
    choices = [row for row in real if not is_aside(row, real)]
    best = choices[0]
    seeds = f" ± {worded(best['client_mean_seed_std'], metric, target)} over {repeats(best)}"
    reached = (
        f"mean {metric_name(metric)} of {target} on the clients' own test samples "
        f"{worded(best['client_mean'], metric, target)}"
        f"{seeds if best['client_mean_seed_std'] is not None else ''}, "
        f"{worded(best['client_worst_decile'], metric, target)} for the worst tenth of them"
    )
    if len(choices) == 1:
        said = [f"{best['method']}: {reached}."]
    else:
        said = [f"{best['method']} is best for the clients: {reached}."]
        said.append(_against_next(methods, best, choices[1], target, metric))
    alone = next((row for row in real if row["method"] == ALONE), None)
    if alone and alone is not best:
        said.append(f"Training alone gives {worded(alone['client_mean'], metric, target)}.")
    losing = sorted((r for r in choices if r["lost"]), key=lambda r: -r["lost"] / r["lost_of"])
    if losing:
        pairs = "clients, counted once a run," if max(row["counted"] for row in losing) > 1 else "clients"
        chosen = losing[:2] + [row for row in losing[2:] if row is best]
        parts = [f"{row['lost']} of {row['lost_of']} under {row['method']}" for row in chosen]
        none = f", none under {best['method']}" if best["lost"] == 0 else ""
        said.append(f"Of the {pairs} {_listed(parts)} do worse than alone{none}.")
    pooled = next((row for row in real if row["pooled"]), None)
    if pooled and pooled is not best:
        said.append(f"All the data in one place would give {worded(pooled['client_mean'], metric, target)}.")
    sent = best["bytes_up"] + best["bytes_down"]
    cost = f"sends {words.bytes_text(sent)}" if sent else "sends nothing"
    said.append(f"A run of {best['method']} {cost} and takes {words.seconds_text(best['seconds'])}.")
    return said


def _why_nothing(methods: Methods) -> str:
    """Why there are no metrics to rank by."""
    runs = [run for group in methods.values() for run in group]
    if all(run.status == "done" and run.experiment.privacy.unit != "none" for run in runs):
        return (
            "Under DP no client's metrics leave it, and as parts of the models are personal there is no single model to "
            "score on the global test set. privacy.release = metrics lets the metrics out, unprotected."
        )
    return "Nothing has been measured yet."


def _claims(methods: Methods) -> dict[str, str]:
    """Of each method under DP: the epsilon of the client that has spent most in any of its runs, with all it means."""
    found = {}
    for name, group in methods.items():
        told = [(run.summary or {}).get("privacy") or {} for run in group]
        spent = [(p["epsilon"]["max"], p["statement"]) for p in told if p.get("statement") and p["epsilon"]["max"]]
        if spent:
            found[name] = str(max(spent)[1])
    return found


def warnings(runs: Sequence[RunResult]) -> list[str]:
    """What the reader must know before reading on: runs that have not ended or have failed, and splits that differ."""
    said = []
    for run in runs:
        name = _named(run)
        if run.status == "running":
            said.append(f"{name} has not ended: {run.rounds_done} of {run.experiment.run.rounds} rounds so far.")
        elif run.status != "done":
            reason = (run.summary or {}).get("reason") or "no reason given"
            said.append(f"{name} {run.status} after {run.rounds_done} of {run.experiment.run.rounds} rounds: {reason}")
    if len(said) > 6:
        said = [*said[:5], f"{len(said) - 5} more runs have not ended as they should; the list of runs below has all."]
    splits: dict[tuple[int, int], set[str]] = {}
    for run in runs:
        splits.setdefault((run.seed, run.fold), set()).update({run.split_sha256} - {""})
    for seed, fold in sorted(at for at, found in splits.items() if len(found) > 1):
        of = f"seed {seed}" + (f", fold {fold}," if fold else "")
        said.append(f"The runs of {of} do not all have the same split; those that differ are not paired.")
    unseen = [(run, int(((run.summary or {}).get("clients") or {}).get("untrained_head") or 0)) for run in runs]
    told = [f"{count} of {run.experiment.partition.clients} ({_named(run)})" for run, count in unseen if count]
    if told:
        more = f" and in {len(told) - 4} more runs" if len(told) > 5 else ""
        shown = told[:4] if more else told
        said.append(
            f"Clients that were never trained, and are scored with their own untrained part: {', '.join(shown)}{more}."
        )
    return said


def _named(run: RunResult) -> str:
    return f"{run.experiment.run.name}, {_seed_of(run)}"


def _seed_of(run: RunResult) -> str:
    return f"seed {run.seed}" + (f", fold {run.fold}" if run.fold else "")


def _against_next(methods: Methods, best: Row, following: Row, target: str, metric: str) -> str:
    text = f"Next is {following['method']} with {worded(following['client_mean'], metric, target)}"
    paired = compare_paired(counted(methods[best["method"]]), counted(methods[following["method"]]), target, metric)
    if not paired or not paired.interval:
        return f"{text}; three seeds or more would tell whether that difference is more than chance."
    low, high = (number(value, metric, signed=True) for value in paired.interval)
    told = "so the difference is more than chance" if paired.interval[0] > 0 else "so the two are not told apart"
    return f"{text}; the paired 95% interval of the difference is {low} to {high}{unit(metric, target)}, {told}."


def _target_section(methods: Methods, target: str, rows: Sequence[Row]) -> str:
    part = [row for row in rows if row["target"] == target]
    metric, learners = part[0]["metric"], learners_of(methods, target)
    alone = counted(learners.get(ALONE, []))
    found = {n: compare_paired(counted(g), alone, target, metric) for n, g in learners.items() if n != ALONE and alone}
    paired: dict[str, Paired] = {name: versus for name, versus in found.items() if versus}
    ordered = {row["method"]: list(counted(learners[row["method"]])) for row in part}
    shown = {name: learners[name] for name in learners}
    lost = " Orange: the clients that do worse than under local, on the same split." if paired else ""
    longest = max((repeats(row) for row in part), key=len)
    drawn = any(
        len(run.curve(place, target, metric)[0])
        for runs in learners.values()
        for run in runs
        for place in ("clients", "global")
    )
    dots = any(run.scores(target, metric) for runs in learners.values() for run in runs)
    pictures = [
        *([(plots.learning_curves(shown, target, metric), "curves", f"Learning curves of {target}",
         (f"Lines are means over {longest}, bands one standard deviation. " if longest else "")
         + "A method without a curve for the global test set has no single shared model.")] if drawn else []),
        *([(plots.client_dots(ordered, target, metric, paired), "dots", f"{target}: each client by method",
            f"A dot for each client and run: the metric of the model that it would use. Bar: the clients' mean. "
            f"Diamond: the mean of the worst tenth.{lost}")] if dots else []),
        *([(plots.cost_curves(shown, target, metric), "cost", f"{target} against bytes and seconds",
         "The clients' mean against what has been spent until then."
         + (" Methods at 0 B train without sending anything." if len({r["bytes_up"] > 0 for r in part}) > 1 else ""))]
          if drawn else []),
    ]  # fmt: skip
    pictures += _evaluation_pictures(ordered, learners, target)
    direction = "higher" if higher_is_better(metric) else "lower"
    text = [
        f"<h2>{escape(target)}</h2>",
        f'<p class="note">{escape(words.metric_label(target, metric))} at the end of training; {direction} is better. '
        f"{_legend(part)}</p>",
        _ranking_html(part),
        _metrics_html(learners, target, part),
        *(
            f"<figure>{style.to_svg(figure, f'{target}-{name}', escape(about))}"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for figure, name, about, caption in pictures
        ),
    ]
    return "\n".join(text)


def _evaluation_pictures(ordered: Methods, methods: Methods, target: str) -> list[tuple[Figure, str, str, str]]:
    """The confusion matrices and ROC curves of a target, each as (figure, id, about, caption), where there are any.

    `ordered`: the methods as the ranking has them. Of each they are of its first run that has them; of a
    cross-validation the first seed's folds are added up.
    """
    shown: dict[str, list[RunResult]] = {}
    for name, group in ordered.items():
        if ended := [run for run in group if run.evaluation]:
            shown[name] = [run for run in ended if run.seed == ended[0].seed]
    if not shown:
        return []
    pictures = []
    folds = ", the folds added up" if any(len(runs) > 1 for runs in shown.values()) else ""
    of = f"Seed {next(iter(shown.values()))[0].seed}{folds}. "
    panels = {name: found for name, runs in shown.items() if (found := _confusion(runs, "clients", target))}
    where = "on the clients' own test samples, of the model that each would use"
    if len(shown) == 1:
        (name,) = shown
        alike = f", fold {shown[name][0].fold}" if folds else ""  # the same samples in each fold: not added up
        both = {
            f"Global test set{alike}": _confusion(shown[name][:1], "global", target),
            "Clients' test samples": panels.get(name),
        }
        panels, where = {title: found for title, found in both.items() if found}, ""
    if panels:
        small = len(next(iter(panels.values()))["classes"]) <= plots.MOST_NUMBERS
        numbers = "; the numbers are counts" if small else ""
        pictures.append((
            plots.confusion_matrices(panels), "confusion", f"Confusion matrices of {target}",
            f"{of}Rows are the true {target}, columns what was predicted{f' {where}' if where else ''}. "
            f"The stronger the colour, the larger the share of its row{numbers}.",
        ))  # fmt: skip
    curves: dict[str, plots.Roc] = {}
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
            curves[name] = plots.mean_roc(list(own.values()))
            about = "on the global test set: the mean over the classes, each against all others."
    if curves:
        absent = " Methods without a single shared model have none." if len(curves) < len(shown) > 1 else ""
        fold = f", fold {first.fold}" if (first := next(iter(shown.values()))[0]).fold else ""
        caption = f"Seed {first.seed}{fold}. ROC {about}{absent} The diagonal is chance."
        pictures.append((plots.roc_curves(curves, methods), "roc", f"ROC curves of {target}", caption))
    return pictures


def _confusion(runs: Sequence[RunResult], place: str, target: str) -> plots.Confusion | None:
    """The confusion of a target over the runs, added up; None where none has any."""
    found = [one for run in runs if "confusion" in (one := (run.evaluation.get(place) or {}).get(target, {}))]
    if not found:
        return None
    return {"classes": found[0]["classes"], "confusion": np.sum([one["confusion"] for one in found], axis=0)}


def _metrics_html(learners: Methods, target: str, part: Sequence[Row]) -> str:
    """Every metric that was measured, behind a click: the clients' mean, and the shared model's."""
    runs = {row["method"]: counted(learners[row["method"]]) for row in part}
    names = metrics_of([run for group in runs.values() for run in group], target)
    places = {"clients": "clients' mean", "global": "shared model on the global test set"}
    values = {
        (method, place, name): mean_of([
            v["mean"] if place == "clients" and v else v for run in group for v in [run.final(place, target, name)]
        ])
        for method, group in runs.items() for place in places for name in names
    }  # fmt: skip
    columns = [(p, n) for p in places for n in names if any(values[m, p, n] is not None for m in runs)]
    if not columns:
        return ""
    head = '<tr><th class="left"></th>' + "".join(
        f'<th class="group" colspan="{n}"><span>{escape(about)}</span></th>'
        for place, about in places.items()
        if (n := sum(column[0] == place for column in columns))
    )
    head += '</tr><tr><th class="left">method</th>'
    head += "".join(f'<th class="wrap">{escape(metric_name(name))}</th>' for _, name in columns) + "</tr>"
    body = "".join(
        f"<tr><td>{escape(method)}</td>"
        + "".join(f"<td>{number(values[method, place, name], name)}</td>" for place, name in columns)
        + "</tr>"
        for method in runs
    )
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    unit = words.unit_of(target, "rmse")
    units = [
        "Fractions are in percent" if any(is_share(name) for name in names) else "",
        f"{', '.join(metric_name(n) for n in named)} in {unit}"
        if unit and (named := [n for n in names if words.unit_of(target, n) == unit])
        else "",
    ]
    note = f'<p class="note">{escape(". ".join(filter(None, units)))}.</p>' if any(units) else ""
    return f"<details><summary>All metrics of {escape(target)}</summary>{table}{note}</details>"


def _ranking_html(part: Sequence[Row]) -> str:
    metric = part[0]["metric"]
    columns: list[tuple[str, str, str]] = [
        ("clients' own test samples", "mean", "client_mean"),
        ("clients' own test samples", "weighted", "client_weighted"),
        ("clients' own test samples", "worst tenth", "client_worst_decile"),
        ("clients' own test samples", "std", "client_std"),
        ("clients' own test samples", "last 10", "last10_clients"),
        ("clients' own test samples", "fine-tuned", "finetuned"),
        ("shared model", "global test", "global"),
        ("shared model", "last 10", "last10_global"),
        ("source task", "before", "source_before"),
        ("source task", "after", "source_after"),
        ("against alone", "gain", "gain"),
        ("against alone", "lost", "lost"),
        ("one run", "up", "bytes_up"),
        ("one run", "down", "bytes_down"),
        ("one run", "saved", "bytes_saved"),
        ("one run", "trained", "trained_parameters"),
        ("one run", "time", "seconds"),
    ]
    columns = [column for column in columns if any(row[column[2]] is not None for row in part)]
    groups = {group: sum(column[0] == group for column in columns) for group, _, _ in columns}
    head = '<tr><th class="left"></th>'
    head += "".join(f'<th class="group" colspan="{n}"><span>{escape(g)}</span></th>' for g, n in groups.items())
    head += '</tr><tr><th class="left">method</th>' + "".join(f"<th>{name}</th>" for _, name, _ in columns) + "</tr>"
    body = "".join(
        f"<tr{' class=aside' if is_aside(row, part) else ''}><td>{escape(flag(row))}</td>"
        + "".join(f"<td>{_cell(row, part, key, metric)}</td>" for _, _, key in columns)
        + "</tr>"
        for row in part
    )
    notes = ["std: over the clients. last 10: mean of the last ten evaluated rounds."]
    if any(row["gain"] is not None for row in part):
        notes.append("gain: mean difference to local on the same clients, positive is better.")
        notes.append("lost: clients, counted once a run, that do worse than under local.")
    if any(row["bytes_saved"] is not None for row in part):
        notes.append("saved: bytes that did not travel, against sharing the whole model with the same clients.")
    if any(row["trained_parameters"] is not None for row in part):
        notes.append("trained: parameters that local training changes.")
    if any(row["gain_low"] is not None for row in part):
        notes.append("In brackets: the 95% paired t-interval over the seeds.")
    note = f'<p class="note">{escape(" ".join(notes))}</p>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{note}'


def _cell(row: Row, part: Sequence[Row], key: str, metric: str) -> str:
    value = row[key]
    if value is None:
        return ""
    if key == "lost":
        return f"{value} <small>of {row['lost_of']}</small>"
    if key == "trained_parameters":
        return f"{value:,.0f}"
    if key in ("bytes_up", "bytes_down", "bytes_saved"):
        return words.bytes_text(value) if value else "0"
    if key == "seconds":
        return words.seconds_text(value)
    text = number(value, metric, signed=key == "gain")
    text = f"<b>{text}</b>" if is_best(row, part, key) else text
    if key == "gain" and row["gain_low"] is not None:
        low, high = (number(row[end], metric, signed=True) for end in ("gain_low", "gain_high"))
        return f"{text} <small>[{low}, {high}]</small>"
    return text + f"<small>{plus_minus(row.get(f'{key}_seed_std'), metric)}</small>"


def _split_section(runs: Sequence[RunResult]) -> str:
    seeds = {(run.seed, run.fold): run for run in runs if run.split.get("sizes")}
    if not seeds:
        return ""
    first = seeds[min(seeds)]
    svg = style.to_svg(splits.picture(first.split), "split", "Samples of each client by part and by label")
    rows = "".join(
        f'<tr><td class="left">{seed}{f", fold {fold}" if fold else ""}</td>'
        f'<td class="left">{escape(str(run.split.get("law", "")))}</td>'
        f"<td>{run.split.get('tries', '')}</td><td>{min(totals)} to {max(totals)}</td>"
        f'<td class="left"><code>{escape(run.split_sha256)}</code></td></tr>'
        for (seed, fold), run in sorted(seeds.items())
        for totals in [[sum(sizes) for sizes in run.split["sizes"]]]
    )
    return (
        f'<h2>Who holds what</h2><p class="note">The split of {_seed_of(first)}. '
        f"{splits.picture_caption(first.split)}</p><figure>{svg}</figure>"
        '<div class="scroll"><table><thead><tr><th>seed</th><th class="left">law</th><th>tries</th>'
        '<th>samples a client</th><th class="left">SHA-256 of the split</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _methods_section(methods: Methods) -> str:
    """The settings in which the methods differ; the rest stands in each run's experiment.toml."""
    flat = {name: dict(load.flatten(load.to_tree(group[0].experiment))) for name, group in methods.items()}
    for name, group in methods.items():
        flat[name]["strategy.share"] = group[0].experiment.share  # what really travels: nothing when each is alone
    keys = [k for k in next(iter(flat.values())) if len({str(s[k]) for s in flat.values()}) > 1]
    keys = [
        key for key in keys if key not in ("run.name", "run.seed", "evaluate.fold") and not key.startswith("engine.")
    ]
    if not keys:
        return ""
    head = "".join(f'<th class="left">{escape(key)}</th>' for key in keys)
    body = "".join(
        f'<tr><td class="left">{escape(name)}</td>'
        + "".join(f'<td class="left">{escape(_setting(settings[key]))}</td>' for key in keys)
        + "</tr>"
        for name, settings in flat.items()
    )
    return (
        "<h2>What the methods are</h2><p class='note'>The settings in which they differ; all others are alike.</p>"
        f'<div class="scroll"><table><thead><tr><th>method</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _runs_section(methods: Methods) -> str:
    return "<h2>Runs</h2>" + "".join(_run_html(name, run) for name, group in methods.items() for run in group)


def _run_html(name: str, run: RunResult) -> str:
    summary = run.summary or {}
    failed: dict[tuple[int, str], list[int]] = {}
    for record in run.rounds:
        for fault in record.get("failed") or []:
            failed.setdefault((int(fault["client"]), str(fault["reason"])), []).append(int(record["round"]))
    rounds = f"{run.rounds_done} of {run.experiment.run.rounds} rounds"
    line = f"{run.status}, {rounds}, {words.seconds_text(run.cost['seconds'])}"
    if failed:
        line += f", {_count(len({client for client, _ in failed}), 'client')} failed at times"
    facts: list[tuple[str, str]] = [("status", escape(f"{run.status} {summary.get('reason') or ''}".strip()))]
    for (client, reason), rounds_failed in sorted(failed.items()):
        head, _, rest = reason.strip().partition("\n")
        more = f"<pre>{escape(rest)}</pre>" if rest else ""
        facts.append((f"client {client} failed", f"{_rounds_text(rounds_failed)}: {escape(head)}{more}"))
    if (never := (summary.get("clients") or {}).get("never_sampled")) is not None:
        facts.append(("never sampled", escape(_never_sampled(int(never), run))))
    if run.experiment.run.placement == "federated":
        facts.append(("admission", escape(_admission(run.experiment))))
    facts += [
        ("privacy", privacy_statement(run)),
        ("versions", escape(", ".join(f"{k} {v}" for k, v in (run.manifest.get("versions") or {}).items()))),
        ("commit", f"<code>{escape(str(run.manifest.get('git_commit') or 'not in a git repository'))}</code>"),
        ("command", f"<code>{escape(' '.join(map(str, run.manifest.get('command') or [])))}</code>"),
        ("data", f"<code>{escape(str(run.manifest.get('data_sha256') or ''))}</code>"),
        ("model", f"<code>{escape(str(summary.get('model_sha256') or ''))}</code>"),
        ("folder", f"<code>{escape(str(run.folder))}</code>"),
    ]
    items = "".join(f"<dt>{key}</dt><dd>{text}</dd>" for key, text in facts if text not in ("", "<code></code>"))
    head = f"<summary>{escape(name)}, {_seed_of(run)} <span>{escape(line)}</span></summary>"
    return f"<details>{head}<dl>{items}</dl></details>"


def _admission(experiment: Experiment) -> str:
    """What a reply must be to count, and how much it counts."""
    try:
        equal = equal_weights(experiment)
    except UserError:  # a strategy of the user's own that is no longer on the path
        equal = False
    counts = "each client counts 1" if equal else "a client counts its training samples"
    longest = experiment.cohort.max_norm
    return f"{counts}, with no more samples than it declared at roll call" + (
        f"; updates longer than {longest:g} are refused" if longest else ""
    )


def privacy_statement(run: RunResult) -> str:
    """What a run protects, and what left its clients, as HTML: what is not protected in red."""
    privacy = {"unit": run.experiment.privacy.unit, **((run.summary or {}).get("privacy") or {})}
    left = privacy.get("releases") or []
    if privacy["unit"] == "none":
        bare = "No protection: no noise was added to anything."
        what = ", ".join(escape(str(entry["what"])) for entry in left)
        return f'{bare} What left the clients: <span class="bare">{what}</span>.' if what else bare
    said: list[str] = []
    if statement := privacy.get("statement"):
        median = (privacy.get("epsilon") or {}).get("median")
        said.append(f"The client that has spent most: {escape(str(statement))}; the median client's: {median:.4g}.")
    if gone := privacy.get("exhausted"):
        said.append(f"{gone} of the clients left because their budget was spent.")
    if noise := privacy.get("noise"):
        said.append(f"The noise is {escape(str(noise))}.")
    rows = "".join(_release(str(entry["what"]), str(entry["mechanism"])) for entry in left)
    table = f'<table><tr><th>what left</th><th class="left">protected by</th></tr>{rows}</table>' if rows else ""
    return f"{' '.join(said)}{table}"


def _release(what: str, mechanism: str) -> str:
    bare = ' class="bare"' if mechanism == NOT_PROTECTED else ""
    return f'<tr{bare}><td>{escape(what)}</td><td class="left">{escape(mechanism)}</td></tr>'


def _never_sampled(count: int, run: RunResult) -> str:
    clients = f"{count} of {run.experiment.partition.clients} clients"
    if count and run.experiment.share not in ("all", "none"):
        own = "trunk" if run.experiment.share == "head" else "head"
        shared = "head" if own == "trunk" else "trunk"
        return f"{clients}; they are evaluated with the shared {shared} and their own untrained {own}."
    return f"{clients}."


def _legend(part: Sequence[Row]) -> str:
    longest = max((repeats(row) for row in part), key=len)
    said = [f"± is the standard deviation over {longest}."] if longest else []
    if len(part) > 1:
        aside = next((row["method"] for row in part if is_aside(row, part)), "")
        said.append(f"The best of each column is bold{f', {escape(aside)} aside' if aside else ''}.")
    return " ".join(said)


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) or "(none)"


def _seeds(runs: Sequence[RunResult]) -> str:
    seeds = sorted({run.seed for run in runs})
    folds = f", {len({run.fold for run in runs})} folds" if any(run.fold for run in runs) else ""
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds)) + folds


def _rounds_text(rounds: Sequence[int]) -> str:
    shown = ", ".join(map(str, rounds[:8])) + (f" and {len(rounds) - 8} more" if len(rounds) > 8 else "")
    return f"round {shown}" if len(rounds) == 1 else f"rounds {shown}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
