"""Draws the cohort of a round: a function of (run.seed, round, attempt), and of the clients' sizes or a schedule file."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from meadow.config.cohort import draw_cohort, unseen
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.limits import read_file, user_path
from meadow.runtime.seeds import numpy_generator

LARGEST_SCHEDULE = 64 * 2**20
"""Bytes of the file `cohort.schedule`."""


@dataclass(frozen=True)
class Cohort:
    """The clients of a round, ascending.

    asked: the clients that are sent the model. absent: those of them that do not train because the experiment simulates
    that they drop out or reply too late, each with the reason. work: the share of its steps that each simulated straggler
    completes.
    """

    asked: list[int]
    absent: Mapping[int, str] = field(default_factory=dict)
    work: Mapping[int, float] = field(default_factory=dict)

    @property
    def trained(self) -> list[int]:
        """The clients that train."""
        return [client for client in self.asked if client not in self.absent]


def draw(
    experiment: Experiment,
    round_: int,
    sizes: Sequence[int] | npt.NDArray[np.int64],
    schedule: Sequence[Sequence[int]] = (),
    attempt: int = 1,
    secret: int | None = None,
    without: Collection[int] = (),
) -> Cohort:
    """Draw a round's cohort, then simulate what `[cohort]` asks for: dropout, stragglers, late replies.

    `sizes`: each client's training samples. `secret`: see `meadow.config.cohort.draw_cohort`. `without`: clients that
    have withdrawn. A client's latency is its place in a random order, with stragglers behind all others.
    """
    cohort, seed = experiment.cohort, experiment.run.seed
    asked = [c for c in draw_cohort(experiment, round_, sizes, schedule, attempt, secret) if c not in without]
    if experiment.run.placement == "pooled":
        return Cohort(asked)
    chances = numpy_generator(seed, "conduct", round_, attempt).random((len(asked), 4))
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
            absent[client] = f"simulated: replied too late (cohort.over_selection = {cohort.over_selection:g})"
            work.pop(client, None)
    return Cohort(asked, absent, work)


def read_schedule(experiment: Experiment) -> list[list[int]]:
    """Read `cohort.schedule`: one line per round, client numbers separated by spaces or commas. [] without a schedule.

    A line that begins with "#" is a comment; an empty line is a round without clients. Raises UserError for a number that
    is not a client, is unseen or is repeated (it names the line), and for too few lines.
    """
    place = experiment.cohort.schedule
    if not place:
        return []
    try:
        text = read_file(user_path(place), LARGEST_SCHEDULE).decode()
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
            raise UserError(f'{where}: "{wrong}" is not a client; clients are numbered 0 to {clients - 1}')
        found = [int(w) for w in words]
        if again := sorted({c for c in found if found.count(c) > 1}):
            raise UserError(f"{where}: client {again[0]} is listed twice; list each client once")
        if held := sorted(hidden.intersection(found)):
            raise UserError(f"{where}: client {held[0]} is held out of training (evaluate.unseen); remove it")
        rounds.append(found)
    if len(rounds) < experiment.run.rounds:
        raise UserError(
            f'cohort.schedule = "{place}" has {len(rounds)} rounds, run.rounds = {experiment.run.rounds}: add lines, or '
            "write fewer rounds"
        )
    return rounds
