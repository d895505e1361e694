"""Audit of the ledgers: a short run of the experiment, whose trainings are compared with its ledgers and its summary."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meadow.client.context import LocalContext, Observer
from meadow.client.loop.training import Trained
from meadow.client.node import open_node
from meadow.client.release import PrivateRelease
from meadow.config.schema import Experiment
from meadow.experiments.audit.settings import changed
from meadow.privacy.accounting import epsilon
from meadow.privacy.plan import claim, client_cost, client_noise, steps_a_round
from meadow.privacy.statistics import Check
from meadow.server.folder import RunFolder
from meadow.simulation.grid import node_context
from meadow.simulation.launch import engine
from meadow.strategies import algorithm

Part = tuple[float, ...]
"""Sampling rate, noise multiplier and steps, as in a ledger's entry; all 0 without a mechanism."""


def checks(experiment: Experiment) -> list[Check]:
    """Run the experiment briefly, and compare what was trained with the ledgers and the summary."""
    unit = experiment.privacy.unit
    short: dict[str, Any] = {
        "run__rounds": min(3, experiment.run.rounds),
        "cohort__size": min(3, experiment.cohort_size),
        "engine__name": "inline",
        "evaluate__every": 1000,
    }
    if unit == "example":
        short |= {"local__steps": min(3, steps_a_round(experiment)), "cohort__sampling": "fixed"}
    if unit == "client" and experiment.privacy.adaptive_clip:
        short["cohort__size"] = experiment.cohort_size
    brief = changed(experiment, **short)
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder, engine("inline") as launch:
        out = Path(folder) / "run"
        with observed(brief, out, seen):
            launch(brief, out)
        summary = RunFolder(out).summary() or {}
        if unit == "client":
            rounds = int(summary["rounds"])
            truth = client_cost(brief, client_noise(brief), rounds).epsilon
            found = [_reported(summary, truth, str(claim(brief, truth)))]
        else:
            found = _charged(brief, out, summary, seen)
        return [*found, _replayed(brief, out, launch)]


def _charged(experiment: Experiment, out: Path, summary: Mapping[str, Any], seen: "Seen") -> list[Check]:
    by_client: dict[int, list[Part]] = {}
    for release in seen.releases:
        by_client.setdefault(release.client, []).append(release.part)
    written: dict[int, list[Part]] = {}
    for path in (out / "state").rglob("client-*.ledger"):
        entries = [json.loads(line) for line in path.read_text().splitlines()][1:]
        written[int(path.name.split("-")[1])] = [tuple(part) for entry in entries for part in entry["parts"]]
    missing = sum(written.get(c, []) != parts for c, parts in by_client.items())
    privacy = experiment.privacy
    costs = [epsilon([(q, s, int(n)) for q, s, n in p], privacy.delta, privacy.accountant) for p in by_client.values()]
    bare = sorted({name for release in seen.releases for name in release.bare})
    found = [
        Check(
            "entries of the ledgers",
            f"all {len(seen.releases)} releases, in order",
            "they agree" if not missing else f"those of {missing} of {len(by_client)} clients differ",
            None,
            not missing,
        ),
        _reported(summary, max(costs, default=0.0), "of all that was trained"),
    ]
    if privacy.unit == "example":
        found.append(Check("arrays trained without noise", "none", ", ".join(bare) or "none", None, not bare))
    return found


def _reported(summary: Mapping[str, Any], truth: float, what: str) -> Check:
    epsilon_ = summary["privacy"]["epsilon"]["max"] or 0.0
    holds = epsilon_ >= truth * (1 - 1e-9)
    return Check("epsilon in the summary", f"{truth:.6g}, {what}", f"{epsilon_:.6g}", None, holds)


def _replayed(experiment: Experiment, out: Path, launch: Callable[..., Any]) -> Check:
    """Repeat the last round, as after a crash: its release must have the same bits."""
    before = RunFolder(out).summary() or {}
    entries = sum(path.read_text().count("\n") for path in (out / "state").rglob("client-*.ledger"))
    rounds = int(before["rounds"])
    for path in [out / "summary.json", *(out / "checkpoints").glob(f"round-{rounds:08d}.*")]:
        path.unlink(missing_ok=True)
    launch(experiment, out, resume=True)
    after = RunFolder(out).summary() or {}
    more = sum(path.read_text().count("\n") for path in (out / "state").rglob("client-*.ledger")) - entries
    same = after["model_sha256"] == before["model_sha256"] and after["personal_sha256"] == before["personal_sha256"]
    found = "the same bits" if same else f"other bits, {more} more entries"
    return Check("a repeated round", "the same release", found, None, same)


@dataclass(frozen=True)
class Release:
    """One training of a client: its cost, and the arrays that it changed without noise."""

    client: int
    part: Part
    bare: frozenset[str]


@dataclass(frozen=True)
class Seen:
    """Records every client's trainings in a run (`meadow.client.context.Observer`).

    A training whose result never leaves the client (Ditto's personal model) is not a release.
    """

    releases: list[Release] = field(default_factory=list)

    def trains(self, context: LocalContext, leaves: bool) -> Callable[[Trained], None]:
        before = {name: p.detach().clone() for name, p in context.model.named_parameters()}

        def ends(trained: Trained) -> None:
            if not leaves and algorithm(context.settings.name).own_model:
                return
            parameters = dict(context.model.named_parameters())
            moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
            part: Part = (0.0, 0.0, 0)
            if context.permit is not None and leaves:
                mechanism = context.permit.mechanism
                part = (mechanism.sample_rate, mechanism.noise_multiplier, trained.steps)
                moved -= {name for name, p in parameters.items() if p.requires_grad}
            self.releases.append(Release(context.client, part, frozenset(moved)))

        return ends

    def noises(self, client: int, release: PrivateRelease) -> None:
        last = self.releases.pop()
        self.releases.append(Release(client, (1.0, release.noise_multiplier / 2, 1), last.bare))


@contextmanager
def observed(experiment: Experiment, out: Path, seen: Observer) -> Iterator[None]:
    """Let `seen` observe the inline engine's one node in a run of the experiment in the folder `out`."""
    node = open_node(node_context(experiment, 0, 1, out / "state"))
    node.observers.append(seen)
    try:
        yield
    finally:
        node.observers.remove(seen)
