"""Splits: how the training samples are dealt to clients, and each client's into train, validation and test.

"Dirichlet alpha" means three different laws in the literature; each has its own name here. All deal every sample to
exactly one client. A draw that leaves some client with fewer than `min_size` samples is drawn again; that changes the
law, so the number of tries is recorded.
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from config.errors import UserError
from config.schema import Partition
from config.seeds import numpy_generator
from tasks.data import MISSING, Target

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Owners = Ints
"""For each sample the client that gets it, int64 (n,)."""

_TRIES = 200
_BINS = 10


@dataclass(frozen=True)
class ClientIndices:
    """One client's sample indices into the training pool, each part sorted, int64."""

    train: Ints
    validation: Ints
    test: Ints


@dataclass(frozen=True)
class Split:
    """A split with the law it was drawn from and the tries it took.

    sha256: over, for each client in order, its number in UTF-8 and the little-endian int64 bytes of its sorted
    training, validation and test indices, in this order.
    """

    law: str
    tries: int
    clients: tuple[ClientIndices, ...]
    sha256: str


def strata(y: Tensor, target: Target) -> Ints:
    """The labels by which samples are dealt and stratified, int64 (n,).

    They are a target's classes, where there is one at each token that of the last; the first label that a sample of
    several has; a value's deciles. Samples whose target is missing are a label of their own, after all others.
    """
    values = y.numpy() if y.ndim == 1 or target.kind == "labels" else y[:, -1].numpy()
    if target.kind == "class":
        return np.where(values == MISSING, target.size, values).astype(np.int64)
    if target.kind == "labels":
        return np.where(np.nan_to_num(values).any(1), np.nan_to_num(values).argmax(1), target.size).astype(np.int64)
    known = ~np.isnan(values)
    if not known.any():
        return np.zeros(len(values), dtype=np.int64)
    edges = np.quantile(values[known].astype(np.float64), np.arange(1, _BINS) / _BINS)
    return np.where(known, np.digitize(values.astype(np.float64), edges), _BINS).astype(np.int64)


def label_counts(split: Split, labels: Ints) -> Ints:
    """Samples (all three parts) of each client by label, int64 (clients, labels)."""
    classes = int(labels.max()) + 1
    counts = [
        np.bincount(labels[np.concatenate([c.train, c.validation, c.test])], minlength=classes) for c in split.clients
    ]
    return np.stack(counts).astype(np.int64)


def deal(partition: Partition, labels: Ints, seed: int) -> Split:
    """Deal samples with the given labels (int64 (n,), 0 and up) by the law of the experiment.

    Raises UserError if the split is impossible, or not found within 200 tries.
    """
    classes = int(labels.max()) + 1
    _possible(partition, len(labels), classes)
    law = _LAWS[partition.law]
    for attempt in range(1, _TRIES + 1):
        owners = law(partition, labels, classes, numpy_generator(seed, "partition", attempt))
        sizes = np.bincount(owners, minlength=partition.clients)
        if sizes.min() >= partition.min_size:
            break
    else:
        raise UserError(
            f'partition.min_size = {partition.min_size}: no draw of {_TRIES} by law "{partition.law}" with alpha = '
            f"{partition.alpha} gave each of {partition.clients} clients so many of {len(labels)} samples: raise "
            "partition.alpha, or lower partition.min_size or partition.clients"
        )
    order = np.lexsort((labels, owners))
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    clients = tuple(
        _into_parts(order[a:b], partition.parts, numpy_generator(seed, "parts", client), labels)
        for client, (a, b) in enumerate(itertools.pairwise(bounds))
    )
    digest = hashlib.sha256()
    for client, indices in enumerate(clients):
        digest.update(str(client).encode())
        for part in (indices.train, indices.validation, indices.test):
            digest.update(part.astype("<i8").tobytes())
    return Split(partition.law, attempt, clients, digest.hexdigest())


def _possible(partition: Partition, samples: int, classes: int) -> None:
    if partition.clients * partition.min_size > samples:
        raise UserError(
            f"partition.clients = {partition.clients}: {samples} samples cannot give each client partition.min_size = "
            f"{partition.min_size}; at most {samples // partition.min_size} clients are possible"
        )
    if partition.law == "shards" and partition.clients * partition.shards > samples:
        raise UserError(f"partition.shards = {partition.shards}: more shards than the {samples} samples; lower it")
    if partition.law == "labels" and partition.labels > classes:
        raise UserError(f"partition.labels = {partition.labels}: the data has {classes} labels; write at most that")
    if partition.law == "labels" and partition.labels * partition.clients < classes:
        raise UserError(
            f"partition.labels = {partition.labels}: {partition.clients} clients with so many labels each cannot hold "
            f"all {classes} labels; write at least {-(-classes // partition.clients)}"
        )


