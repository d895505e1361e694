"""What the server knows about its clients' states, as a request carries it: clients keep their states themselves."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np


class Known(NamedTuple):
    """newest: a round; the client has a state of it or of a later one (0: the server knows of none). forgotten: the states
    up to this round do not count (-1: all do)."""

    newest: int = 0
    forgotten: int = -1


def pack_states(clients: Collection[int], newest: Mapping[int, int], forgotten: Mapping[int, int]) -> dict[str, bytes]:
    """An entry of a request's settings about these clients; none if there is nothing to know."""
    about = [(c, newest.get(c, 0), forgotten.get(c, -1)) for c in sorted(clients) if c in newest or c in forgotten]
    return {"states": np.array(about, "<i4").tobytes()} if about else {}


def known_state(config: Mapping[str, Any], client: int) -> Known:
    """What the settings of a request say about a client's state."""
    table = np.frombuffer(config.get("states", b""), "<i4").reshape(-1, 3)
    place = int(np.searchsorted(table[:, 0], client))
    return Known(*map(int, table[place, 1:])) if place < len(table) and table[place, 0] == client else Known()
