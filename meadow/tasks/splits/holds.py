"""Which client holds which targets: the task-subset assignment of `partition.holds`."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from meadow.config.load import nearest
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.splits.laws import hand_out


def held(holds: Sequence[str], targets: Sequence[str], clients: int, seed: int) -> npt.NDArray[np.bool_]:
    """Whether each client has the labels of each target, bool (clients, targets).

    holds empty: all of them. ("k",): each client k targets, drawn by the seed so that every target is held by as many
    clients as any other to within one (`meadow.tasks.splits.laws.hand_out`). Else entries of a target's name and
    numbers of clients, "digit 0-9 15"; a target that no entry names is held by all, one that several name by the
    clients of all of them. Raises UserError for what cannot be so, and for a target or a client that would be left with
    nothing.
    """
    if len(holds) == 1 and holds[0].isdecimal():
        each = int(holds[0])
        if not 1 <= each <= len(targets):
            raise _wrong(holds, f"there are {len(targets)} targets; write a number from 1 to {len(targets)}")
        if each * clients < len(targets):
            least = -(-len(targets) // clients)
            raise _wrong(holds, f"{clients} clients with so many each leave a target to nobody; write {least} at least")
        result = np.zeros((clients, len(targets)), dtype=bool)
        drawn = hand_out(len(targets), each, clients, numpy_generator(seed, "holds"))
        np.put_along_axis(result, drawn, True, axis=1)
        return result
    result = np.ones((clients, len(targets)), dtype=bool)
    named: set[str] = set()
    for entry in holds:
        target, *ranges = entry.split()
        if target not in targets:
            raise _wrong(holds, f'"{target}" is no target{nearest(target, targets)}; there are {", ".join(targets)}')
        if not ranges:
            raise _wrong(holds, f'"{entry}" names no client; write for example "{target} 0-{clients - 1}"')
        if target not in named:
            result[:, targets.index(target)] = False
            named.add(target)
        for text in ranges:
            result[_range(holds, entry, text, clients), targets.index(target)] = True
    if not result.any(axis=1).all():
        empty = int(np.flatnonzero(~result.any(axis=1))[0])
        raise _wrong(holds, f"client {empty} would hold no target; add it to one")
    return result


def _range(holds: Sequence[str], entry: str, text: str, clients: int) -> slice:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if found is None:
        raise _wrong(holds, f'"{text}" in "{entry}" is no client number and no range of them such as 0-9')
    first, last = int(found[1]), int(found[2] or found[1])
    if last >= clients:
        raise _wrong(holds, f'"{text}" in "{entry}": there are clients 0 to {clients - 1}')
    if last < first:
        raise _wrong(holds, f'"{text}" in "{entry}" is empty; write {last}-{first}')
    return slice(first, last + 1)


def _wrong(holds: Sequence[str], why: str) -> UserError:
    return UserError(f"partition.holds = {list(holds)}: {why}")
