"""Assigns targets to clients (`partition.holds`)."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from meadow.config.load import nearest
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.splits.partitioners import assign_evenly


def held(holds: Sequence[str], targets: Sequence[str], clients: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which clients have labels of which targets, bool (clients, targets).

    holds empty: all. ("k",): k targets for each client, drawn from the seed so that the targets' numbers of clients
    differ by at most one (`assign_evenly`). Else entries of a target and client numbers, "digit 0-9 15"; all clients
    have a target without entries, and several entries of a target add up. Raises UserError for impossible entries, and
    for a target or client left without the other.
    """
    if len(holds) == 1 and holds[0].isdecimal():
        each = int(holds[0])
        if not 1 <= each <= len(targets):
            raise _wrong(holds, f"there are {len(targets)} targets; write a number from 1 to {len(targets)}")
        if each * clients < len(targets):
            least = -(-len(targets) // clients)
            raise _wrong(
                holds, f"with so many for each of {clients} clients some target has no client; write at least {least}"
            )
        result = np.zeros((clients, len(targets)), dtype=bool)
        drawn = assign_evenly(len(targets), each, clients, numpy_generator(seed, "holds"))
        np.put_along_axis(result, drawn, True, axis=1)
        return result
    result = np.ones((clients, len(targets)), dtype=bool)
    named: set[str] = set()
    for entry in holds:
        target, *ranges = entry.split()
        if target not in targets:
            raise _wrong(
                holds, f'"{target}" is not a target{nearest(target, targets)}; the targets are {", ".join(targets)}'
            )
        if not ranges:
            raise _wrong(holds, f'"{entry}" names no client; write for example "{target} 0-{clients - 1}"')
        if target not in named:
            result[:, targets.index(target)] = False
            named.add(target)
        for text in ranges:
            result[_range(holds, entry, text, clients), targets.index(target)] = True
    if not result.any(axis=1).all():
        empty = int(np.flatnonzero(~result.any(axis=1))[0])
        raise _wrong(holds, f"client {empty} would have no target; add it to one")
    return result


def _range(holds: Sequence[str], entry: str, text: str, clients: int) -> slice:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None:
        raise _wrong(holds, f'"{text}" in "{entry}" is neither a client number nor a range such as 0-9')
    first, last = int(found[1]), int(found[2] or found[1])
    if last >= clients:
        raise _wrong(holds, f'"{text}" in "{entry}": there are clients 0 to {clients - 1}')
    if last < first:
        raise _wrong(holds, f'"{text}" in "{entry}" is empty; write {last}-{first}')
    return slice(first, last + 1)


def _wrong(holds: Sequence[str], why: str) -> UserError:
    return UserError(f"partition.holds = {list(holds)}: {why}")
