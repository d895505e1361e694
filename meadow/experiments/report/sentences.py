"""The report's sentences: the outcome, the warnings, and how to read the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from meadow.experiments import words
from meadow.experiments.pairs import Paired, compare_paired
from meadow.experiments.ranking import Methods, Row, is_aside, number, repeats, unit, worded
from meadow.experiments.results import ALONE, RunResult, counted, higher_is_better
from meadow.experiments.words import metric_name


@dataclass(frozen=True)
class Outcome:
    """The outcome of a comparison for its first target, as rows of the ranking.

    best: the method that is best for the clients; None if no client was evaluated. following: the second best. versus: the
    best compared with it, paired. alone, pooled: the two references. losing: the methods under which clients do worse than
    alone, the method with most such clients first.
    """

    first: Row
    best: Row | None = None
    following: Row | None = None
    versus: Paired | None = None
    alone: Row | None = None
    pooled: Row | None = None
    losing: Sequence[Row] = ()


@dataclass(frozen=True)
class Warn:
    """A warning at the top of the report. `about`: running, ended-early, more-ended-early, splits or untrained."""

    about: str
    text: str


def outcome(methods: Methods, rows: Sequence[Row]) -> Outcome:
    """The outcome from the ranking's `rows`."""
    rows = [row for row in rows if row["target"] == rows[0]["target"]]
    real = [row for row in rows if row["client_mean"] is not None]
    if not real:
        return Outcome(rows[0])
    best, *others = choices = [row for row in real if not is_aside(row, real)]
    versus = None
    if others:
        mine, theirs = (counted(methods[row["method"]]) for row in (best, others[0]))
        versus = compare_paired(mine, theirs, best["target"], best["metric"])
    alone = next((row for row in real if row["method"] == ALONE), None)
    pooled = next((row for row in real if row["pooled"]), None)
    losing = sorted((r for r in choices if r["lost"]), key=lambda r: -r["lost"] / r["lost_of"])
    return Outcome(rows[0], best, others[0] if others else None, versus, alone, pooled, losing)


def answer(methods: Methods, rows: Sequence[Row]) -> list[str]:
    """The outcome for the first target in sentences: the best method, the next, who lost, and what it cost."""
    found = outcome(methods, rows)
    best, target, metric = found.best, found.first["target"], found.first["metric"]
    if best is None:
        value = found.first["global"]
        if value is None:
            return [_why_nothing(methods)]
        return [f"The {metric_name(metric)} of {target} on the global test set is {worded(value, metric, target)}."]
    seeds = f" ± {worded(best['client_mean_seed_std'], metric, target)} over {repeats(best)}"
    reached = (
        f"mean {metric_name(metric)} of {target} on the clients' own test samples "
        f"{worded(best['client_mean'], metric, target)}"
        f"{seeds if best['client_mean_seed_std'] is not None else ''}, "
        f"{worded(best['client_worst_decile'], metric, target)} for the worst tenth of them"
    )
    if found.following is None:
        sentences = [f"{best['method']}: {reached}."]
    else:
        sentences = [f"{best['method']} is best for the clients: {reached}.", _against_next(found, target, metric)]
    if found.alone and found.alone is not best:
        sentences.append(f"Training alone gives {worded(found.alone['client_mean'], metric, target)}.")
    if found.losing:
        sentences.append(_who_lost(found.losing, best))
    if found.pooled and found.pooled is not best:
        sentences.append(
            f"Training on all data in one place gives {worded(found.pooled['client_mean'], metric, target)}."
        )
    sent = best["bytes_up"] + best["bytes_down"]
    cost = f"sends {words.bytes_text(sent)}" if sent else "sends nothing"
    sentences.append(f"A run of {best['method']} {cost} and takes {words.seconds_text(best['seconds'])}.")
    return sentences


def _against_next(found: Outcome, target: str, metric: str) -> str:
    assert found.following is not None
    text = f"Next is {found.following['method']} with {worded(found.following['client_mean'], metric, target)}"
    if not found.versus or not found.versus.interval:
        return f"{text}; run three seeds or more to see whether the difference is significant."
    low, high = (number(value, metric, signed=True) for value in found.versus.interval)
    verdict = "significant" if found.versus.interval[0] > 0 else "not significant"
    interval = f"{low} to {high}{unit(metric, target)}"
    return f"{text}; the difference is {verdict} (paired 95% interval {interval})."


def _who_lost(losing: Sequence[Row], best: Row) -> str:
    pairs = "Clients (counted once in each run)" if max(row["counted"] for row in losing) > 1 else "Clients"
    chosen = [*losing[:2], *(row for row in losing[2:] if row is best)]
    parts = [f"{row['lost']} of {row['lost_of']} under {row['method']}" for row in chosen]
    parts += [f"none under {best['method']}"] if best["lost"] == 0 else []
    return f"{pairs} that do worse than alone: {', '.join(parts)}."