def _iid(partition: Partition, labels: Ints, classes: int, draw: np.random.Generator) -> Owners:
    """A uniformly random deal into equal sizes, to within one."""
    return _by_rank(draw.permutation(len(labels)), _even(len(labels), partition.clients))


def _dirichlet(partition: Partition, labels: Ints, classes: int, draw: np.random.Generator) -> Owners:
    """Hsu et al. 2019 (arXiv:1909.06335, section 3): equal sizes; each client draws its label mix q ~ Dir(alpha p).

    p is the label distribution of the data, so alpha is the sum of the Dirichlet's parameters: alpha -> infinity gives
    IID clients, alpha -> 0 clients of one label. Samples are taken without replacement; a label that has run out is
    left out of the mix, which is then scaled up again. Clients draw in a random order, so that what the last ones
    must take does not depend on their number.
    """
    counts = np.bincount(labels, minlength=classes)
    stock = counts.copy()
    prior = counts / counts.sum()
    sizes = _even(len(labels), partition.clients)
    taken = np.zeros((partition.clients, classes), dtype=np.int64)
    for client in draw.permutation(partition.clients):
        mix = np.zeros(classes)
        mix[prior > 0] = _dirichlet_draw(draw, partition.alpha * prior[prior > 0])
        while (need := int(sizes[client] - taken[client].sum())) > 0:
            left = np.where(stock > 0, mix, 0.0)
            if left.sum() <= 0:
                left = stock.astype(np.float64)
            wanted = np.minimum(draw.multinomial(need, left / left.sum()), stock)
            taken[client] += wanted
            stock -= wanted
    return _by_class(labels, taken.T, draw)


def _dirichlet_class(partition: Partition, labels: Ints, classes: int, draw: np.random.Generator) -> Owners:
    """Yurochkin et al. 2019 (arXiv:1905.12022, section 4): each label is dealt by its own p ~ Dir_N(alpha) over clients.

    Sizes vary, and clients may end up small. This is also FedScope's, FL-bench's and Flower's law.
    """
    counts = np.bincount(labels, minlength=classes)
    shares = np.stack([_dirichlet_draw(draw, np.full(partition.clients, partition.alpha)) for _ in range(classes)])
    return _by_class(labels, _cut(counts, shares), draw)


def _dirichlet_balanced(partition: Partition, labels: Ints, classes: int, draw: np.random.Generator) -> Owners:
    """NIID-Bench (Li et al. 2022, arXiv:2102.02079, its code): as dirichlet-class, but who has its even share of all
    samples already gets none of the next label."""
    counts = np.bincount(labels, minlength=classes)
    dealt = np.zeros((classes, partition.clients), dtype=np.int64)
    for label in range(classes):
        share = _dirichlet_draw(draw, np.full(partition.clients, partition.alpha))
        open_ = np.where(dealt.sum(axis=0) < len(labels) / partition.clients, share, 0.0)
        share = open_ / open_.sum() if open_.sum() > 0 else np.full(partition.clients, 1 / partition.clients)
        dealt[label] = _cut(counts[label : label + 1], share[None])[0]
    return _by_class(labels, dealt, draw)


def _shards(partition: Partition, labels: Ints, classes: int, draw: np.random.Generator) -> Owners:
    """McMahan et al. 2017, section 3: sort by label, cut into clients x shards equal shards, deal them at random."""
    mixed = draw.permutation(len(labels))
    ordered = mixed[np.argsort(labels[mixed], kind="stable")]
    pieces = partition.clients * partition.shards
    owner_of_piece = draw.permutation(pieces) // partition.shards
    owners = np.empty(len(labels), dtype=np.int64)
    owners[ordered] = np.repeat(owner_of_piece, _even(len(labels), pieces))
    return owners


def _labels(partition: Partition, labels: Ints, classes: int, draw: np.random.Generator) -> Owners:
    """NIID-Bench's #C = k: each client holds k labels, and a label's samples are dealt evenly among its holders.

    Labels are handed out in random rounds over all labels, so that each is held by somebody, and by as many clients as
    any other to within one; a client never gets the same label twice.
    """
    holders = np.zeros((classes, partition.clients), dtype=np.int64)
    for client in draw.permutation(partition.clients):
        held = holders.sum(axis=1) + draw.random(classes)
        holders[np.argsort(held)[: partition.labels], client] = 1
    counts = np.bincount(labels, minlength=classes)
    return _by_class(labels, _cut(counts, holders / holders.sum(axis=1, keepdims=True)), draw)


