"""Splits: divides the training samples among clients (`partitioners`, or natural clients), and each client's samples
into train, validation and test.

No sample has two clients. All laws but `natural` use every sample; a draw that gives a client fewer than `min_size`
samples is repeated, which changes the law, so the number of tries is recorded. All data structures are flat arrays over
all clients, so that time and memory grow with the samples and not with the clients.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from meadow.config.schema import Partition
from meadow.runtime.errors import UserError
from meadow.runtime.limits import check_fits
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.data import MISSING, Target
from meadow.tasks.splits.partitioners import PARTITIONERS, Ints, Runs

_TRIES = 200
_BINS = 10
_PARTS = 3
_BY_ALPHA = ("dirichlet", "dirichlet-class", "dirichlet-balanced", "quantity")


@dataclass(frozen=True, eq=False)
class ClientIndices:
    """One client's sample indices into the training pool, each part sorted, int64."""

    train: Ints
    validation: Ints
    test: Ints


@dataclass(frozen=True)
class LeftOut:
    """The numbers of natural clients with fewer than `min_size` samples, and of their samples."""

    clients: int
    samples: int


@dataclass(frozen=True, eq=False)
class Split:
    """A split, with its law and the number of tries.

    order: sample indices grouped by client and part, each part sorted, int64 (samples,). bounds: the parts' bounds
    in it, int64 (3 * clients + 1,). sha256: over, for each client in order, its number in UTF-8 and the little-endian
    int64 bytes of its sorted training, validation and test indices. natural: for law = natural, each client's number
    among all natural clients, int64 (clients,).
    """

    law: str
    tries: int
    order: Ints
    bounds: Ints
    sha256: str
    left_out: LeftOut = LeftOut(0, 0)
    natural: Ints | None = None

    @property
    def clients(self) -> "Clients":
        """The clients' parts, in client order."""
        return Clients(self.order, self.bounds)

    @property
    def sizes(self) -> Ints:
        """Train, validation and test samples of each client, int64 (clients, 3)."""
        return np.diff(self.bounds).reshape(-1, _PARTS)


@dataclass(frozen=True, eq=False)
class Clients:
    """Each client's parts as views of the split's arrays."""

    order: Ints
    bounds: Ints

    def __len__(self) -> int:
        return len(self.bounds) // _PARTS

    def __getitem__(self, client: int) -> ClientIndices:
        client = range(len(self))[client]  # raises IndexError beyond the last
        bounds = self.bounds[_PARTS * client : _PARTS * (client + 1) + 1]
        return ClientIndices(*(self.order[a:b] for a, b in itertools.pairwise(bounds)))

    def __iter__(self) -> Iterator[ClientIndices]:
        return map(self.__getitem__, range(len(self)))


def strata(y: Tensor, target: Target) -> Ints:
    """The labels for partitioning and stratification, int64 (n,).

    A class target: the class (of the last token). Labels: the first label of the sample. A value: its decile. Samples
    whose target is missing have a label of their own, after all others.
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
    """Each client's samples (all parts) by label, int64 (clients, labels)."""
    classes, clients = int(labels.max()) + 1, len(split.clients)
    cell = np.repeat(np.arange(clients) * classes, split.sizes.sum(axis=1)) + labels[split.order]
    return np.bincount(cell, minlength=clients * classes).reshape(clients, classes)


