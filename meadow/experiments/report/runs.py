"""The report's list of runs: how each ended, its versions and hashes, and what left its clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meadow.config.schema import Experiment
from meadow.experiments import words
from meadow.experiments.report.sentences import count_text, seed_of
from meadow.experiments.results import RunResult
from meadow.runtime.errors import UserError
from meadow.strategies import equal_weights


@dataclass(frozen=True)
class Fact:
    """A named fact. `code`: whether it is set in a fixed-width font; `more`: further lines."""

    name: str
    text: str
    code: bool = False
    more: str = ""


def entry(name: str, run: RunResult) -> dict[str, Any]:
    """The entry of a run of the method `name`, as the template expects it."""
    failed: dict[tuple[int, str], list[int]] = {}
    for record in run.rounds:
        for fault in record.get("failed") or []:
            failed.setdefault((int(fault["client"]), str(fault["reason"])), []).append(int(record["round"]))
    rounds = f"{run.rounds_done} of {run.experiment.run.rounds} rounds"
    line = f"{run.status}, {rounds}, {words.seconds_text(run.cost['seconds'])}"
    if failed:
        line += f", {count_text(len({client for client, _ in failed}), 'client')} failed at times"
    return {
        "name": f"{name}, {seed_of(run)}",
        "line": line,
        "facts": [fact for fact in _facts(run, failed) if fact.text],
        "privacy": {"unit": run.experiment.privacy.unit, **((run.summary or {}).get("privacy") or {})},
    }


def _facts(run: RunResult, failed: dict[tuple[int, str], list[int]]) -> list[Fact]:
    summary, manifest = run.summary or {}, run.manifest
    facts = [Fact("status", f"{run.status} {summary.get('reason') or ''}".strip())]
    for (client, reason), rounds in sorted(failed.items()):
        head, _, rest = reason.strip().partition("\n")
        facts.append(Fact(f"client {client} failed", f"{_rounds_text(rounds)}: {head}", more=rest))
    if (never := (summary.get("clients") or {}).get("never_sampled")) is not None:
        facts.append(Fact("never sampled", _never_sampled(int(never), run)))
    if run.experiment.run.placement == "federated":
        facts.append(Fact("admission", _admission(run.experiment)))
    return [
        *facts,
        Fact("versions", ", ".join(f"{k} {v}" for k, v in (manifest.get("versions") or {}).items())),
        Fact("commit", str(manifest.get("git_commit") or "not in a git repository"), code=True),
        Fact("command", " ".join(map(str, manifest.get("command") or [])), code=True),
        Fact("data", str(manifest.get("data_sha256") or ""), code=True),
        Fact("model", str(summary.get("model_sha256") or ""), code=True),
        Fact("folder", str(run.folder), code=True),
    ]


def _admission(experiment: Experiment) -> str:
    """How replies are weighted, and which ones are refused."""
    try:
        equal = equal_weights(experiment)
    except UserError:  # a strategy of the user's own that is no longer on the path
        equal = False
    weights = "all clients have equal weight" if equal else "a client's weight is its number of training samples"
    longest = experiment.cohort.max_norm
    return f"{weights}, at most what it declared at roll call" + (
        f"; updates with a norm above {longest:g} are refused" if longest else ""
    )


def _never_sampled(count: int, run: RunResult) -> str:
    clients = f"{count} of {run.experiment.partition.clients} clients"
    if count and run.experiment.share not in ("all", "none"):
        own = "trunk" if run.experiment.share == "head" else "head"
        shared = "head" if own == "trunk" else "trunk"
        return f"{clients}; they were evaluated with the shared {shared} and their own untrained {own}."
    return f"{clients}."


def _rounds_text(rounds: Sequence[int]) -> str:
    shown = ", ".join(map(str, rounds[:8])) + (f" and {len(rounds) - 8} more" if len(rounds) > 8 else "")
    return f"round {shown}" if len(rounds) == 1 else f"rounds {shown}"