def _quantity(partition: Partition, labels: Ints, classes: int, draw: np.random.Generator) -> Owners:
    """NIID-Bench's quantity skew: sizes ~ Dir_N(alpha) times n, samples uniformly at random whatever their label."""
    share = _dirichlet_draw(draw, np.full(partition.clients, partition.alpha))
    return _by_rank(draw.permutation(len(labels)), _cut(np.array([len(labels)]), share[None])[0])


_LAWS: dict[str, Callable[[Partition, Ints, int, np.random.Generator], Owners]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "dirichlet-class": _dirichlet_class,
    "dirichlet-balanced": _dirichlet_balanced,
    "shards": _shards,
    "labels": _labels,
    "quantity": _quantity,
}


def _dirichlet_draw(draw: np.random.Generator, alpha: Floats) -> Floats:
    """A Dirichlet draw, rounded to 2^-40: the last bits of gamma variates differ between mathematical libraries."""
    share = np.round(draw.dirichlet(alpha) * 2.0**40) / 2.0**40
    if not np.isfinite(share).all() or share.sum() <= 0:  # so small an alpha that every gamma variate is zero
        share = np.zeros(len(alpha))
        share[draw.integers(len(alpha))] = 1.0
    total: float = share.sum()
    return np.asarray(share / total, dtype=np.float64)


def _even(samples: int, pieces: int) -> Ints:
    """Equal sizes to within one that add up to `samples`."""
    return np.diff(np.arange(pieces + 1) * samples // pieces).astype(np.int64)


def _cut(counts: Ints, shares: Floats) -> Ints:
    """Whole numbers (rows, clients) that add up to each row's count, by cutting it at the cumulative shares."""
    cuts = np.floor(np.cumsum(shares, axis=1) * counts[:, None] + 1e-6).astype(np.int64)
    cuts[:, -1] = counts
    return np.diff(np.minimum(cuts, counts[:, None]), axis=1, prepend=0)


def _by_rank(order: npt.NDArray[np.int64], sizes: Ints) -> Owners:
    owners = np.empty(len(order), dtype=np.int64)
    owners[order] = np.repeat(np.arange(len(sizes)), sizes)
    return owners


def _by_class(labels: Ints, amounts: Ints, draw: np.random.Generator) -> Owners:
    """Owners where client k gets amounts[label, k] random samples of each label."""
    mixed = draw.permutation(len(labels))
    ordered = mixed[np.argsort(labels[mixed], kind="stable")]
    owners = np.empty(len(labels), dtype=np.int64)
    owners[ordered] = np.repeat(np.tile(np.arange(amounts.shape[1]), amounts.shape[0]), amounts.ravel())
    return owners


def _into_parts(
    index: npt.NDArray[np.intp], parts: tuple[float, ...], draw: np.random.Generator, labels: Ints
) -> ClientIndices:
    """Stratified parts of one client's samples, which come sorted by label.

    Systematic sampling: along the samples in label order (shuffled within a label), a part of fraction f takes one
    every 1/f, so that each label is represented to within one and the totals are exact; no part is left empty.
    """
    n = len(index)
    mixed = index[draw.permutation(n)]
    ordered = mixed[np.argsort(labels[mixed], kind="stable")]
    test = max(1, round(parts[2] * n))
    validation = max(1, round(parts[1] * n))
    # A small train fraction of a small client can round to nothing: the larger held-out part gives a sample back.
    while test + validation >= n:
        test, validation = (test - 1, validation) if test > validation else (test, validation - 1)
    in_test = _every(test, n, int(draw.integers(n)))
    rest = ordered[~in_test]
    in_validation = _every(validation, len(rest), int(draw.integers(len(rest))))
    return ClientIndices(
        *(np.sort(part).astype(np.int64) for part in (rest[~in_validation], rest[in_validation], ordered[in_test]))
    )


def _every(take: int, n: int, start: int) -> npt.NDArray[np.bool_]:
    """Mark exactly `take` of n positions, evenly spaced, from a start in 0..n-1; in whole numbers, so it is exact."""
    steps: Ints = (np.arange(n + 1, dtype=np.int64) * take + start) // n
    return np.diff(steps) > 0
