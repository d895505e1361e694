"""The report's sentences: what came out, what to know before reading on, and how to read the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from meadow.experiments import words
from meadow.experiments.pairs import Paired, compare_paired
from meadow.experiments.ranking import Methods, Row, is_aside, number, repeats, unit, worded
from meadow.experiments.results import ALONE, RunResult, counted, higher_is_better
from meadow.experiments.words import metric_name


@dataclass(frozen=True)
class Outcome:
    """What a comparison has shown of its first target, as rows of the ranking.

    best: the method that is best for the clients; None where no client was measured. following: the next; `versus`: the
    best against it, paired. alone, pooled: the two references. losing: the methods under which clients do worse than alone,
    the most first.
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
    """What the reader must know before reading on. `about`: running, ended-early, more-ended-early, splits or untrained."""

    about: str
    text: str


def outcome(methods: Methods, rows: Sequence[Row]) -> Outcome:
    """What came out, of the ranking's `rows`."""
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
    """What came out, in sentences, for the first target: the best method, the next, who lost, and what it cost."""
    found = outcome(methods, rows)
    best, target, metric = found.best, found.first["target"], found.first["metric"]
    if best is None:
        value = found.first["global"]
        told = f"The {metric_name(metric)} of {target} on the global test set is {worded(value, metric, target)}."
        return [_why_nothing(methods) if value is None else told]
    seeds = f" ± {worded(best['client_mean_seed_std'], metric, target)} over {repeats(best)}"
    reached = (
        f"mean {metric_name(metric)} of {target} on the clients' own test samples "
        f"{worded(best['client_mean'], metric, target)}"
        f"{seeds if best['client_mean_seed_std'] is not None else ''}, "
        f"{worded(best['client_worst_decile'], metric, target)} for the worst tenth of them"
    )
    if found.following is None:
        said = [f"{best['method']}: {reached}."]
    else:
        said = [f"{best['method']} is best for the clients: {reached}.", _against_next(found, target, metric)]
    if found.alone and found.alone is not best:
        said.append(f"Training alone gives {worded(found.alone['client_mean'], metric, target)}.")
    if found.losing:
        said.append(_who_lost(found.losing, best))
    if found.pooled and found.pooled is not best:
        said.append(f"All the data in one place would give {worded(found.pooled['client_mean'], metric, target)}.")
    sent = best["bytes_up"] + best["bytes_down"]
    cost = f"sends {words.bytes_text(sent)}" if sent else "sends nothing"
    said.append(f"A run of {best['method']} {cost} and takes {words.seconds_text(best['seconds'])}.")
    return said


def _against_next(found: Outcome, target: str, metric: str) -> str:
    assert found.following is not None
    text = f"Next is {found.following['method']} with {worded(found.following['client_mean'], metric, target)}"
    if not found.versus or not found.versus.interval:
        return f"{text}; three seeds or more would tell whether that difference is more than chance."
    low, high = (number(value, metric, signed=True) for value in found.versus.interval)
    certain = found.versus.interval[0] > 0
    told = "so the difference is more than chance" if certain else "so the two are not told apart"
    return f"{text}; the paired 95% interval of the difference is {low} to {high}{unit(metric, target)}, {told}."


def _who_lost(losing: Sequence[Row], best: Row) -> str:
    pairs = "clients, counted once a run," if max(row["counted"] for row in losing) > 1 else "clients"
    chosen = [*losing[:2], *(row for row in losing[2:] if row is best)]
    parts = [f"{row['lost']} of {row['lost_of']} under {row['method']}" for row in chosen]
    none = f", none under {best['method']}" if best["lost"] == 0 else ""
    return f"Of the {pairs} {_listed(parts)} do worse than alone{none}."


def _why_nothing(methods: Methods) -> str:
    """Why there are no metrics to rank by."""
    runs = [run for group in methods.values() for run in group]
    if all(run.status == "done" and run.experiment.privacy.unit != "none" for run in runs):
        return (
            "Under DP no client's metrics leave it, and as parts of the models are personal there is no single model to "
            "score on the global test set. privacy.release = metrics lets the metrics out, unprotected."
        )
    return "Nothing has been measured yet."


def claims(methods: Methods) -> dict[str, str]:
    """Of each method under DP: the epsilon of the client that has spent most in any of its runs, with all it means."""
    found = {}
    for name, group in methods.items():
        told = [(run.summary or {}).get("privacy") or {} for run in group]
        spent = [(p["epsilon"]["max"], p["statement"]) for p in told if p.get("statement") and p["epsilon"]["max"]]
        if spent:
            found[name] = str(max(spent)[1])
    return found


def warnings(runs: Sequence[RunResult]) -> list[Warn]:
    """What the reader must know before reading on: runs that have not ended or have failed, and splits that differ."""
    return [*_unfinished(runs), *_different_splits(runs), *_untrained(runs)]


def _unfinished(runs: Sequence[RunResult]) -> list[Warn]:
    said = []
    for run in runs:
        rounds = f"{run.rounds_done} of {run.experiment.run.rounds} rounds"
        if run.status == "running":
            said.append(Warn("running", f"{_named(run)} has not ended: {rounds} so far."))
        elif run.status != "done":
            reason = (run.summary or {}).get("reason") or "no reason given"
            said.append(Warn("ended-early", f"{_named(run)} {run.status} after {rounds}: {reason}"))
    if len(said) > 6:
        more = f"{len(said) - 5} more runs have not ended as they should; the list of runs below has all."
        return [*said[:5], Warn("more-ended-early", more)]
    return said


def _different_splits(runs: Sequence[RunResult]) -> list[Warn]:
    splits: dict[tuple[int, int], set[str]] = {}
    for run in runs:
        splits.setdefault((run.seed, run.fold), set()).update({run.split_sha256} - {""})
    differ = sorted(at for at, found in splits.items() if len(found) > 1)
    of = (f"seed {seed}" + (f", fold {fold}," if fold else "") for seed, fold in differ)
    return [
        Warn("splits", f"The runs of {which} do not all have the same split; those that differ are not paired.")
        for which in of
    ]


def _untrained(runs: Sequence[RunResult]) -> list[Warn]:
    unseen = [(run, int(((run.summary or {}).get("clients") or {}).get("untrained_head") or 0)) for run in runs]
    told = [f"{count} of {run.experiment.partition.clients} ({_named(run)})" for run, count in unseen if count]
    if not told:
        return []
    more = f" and in {len(told) - 4} more runs" if len(told) > 5 else ""
    shown = ", ".join(told[:4] if more else told)
    what = "Clients that were never trained, and are scored with their own untrained part"
    return [Warn("untrained", f"{what}: {shown}{more}.")]


def target_note(part: Sequence[Row]) -> str:
    """What the figures of a target are, which way is better, and how to read its table."""
    target, metric = part[0]["target"], part[0]["metric"]
    direction = "higher" if higher_is_better(metric) else "lower"
    said = [f"{words.metric_label(target, metric)} at the end of training; {direction} is better."]
    if longest := most_repeats(part):
        said.append(f"± is the standard deviation over {longest}.")
    if len(part) > 1:
        aside = next((row["method"] for row in part if is_aside(row, part)), "")
        said.append(f"The best of each column is bold{f', {aside} aside' if aside else ''}.")
    return " ".join(said)


def most_repeats(part: Sequence[Row]) -> str:
    """What most of the means are over: "3 seeds"; "" where nothing was repeated."""
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


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