def _why_nothing(methods: Methods) -> str:
    """Why there are no metrics to rank by."""
    runs = [run for group in methods.values() for run in group]
    if all(run.status == "done" and run.experiment.privacy.unit != "none" for run in runs):
        return (
            "There is no metric: under DP the clients' metrics stay with them, and because parts of the models are "
            "personal there is no single model to score on the global test set. With privacy.release = metrics the clients "
            "report their metrics, unprotected."
        )
    return "Nothing has been measured yet."


def claims(methods: Methods) -> dict[str, str]:
    """Each DP method's privacy statement, for the largest epsilon of any client in any of its runs."""
    found = {}
    for name, group in methods.items():
        reported = [(run.summary or {}).get("privacy") or {} for run in group]
        spent = [(p["epsilon"]["max"], p["statement"]) for p in reported if p.get("statement") and p["epsilon"]["max"]]
        if spent:
            found[name] = str(max(spent)[1])
    return found


def warnings(runs: Sequence[RunResult]) -> list[Warn]:
    """The warnings of the report: unfinished and failed runs, different splits, and clients without training."""
    return [*_unfinished(runs), *_different_splits(runs), *_untrained(runs)]


def _unfinished(runs: Sequence[RunResult]) -> list[Warn]:
    found = []
    for run in runs:
        rounds = f"{run.rounds_done} of {run.experiment.run.rounds} rounds"
        if run.status == "running":
            found.append(Warn("running", f"{_named(run)} has not ended: {rounds} so far."))
        elif run.status != "done":
            reason = (run.summary or {}).get("reason") or "no reason given"
            found.append(Warn("ended-early", f"{_named(run)} {run.status} after {rounds}: {reason}"))
    if len(found) > 6:
        more = f"{len(found) - 5} more runs are not done; the list of runs below has them all."
        return [*found[:5], Warn("more-ended-early", more)]
    return found


def _different_splits(runs: Sequence[RunResult]) -> list[Warn]:
    splits: dict[tuple[int, int], set[str]] = {}
    for run in runs:
        splits.setdefault((run.seed, run.fold), set()).update({run.split_sha256} - {""})
    differ = sorted(at for at, found in splits.items() if len(found) > 1)
    of = (f"seed {seed}" + (f", fold {fold}," if fold else "") for seed, fold in differ)
    return [
        Warn("splits", f"The runs of {which} have different splits; runs with different splits are not paired.")
        for which in of
    ]


def _untrained(runs: Sequence[RunResult]) -> list[Warn]:
    unseen = [(run, int(((run.summary or {}).get("clients") or {}).get("untrained_head") or 0)) for run in runs]
    counts = [f"{count} of {run.experiment.partition.clients} ({_named(run)})" for run, count in unseen if count]
    if not counts:
        return []
    more = f" and in {len(counts) - 4} more runs" if len(counts) > 5 else ""
    shown = ", ".join(counts[:4] if more else counts)
    return [
        Warn("untrained", f"Clients that never trained and are scored with untrained personal layers: {shown}{more}.")
    ]


def target_note(part: Sequence[Row]) -> str:
    """How to read a target's table: its metric, which way is better, and what the marks mean."""
    target, metric = part[0]["target"], part[0]["metric"]
    direction = "higher" if higher_is_better(metric) else "lower"
    sentences = [f"{words.metric_label(target, metric)} at the end of training; {direction} is better."]
    if longest := most_repeats(part):
        sentences.append(f"± is the standard deviation over {longest}.")
    if len(part) > 1:
        aside = next((row["method"] for row in part if is_aside(row, part)), "")
        sentences.append(f"The best of each column is bold{f' (without {aside})' if aside else ''}.")
    return " ".join(sentences)


def most_repeats(part: Sequence[Row]) -> str:
    """The number of runs behind most of the means: "3 seeds"; "" if nothing was repeated."""
    return max((repeats(row) for row in part), key=len)


def seeds_text(runs: Sequence[RunResult]) -> str:
    """ "seed 0", "seeds 0, 1, 2", "seed 0, 3 folds"."""
    seeds = sorted({run.seed for run in runs})
    folds = f", {len({run.fold for run in runs})} folds" if any(run.fold for run in runs) else ""
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds)) + folds


def seed_of(run: RunResult) -> str:
    """ "seed 0", "seed 0, fold 2"."""
    return f"seed {run.seed}" + (f", fold {run.fold}" if run.fold else "")


def count_text(number: int, what: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _named(run: RunResult) -> str:
    return f"{run.experiment.run.name}, {seed_of(run)}"
