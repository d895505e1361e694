"""The partition laws: each determines how many samples of each label every client gets. docs/splits.md has the formulas.

"Dirichlet alpha" means three different laws in the literature; each has its own name here. A law sees only the number of
samples of each label (at least one) and returns runs along the ordered samples. `meadow.tasks.splits.partition` draws the
order of samples once, so repeating a draw with bad sizes costs no time per sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meadow.config.schema import Partition

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_UNIT = 2.0**-40
_BLOCK = 2**16  # numbers drawn at once


@dataclass(frozen=True)
class Runs:
    """The samples' clients: the first amount[0] to client owner[0], the next amount[1] to owner[1], ...; int64 (runs,).

    `by_label`: the samples are ordered by label and shuffled within each label; else shuffled altogether.
    """

    owner: Ints
    amount: Ints
    by_label: bool = True


def even(samples: int, pieces: int) -> Ints:
    """Equal sizes to within one that add up to `samples`, int64 (pieces,)."""
    return np.diff(np.arange(pieces + 1) * samples // pieces).astype(np.int64)


def assign_evenly(things: int, each: int, clients: int, draw: np.random.Generator) -> Ints:
    """Assign `each` different ones of `things` things to each client, int64 (clients, each).

    In random order, clients take the things with the fewest clients so far, ties broken at random. So the things' numbers
    of clients differ by at most one, and none is 0 if clients * each >= things.
    """
    taken = np.zeros(things, dtype=np.int64)
    result = np.empty((clients, each), dtype=np.int64)
    for client in draw.permutation(clients):
        pick = np.argsort(taken + draw.random(things))[:each]
        taken[pick] += 1
        result[client] = pick
    return result


def _iid(partition: Partition, counts: Ints, draw: np.random.Generator) -> Runs:
    """A uniformly random partition into equal sizes, to within one."""
    return Runs(np.arange(partition.clients), even(int(counts.sum()), partition.clients), by_label=False)


def _dirichlet(partition: Partition, counts: Ints, draw: np.random.Generator) -> Runs:
    """Hsu et al. 2019 (arXiv:1909.06335, section 3): equal sizes; each client draws its label mix q ~ Dir(alpha p).

    p is the label distribution of the data, so alpha is the sum of the Dirichlet's parameters: alpha -> infinity gives
    IID clients, alpha -> 0 clients of one label. Samples are taken without replacement; a label that has run out is
    removed from the mix, which is then normalised again. Clients draw in random order, so that a client's number does not
    matter.

    Clients draw in blocks. A block's draws are used up to the first client that exhausts a label; that client takes what
    is left and draws again for the rest, and the clients after it draw anew. So the law is that of sequential draws.
    """
    queue = draw.permutation(partition.clients)
    sizes = even(int(counts.sum()), partition.clients)[queue]
    prior = partition.alpha * (counts / counts.sum())
    stock, at, most = counts.copy(), 0, max(1, _BLOCK // len(counts))
    block = most
    runs: list[tuple[Ints, Ints, Ints]] = []  # client, label, amount
    while at < len(queue):
        need = sizes[at : at + block]
        mixes = _dirichlet_draws(draw, prior, len(need))
        left = mixes * (stock > 0)
        total = left.sum(axis=1)
        possible = _leading(total > 0)
        wanted = draw.multinomial(need[:possible], left[:possible] / total[:possible, None])
        whole = _leading(((stock - np.cumsum(wanted, axis=0) > 0) | (stock == 0)).all(axis=1))
        clients, labels = np.nonzero(wanted[:whole])
        runs.append((queue[at + clients], labels, wanted[clients, labels]))
        stock -= wanted[:whole].sum(axis=0)
        at += whole
        if whole == len(need):
            block = min(2 * block, most)
            continue
        first = wanted[whole] if whole < possible else np.zeros_like(stock)
        taken = _take(draw, mixes[whole], int(need[whole]), np.minimum(first, stock), stock)
        labels = np.flatnonzero(taken)
        runs.append((np.full(len(labels), queue[at]), labels, taken[labels]))
        stock -= taken
        at, block = at + 1, max(1, block // 2)
    client, label, amount = (np.concatenate(column) for column in zip(*runs, strict=True))
    order = np.argsort(label, kind="stable")
    return Runs(client[order], amount[order])


def _take(draw: np.random.Generator, mix: Floats, size: int, taken: Ints, stock: Ints) -> Ints:
    """What a client takes by its mix: `taken`, then repeated draws from the labels that are left."""
    while (need := size - int(taken.sum())) > 0:
        left = np.where(stock > taken, mix, 0.0)
        if left.sum() <= 0:
            left = (stock - taken).astype(np.float64)
        taken = taken + np.minimum(draw.multinomial(need, left / left.sum()), stock - taken)
    return taken


def _dirichlet_class(partition: Partition, counts: Ints, draw: np.random.Generator) -> Runs:
    """Yurochkin et al. 2019 (arXiv:1905.12022, section 4): each label is divided by its own p ~ Dir_N(alpha) over clients.

    Sizes vary, and clients may end up small. This is also FedScope's, FL-bench's and Flower's law.
    """
    alpha = np.full(partition.clients, partition.alpha)
    return _rows([_cut(int(count), _dirichlet_draws(draw, alpha, 1)[0], draw.random()) for count in counts])


def _dirichlet_balanced(partition: Partition, counts: Ints, draw: np.random.Generator) -> Runs:
    """NIID-Bench (Li et al. 2022, arXiv:2102.02079, its code): as dirichlet-class, but clients that have an even share
    of all samples get none of the next label.

    The other clients' shares, normalised, are again Dirichlet (neutrality), so they are drawn as such. While samples
    remain, some client has less than its even share.
    """
    received = np.zeros(partition.clients, dtype=np.int64)
    rows = []
    for count in counts:
        takers = np.flatnonzero(received < counts.sum() / partition.clients)
        share = _dirichlet_draws(draw, np.full(len(takers), partition.alpha), 1)[0]
        owner, amount = _cut(int(count), share, draw.random())
        rows.append((takers[owner], amount))
        received[takers[owner]] += amount
    return _rows(rows)


def _shards(partition: Partition, counts: Ints, draw: np.random.Generator) -> Runs:
    """McMahan et al. 2017, section 3: sort by label, cut into clients x shards equal shards, assign them at random."""
    pieces = partition.clients * partition.shards
    return Runs(draw.permutation(pieces) // partition.shards, even(int(counts.sum()), pieces))


def _labels(partition: Partition, counts: Ints, draw: np.random.Generator) -> Runs:
    """NIID-Bench's #C = k: each client has k labels, and a label's samples are divided evenly among its clients.

    `assign_evenly` assigns labels, so that each has a client. Which of a label's clients get the remainder is random.
    """
    held = assign_evenly(len(counts), partition.labels, partition.clients, draw)
    order = draw.permutation(held.size)
    order = order[np.argsort(held.ravel()[order], kind="stable")]
    holders = np.bincount(held.ravel(), minlength=len(counts))
    amounts = [even(int(count), int(number)) for count, number in zip(counts, holders, strict=True)]
    return Runs(order // partition.labels, np.concatenate(amounts))


def _quantity(partition: Partition, counts: Ints, draw: np.random.Generator) -> Runs:
    """NIID-Bench's quantity skew: sizes ~ Dir_N(alpha) times n, samples uniformly at random whatever their label."""
    share = _dirichlet_draws(draw, np.full(partition.clients, partition.alpha), 1)[0]
    return Runs(*_cut(int(counts.sum()), share, draw.random()), by_label=False)


