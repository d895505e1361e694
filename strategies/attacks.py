"""Simulated attacks, to test defences. The seed chooses the attackers.

Every attacker trains as usual, "label-flip" and "replacement" on wrong labels. All but "label-flip" then change the
update. IPM and ALIE know the honest updates, which is the strongest attacker that the papers defend against. The server
applies the attacks when it receives the replies, before admission, so that defences see them.

v is an honest move y - x; mu and sigma are mean and standard deviation over the honest clients; m of the n clients are
attackers. An attacker sends x plus:
sign-flip: -scale v. noise: v + scale N(0, 1). replacement (Bagdasaryan et al. 2020): scale, or if that is 0 n/m, times
the move trained on wrong labels. ipm (Xie et al. 2020): -scale mu. alie (Baruch et al. 2019, algorithm 3): mu - z sigma
with z = scale, or if that is 0 the largest z with which the attackers still look like the nearer half.
"""

from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from meadow.arrays.named import Arrays
from meadow.config.schema import Attack, Experiment
from meadow.runtime.seeds import numpy_generator

ON_LABELS = ("label-flip", "replacement")


def attackers(experiment: Experiment) -> frozenset[int]:
    """The attacking clients: `attack.fraction` of all, rounded, drawn from the seed."""
    if experiment.attack.kind == "none":
        return frozenset()
    clients = experiment.partition.clients
    order = numpy_generator(experiment.run.seed, "attackers").permutation(clients)
    return frozenset(int(c) for c in order[: round(experiment.attack.fraction * clients)])


def attack(
    updates: Mapping[int, Arrays], bad: frozenset[int], sent: Arrays, settings: Attack, seed: int, round_: int
) -> dict[int, Arrays]:
    """What each attacker among `updates` (client -> arrays) sends instead of its own arrays; `sent` is x.

    Auxiliary and integer arrays stay unchanged. For an array that no honest client sent, mu is 0.
    """
    evil = {c: u for c, u in updates.items() if c in bad}
    honest = [u for c, u in updates.items() if c not in bad]
    result = {}
    for client, own in evil.items():
        draw = numpy_generator(seed, "attack", round_, client)
        result[client] = {
            name: _sent(name, value, honest, sent, settings, draw, (len(updates), len(evil)))
            for name, value in own.items()
        }
    return result


def _sent(
    name: str,
    own: npt.NDArray[np.generic],
    honest: list[Arrays],
    sent: Arrays,
    settings: Attack,
    draw: np.random.Generator,
    counts: tuple[int, int],
) -> npt.NDArray[np.generic]:
    if "@" in name or not np.issubdtype(own.dtype, np.floating):
        return own
    x, (n, m) = sent[name].astype(np.float64), counts
    move = own.astype(np.float64) - x
    kind, scale = settings.kind, settings.scale
    if kind == "sign-flip":
        evil = -scale * move
    elif kind == "noise":
        evil = move + scale * draw.standard_normal(own.shape)
    elif kind == "replacement":
        evil = (scale or n / m) * move
    else:
        moves = np.stack([u[name].astype(np.float64) - x for u in honest if name in u] or [np.zeros_like(x)])
        evil = -scale * moves.mean(0) if kind == "ipm" else moves.mean(0) - (scale or largest_z(n, m)) * moves.std(0)
    return (x + evil).astype(own.dtype)


def largest_z(clients: int, attackers: int) -> float:
    """ALIE's z_max: with s = floor(n/2 + 1) - m supporters needed, the normal quantile of (n - m - s) / (n - m)."""
    honest = clients - attackers
    supporters = clients // 2 + 1 - attackers
    share = (honest - supporters) / honest if honest else 0.5
    return NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6))