def make_split(
    partition: Partition, labels: Ints, seed: int, owner: Ints | None = None, folds: int = 0, fold: int = 0
) -> Split:
    """Divide samples with these labels (int64 (n,), from 0) among clients by `partition.law`.

    `owner`: for law = natural, the client of each sample (int64 (n,), from 0). `folds` with `fold` = 1..folds: that
    stratified fold is each client's test part, and the validation part keeps its share of the rest; the clients' samples
    are the same in all folds.

    Raises UserError if the split is impossible, or not found within 200 tries.
    """
    counts = np.bincount(labels)
    check_fits(
        f"partition.clients = {partition.clients} with {len(counts)} labels", 8 * partition.clients * len(counts)
    )
    shuffled = numpy_generator(seed, "samples").permutation(len(labels))
    small = labels.astype(np.min_scalar_type(len(counts)))  # small integers are sorted by radix, in linear time
    by_label = shuffled[np.argsort(small[shuffled], kind="stable")]
    tries, left_out, natural = 1, LeftOut(0, 0), None
    if partition.law == "natural":
        owners, left_out, natural = _natural(partition, owner, seed)
        by_label = by_label[owners[by_label] >= 0]
    else:
        runs, tries = _draw(partition, counts[counts > 0], seed)  # a law sees no empty labels
        owners = np.empty(len(labels), dtype=np.int64)
        owners[by_label if runs.by_label else shuffled] = np.repeat(runs.owner, runs.amount)
    del shuffled
    along = owners[by_label]
    place, _ = _grouped(along, np.arange(len(along)))
    by_client, sizes = by_label[place], np.bincount(along)
    parts = _fold(sizes, partition, seed, folds, fold) if fold else _parts(sizes, partition, seed)
    order, bounds = _grouped(np.repeat(np.arange(len(sizes)) * _PARTS, sizes) + parts, by_client)
    return Split(partition.law, tries, order, bounds, _sha256(order, bounds), left_out, natural)


def _draw(partition: Partition, counts: Ints, seed: int) -> tuple[Runs, int]:
    """The first draw that gives each client enough samples, and the number of draws."""
    _check_possible(partition, int(counts.sum()), len(counts))
    for attempt in range(1, _TRIES + 1):
        runs = PARTITIONERS[partition.law](partition, counts, numpy_generator(seed, "partition", attempt))
        if np.bincount(runs.owner, runs.amount, partition.clients).min() >= partition.min_size:
            return runs, attempt
    alpha = f" with alpha = {partition.alpha}" if partition.law in _BY_ALPHA else ""
    raise UserError(
        f'partition.min_size = {partition.min_size}: none of {_TRIES} draws of law "{partition.law}"{alpha} gave each of '
        f"{partition.clients} clients so many of {int(counts.sum())} samples: "
        f"{'raise partition.alpha, or ' if alpha else ''}lower partition.min_size or partition.clients"
    )


def _natural(partition: Partition, owner: Ints | None, seed: int) -> tuple[Ints, LeftOut, Ints]:
    """Each sample's client (-1: none), who is left out, and the clients' numbers in the data."""
    if owner is None:
        raise UserError(
            'partition.law = "natural": the data does not say whose each sample is; name the column that does as '
            "task.client, or choose another law"
        )
    sizes = np.bincount(owner)
    there = np.flatnonzero(sizes)
    enough = there[sizes[there] >= partition.min_size]
    if len(enough) < max(partition.clients, 1):
        raise UserError(
            f"partition.clients = {partition.clients}: {len(enough)} of the data's {len(there)} clients have "
            f"partition.min_size = {partition.min_size} samples or more; lower partition.min_size"
            + (f", or write at most {len(enough)} (0 takes all)" if len(enough) else "")
        )
    chosen = enough
    if partition.clients:
        draw = numpy_generator(seed, "partition", "natural")
        chosen = np.sort(draw.choice(enough, partition.clients, replace=False))
    number = np.full(len(sizes), -1, dtype=np.int64)
    number[chosen] = np.arange(len(chosen))
    few = LeftOut(len(there) - len(enough), len(owner) - int(sizes[enough].sum()))
    return number[owner], few, chosen


def _check_possible(partition: Partition, samples: int, labels: int) -> None:
    if partition.clients * partition.min_size > samples:
        raise UserError(
            f"partition.clients = {partition.clients}: {samples} samples cannot give each client partition.min_size = "
            f"{partition.min_size}; at most {samples // partition.min_size} clients are possible"
        )
    if partition.law == "shards" and partition.clients * partition.shards > samples:
        raise UserError(f"partition.shards = {partition.shards}: more shards than the {samples} samples; lower it")
    if partition.law == "labels" and partition.labels > labels:
        raise UserError(f"partition.labels = {partition.labels}: {labels} labels occur in the data; write at most that")
    if partition.law == "labels" and partition.labels * partition.clients < labels:
        raise UserError(
            f"partition.labels = {partition.labels}: {partition.clients} clients with so many labels each cannot cover "
            f"all {labels} labels; write at least {-(-labels // partition.clients)}"
        )