PARTITIONERS: dict[str, Callable[[Partition, Ints, np.random.Generator], Runs]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "dirichlet-class": _dirichlet_class,
    "dirichlet-balanced": _dirichlet_balanced,
    "shards": _shards,
    "labels": _labels,
    "quantity": _quantity,
    "feature-shift": _iid,  # meadow.tasks.task shifts the inputs
}
"""partition.law -> function of (settings, samples of each label int64 (labels,), generator)."""


def _dirichlet_draws(draw: np.random.Generator, alpha: Floats, rows: int) -> Floats:
    """Draws of Dir(alpha), float64 (rows, len(alpha)), not normalised, in multiples of 2^-40.

    Rounding removes the last bits of gamma variates, which differ between mathematical libraries, and makes sums exact and
    independent of their order.
    """
    shares = np.round(draw.dirichlet(alpha, rows) / _UNIT) * _UNIT
    sums = np.cumsum(alpha)
    lost = ~np.isfinite(shares).all(axis=1) | (shares.sum(axis=1) <= 0)  # alpha so small that every variate is zero
    for row in np.flatnonzero(lost):
        shares[row] = np.arange(len(alpha)) == np.searchsorted(sums, draw.random() * sums[-1], side="right")
    return np.asarray(shares, dtype=np.float64)


def _cut(count: int, shares: Floats, start: float) -> tuple[Ints, Ints]:
    """Divide `count` samples at the cumulative shares: (clients, amounts), without those that get none.

    Amounts are within one of share * count. The cuts begin at `start`, uniform in [0, 1), so that each amount's
    expectation is exactly share * count, also for labels with fewer samples than clients.
    """
    total = np.cumsum(shares)
    cuts = np.minimum(np.floor(total / total[-1] * count + start).astype(np.int64), count)
    cuts[-1] = count
    amount = np.diff(cuts, prepend=0)
    owner = np.flatnonzero(amount)
    return owner, amount[owner]


def _rows(rows: Sequence[tuple[Ints, Ints]]) -> Runs:
    return Runs(np.concatenate([owner for owner, _ in rows]), np.concatenate([amount for _, amount in rows]))


def _leading(good: npt.NDArray[np.bool_]) -> int:
    """The number of true entries before the first false one."""
    return len(good) if good.all() else int(good.argmin())
