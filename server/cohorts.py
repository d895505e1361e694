"""Who takes part in a round: a function of (run.seed, round, attempt), and of the clients' sizes or a schedule's file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import UserError
from config.schema import Experiment
from config.seeds import numpy_generator


@dataclass(frozen=True)
class Call:
    """The clients of a round, ascending. asked: all who are sent the model. absent: those of them who, simulated, never
    answer or come too late, each with the reason; they are not trained. work: the share of their steps that simulated
    stragglers get through."""

    asked: list[int]
    absent: Mapping[int, str] = field(default_factory=dict)
    work: Mapping[int, float] = field(default_factory=dict)

    @property
    def trained(self) -> list[int]:
        """Those who do take part."""
        return [client for client in self.asked if client not in self.absent]


def unseen(experiment: Experiment) -> frozenset[int]:
    """The clients that no cohort ever has: `evaluate.unseen` of all, rounded, drawn from the seed."""
    clients = experiment.partition.clients
    order = numpy_generator(experiment.run.seed, "unseen").permutation(clients)
    return frozenset(int(c) for c in order[: clients - experiment.participants])


def call(
    experiment: Experiment, round_: int, sizes: Sequence[int], schedule: Sequence[Sequence[int]] = (), attempt: int = 1
) -> Call:
    """Draw a round's cohort, then what `[cohort]` simulates: dropout, stragglers, and who of too many comes too late.

    `sizes`: each client's training samples. Latencies are a client's place in a random order, stragglers behind the rest.
    """
    cohort, seed = experiment.cohort, experiment.run.seed
    asked = draw_cohort(experiment, round_, sizes, schedule, attempt)
    if experiment.run.placement == "pooled":
        return Call(asked)
    draw = numpy_generator(seed, "conduct", round_, attempt)
    chances = draw.random((len(asked), 4))
    absent: dict[int, str] = {}
    work: dict[int, float] = {}
    latency: dict[int, tuple[bool, float]] = {}
    for client, (drops, strays, share, place) in zip(asked, chances.tolist(), strict=True):
        if drops < cohort.dropout:
            absent[client] = f"simulated: dropped out (cohort.dropout = {cohort.dropout:g})"
            continue
        if strays < cohort.stragglers:
            work[client] = share
        latency[client] = (client in work, place)
    if cohort.over_selection:
        for client in sorted(latency, key=lambda c: latency[c])[experiment.cohort_size :]:
            absent[client] = f"simulated: came too late (cohort.over_selection = {cohort.over_selection:g})"
            work.pop(client, None)
    return Call(asked, absent, work)


def draw_cohort(
    experiment: Experiment, round_: int, sizes: Sequence[int], schedule: Sequence[Sequence[int]] = (), attempt: int = 1
) -> list[int]:
    """The clients asked in a round, ascending, unseen ones never. Without federation, whoever trains at all.

    The first attempt at a round draws from (seed, "cohort", round), the next ones from (seed, "cohort", round, attempt).
    """
    if experiment.run.placement == "pooled":
        return [0]
    cohort, hidden = experiment.cohort, unseen(experiment)
    everyone = [c for c in range(experiment.partition.clients) if c not in hidden]
    if cohort.sampling == "schedule":
        return sorted(schedule[round_ - 1])
    path = (round_,) if attempt == 1 else (round_, attempt)
    draw = numpy_generator(experiment.run.seed, "cohort", *path)
    if cohort.sampling == "poisson":
        chance = experiment.cohort_size / len(everyone)
        return [c for c, u in zip(everyone, draw.random(len(everyone)).tolist(), strict=True) if u < chance]
    wanted = min(len(everyone), math.ceil(experiment.cohort_size * (1 + cohort.over_selection)))
    if wanted == len(everyone):
        return everyone
    shares = [sizes[c] / sum(sizes[c] for c in everyone) for c in everyone] if cohort.sampling == "size" else None
    return sorted(int(c) for c in draw.choice(everyone, wanted, replace=False, p=shares))


def read_schedule(experiment: Experiment) -> list[list[int]]:
    """The rounds of `cohort.schedule`: a line each, clients' numbers apart by spaces or commas; "#" begins a comment line,
    an empty line is a round with nobody. [] if there is no schedule.

    Raises UserError that names the line for what is no client, is unseen, or stands twice; or if lines are missing.
    """
    place = experiment.cohort.schedule
    if not place:
        return []
    try:
        text = Path(place).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cohort.schedule = "{place}": the file cannot be read: {error}') from None
    rounds = []
    hidden, clients = unseen(experiment), experiment.partition.clients
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            continue
        words = line.replace(",", " ").split()
        wrong = next((w for w in words if not (w.isdecimal() and int(w) < clients)), None)
        where = f'cohort.schedule = "{place}", line {number}'
        if wrong is not None:
            raise UserError(f'{where}: "{wrong}" is no client; they are 0 to {clients - 1}')
        found = [int(w) for w in words]
        if again := sorted({c for c in found if found.count(c) > 1}):
            raise UserError(f"{where}: client {again[0]} stands twice")
        if held := sorted(hidden.intersection(found)):
            raise UserError(f"{where}: client {held[0]} is one of the unseen (evaluate.unseen); take it out")
        rounds.append(found)
    if len(rounds) < experiment.run.rounds:
        raise UserError(
            f'cohort.schedule = "{place}" has {len(rounds)} rounds, run.rounds = {experiment.run.rounds}: add lines, or '
            "write fewer rounds"
        )
    return rounds