def _parts(sizes: Ints, partition: Partition, seed: int) -> Ints:
    """The part of each sample, in the order of clients and labels: 0 train, 1 validation, 2 test; int64 (n,).

    Systematic sampling: of a client's samples in label order (shuffled within a label), a part of fraction f takes every
    1/f-th, so that each label is represented to within one and totals are exact. No part is empty.
    """
    test = np.maximum(1, np.rint(partition.parts[2] * sizes)).astype(np.int64)
    validation = np.maximum(1, np.rint(partition.parts[1] * sizes)).astype(np.int64)
    # A small train fraction of a small client can round to 0: then the larger held-out part returns a sample.
    while (over := test + validation >= sizes).any():
        of_test = test > validation
        test -= over & of_test
        validation -= over & ~of_test
    draw = numpy_generator(seed, "parts")
    in_test = _systematic(test, sizes, draw.integers(sizes))
    return _with_validation(in_test, validation, sizes - test, draw)


def _fold(sizes: Ints, partition: Partition, seed: int, folds: int, fold: int) -> Ints:
    """As `_parts`, with the `fold`-th of `folds` as the test part: every `folds`-th of a client's samples in label
    order, so that folds are disjoint and complete, and agree to within one in size and in the count of each label."""
    least = folds if folds > 2 else 4  # leaves two samples for training and validation
    if sizes.min() < least:
        raise UserError(
            f"evaluate.folds = {folds}: the smallest client has {sizes.min()} samples, but so many folds need {least}; "
            f"write partition.min_size = {least} or more, or fewer folds"
        )
    draw = numpy_generator(seed, "folds")
    first = draw.integers(folds, size=len(sizes))
    in_test = (_rank(sizes) + np.repeat(first, sizes)) % folds == fold - 1
    left = sizes - np.add.reduceat(in_test, np.cumsum(sizes) - sizes, dtype=np.int64)
    share = partition.parts[1] / (partition.parts[0] + partition.parts[1])
    validation = np.clip(np.rint(share * left).astype(np.int64), 1, left - 1)
    return _with_validation(in_test, validation, left, draw)


def _with_validation(in_test: npt.NDArray[np.bool_], validation: Ints, left: Ints, draw: np.random.Generator) -> Ints:
    parts = np.where(in_test, 2, 0)
    parts[~in_test] = _systematic(validation, left, draw.integers(left))
    return parts


def _systematic(take: Ints, sizes: Ints, start: Ints) -> npt.NDArray[np.bool_]:
    """Mark exactly take[k] of each group's sizes[k] positions, evenly spaced, from a start[k] in 0..sizes[k]-1.

    Position i is marked if a multiple of n lies in (i take + start, (i + 1) take + start]; integers make this exact.
    """
    place = _rank(sizes)
    place *= np.repeat(take, sizes)
    place += np.repeat(start, sizes)
    place %= np.repeat(sizes, sizes)
    return np.asarray(place >= np.repeat(sizes - take, sizes))


def _rank(sizes: Ints) -> Ints:
    """0..sizes[0]-1, 0..sizes[1]-1, ..."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _grouped(group: Ints, values: Ints) -> tuple[Ints, Ints]:
    """Sort integers by their group 0, 1, ... (none empty) and within each; also return the groups' bounds."""
    most = int(values.max()) + 1
    keys = group * most + values
    keys.sort()  # sorting is many times faster than argsort
    keys %= most
    return keys, np.concatenate([[0], np.cumsum(np.bincount(group))])


def _sha256(order: Ints, bounds: Ints) -> str:
    digest = hashlib.sha256()
    data = order.astype("<i8", copy=False)
    for client, (a, b) in enumerate(itertools.pairwise(bounds[::_PARTS])):
        digest.update(str(client).encode())
        digest.update(data[a:b].data)
    return digest.hexdigest()
