"""Who takes part in a round: a function of (run.seed, round, attempt), and of the clients' sizes or a schedule's file."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from meadow.config.cohort import draw_cohort, unseen
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator


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


def call(
    experiment: Experiment,
    round_: int,
    sizes: Sequence[int] | npt.NDArray[np.int64],
    schedule: Sequence[Sequence[int]] = (),
    attempt: int = 1,
    secret: int | None = None,
    without: Collection[int] = (),
) -> Call:
    """Draw a round's cohort, then what `[cohort]` simulates: dropout, stragglers, and who of too many comes too late.

    `sizes`: each client's training samples. `secret`: as `meadow.config.cohort.draw_cohort`. `without`: clients that
    have left. Latencies are a client's place in a random order, stragglers behind the rest.
    """
    cohort, seed = experiment.cohort, experiment.run.seed
    asked = [c for c in draw_cohort(experiment, round_, sizes, schedule, attempt, secret) if c not in without]
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
