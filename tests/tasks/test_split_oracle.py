"""Splits held against the partitioners of flwr-datasets: the same sizes and labels where both are exact, the same
distribution over many seeds where both draw.

Distributions are compared by Kolmogorov-Smirnov's two-sample test on a statistic of whole splits. The seeds are fixed,
so that a test passes always or never; each p-value must be above 1e-3.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from datasets import Dataset, disable_progress_bars
from flwr_datasets import partitioner as flower
from scipy import stats

from meadow.config.schema import Partition
from meadow.tasks.splits.partition import Split, label_counts, make_split
from meadow.tasks.splits.partitioners import PARTITIONERS

Ints = npt.NDArray[np.int64]
Statistic = Callable[[Ints], float]
LABELS = np.random.Generator(np.random.Philox(5)).permutation(np.arange(600, dtype=np.int64) % 10)
disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:flwr_datasets")


def settings(law: str, **other: Any) -> Partition:
    return Partition.model_validate({"law": law, "clients": 10, "min_size": 3, **other})


def theirs(partitioner: flower.Partitioner, labels: Ints, owner: Ints | None = None) -> list[Ints]:
    """Each partition's sample indices, sorted."""
    columns = {"index": np.arange(len(labels)), "label": labels}
    partitioner.dataset = Dataset.from_dict(columns if owner is None else columns | {"owner": owner})
    parts = (partitioner.load_partition(number) for number in range(partitioner.num_partitions))
    return [np.sort(np.array(part["index"], dtype=np.int64)) for part in parts]


def ours(split: Split) -> list[Ints]:
    return [np.sort(np.concatenate([c.train, c.validation, c.test])) for c in split.clients]


def counts(partitions: list[Ints], labels: Ints) -> Ints:
    return np.stack([np.bincount(labels[index], minlength=int(labels.max()) + 1) for index in partitions])


def unevenness(table: Ints) -> float:
    return float((table**2).sum())


def smallest(table: Ints) -> float:
    return float(table.sum(axis=1).min())


def labels_held(table: Ints) -> float:
    return float((table > 0).sum())


def same_distribution(mine: list[Ints], other: list[Ints], statistics: list[Statistic]) -> None:
    for statistic in statistics:
        a, b = ([statistic(table) for table in tables] for tables in (mine, other))
        assert stats.ks_2samp(a, b).pvalue > 1e-3, statistic.__name__


@pytest.mark.parametrize("clients", [1, 7, 10, 13])
def test_iid_has_the_sizes_of_iid_partitioner(clients: int) -> None:
    mine = ours(make_split(settings("iid", clients=clients), LABELS, 0))
    other = theirs(flower.IidPartitioner(clients), LABELS)
    assert sorted(map(len, mine)) == sorted(map(len, other))


def test_natural_is_natural_id_partitioner() -> None:
    owner = np.random.Generator(np.random.Philox(1)).integers(0, 9, 600)
    mine = ours(make_split(settings("natural", clients=0), LABELS, 0, owner))
    other = theirs(flower.NaturalIdPartitioner("owner"), LABELS, owner)
    assert len(mine) == len(other) == 9 and all(map(np.array_equal, mine, other))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("clients", [4, 10])
def test_dirichlet_class_with_the_same_draws_is_dirichlet_partitioner_to_within_one_sample(
    clients: int, alpha: float
) -> None:
    """Their generator seeded as ours draws the same p for the first label; then our draw of where to cut intervenes,
    so one label is compared, for 40 seeds."""
    labels = np.zeros(500, dtype=np.int64)
    for seed in range(40):
        partitioner = flower.DirichletPartitioner(clients, "label", alpha, min_partition_size=0, seed=seed)
        other = np.array([len(part) for part in theirs(partitioner, labels)])
        partition = settings("dirichlet-class", clients=clients, alpha=alpha)
        runs = PARTITIONERS["dirichlet-class"](partition, np.array([500]), np.random.default_rng(seed))
        mine = np.bincount(runs.owner, runs.amount, clients)
        assert np.abs(mine - other).max() <= 1


@pytest.mark.parametrize("balanced", [False, True])
def test_dirichlet_over_clients_has_the_distribution_of_dirichlet_partitioner(balanced: bool) -> None:
    """7 clients of 600 samples: no client can have exactly its even share, on which the two balanced laws differ."""
    law = "dirichlet-balanced" if balanced else "dirichlet-class"
    partition = settings(law, clients=7, alpha=0.7, min_size=10)
    mine, other = [], []
    for seed in range(300):
        mine.append(label_counts(make_split(partition, LABELS, seed), LABELS))
        partitioner = flower.DirichletPartitioner(7, "label", 0.7, 10, balanced, seed=seed)
        other.append(counts(theirs(partitioner, LABELS), LABELS))
    last = [lambda table: float(table[:, -1].max()), lambda table: float(table[-1].sum())]
    same_distribution(mine, other, [unevenness, smallest, *last])


def test_hsu_first_client_has_the_distribution_of_inner_dirichlet_partitioner() -> None:
    """A client that draws before a label has run out takes its labels by the Dirichlet-multinomial law, in both."""
    shares, alpha, size = np.array([0.1, 0.2, 0.3, 0.4]), 2.0, 30
    labels = np.repeat(np.arange(4), (600 * shares).astype(int))
    mine, other = [], []
    for seed in range(400):
        runs = PARTITIONERS["dirichlet"](
            settings("dirichlet", clients=20, alpha=alpha), np.bincount(labels), np.random.default_rng(seed)
        )
        first = np.random.default_rng(seed).permutation(20)[0]
        label = labels[np.repeat(runs.owner, runs.amount) == first]
        mine.append(np.bincount(label, minlength=4)[None])
        inner = flower.InnerDirichletPartitioner([size], "label", (alpha * shares).tolist(), seed=seed)
        other.append(counts(theirs(inner, labels), labels))

    def of(label: int) -> Statistic:
        return lambda table: float(table[0, label])

    each = [of(label) for label in range(4)]
    same_distribution(mine, other, [unevenness, labels_held, *each])


def test_shards_have_the_sizes_and_the_distribution_of_shard_partitioner() -> None:
    """With 4 shards of a label, 2 a client: sizes are equal, and clients of one label as frequent in both."""
    partition = settings("shards", clients=20, shards=2, min_size=30)
    mine, other = [], []
    for seed in range(300):
        mine.append(label_counts(make_split(partition, LABELS, seed), LABELS))
        partitioner = flower.ShardPartitioner(20, "label", num_shards_per_partition=2, shard_size=15, seed=seed)
        partitioner.dataset = Dataset.from_dict({"label": np.sort(LABELS)})
        sizes = [np.array(partitioner.load_partition(number)["label"]) for number in range(20)]
        other.append(np.stack([np.bincount(part, minlength=10) for part in sizes]))
    assert all((table.sum(axis=1) == 30).all() and (table % 15 == 0).all() for table in (*mine, *other))
    same_distribution(mine, other, [unevenness, labels_held])


@pytest.mark.parametrize(("clients", "labels"), [(10, 2), (20, 3), (30, 1), (10, 10)])
def test_labels_law_has_the_sizes_of_pathological_partitioner(clients: int, labels: int) -> None:
    """Where the number of clients is a multiple of the labels', "deterministic" gives each label as many holders as
    ours does by lot; then each holder's share of a label is the same, sample for sample, in number."""
    partitioner = flower.PathologicalPartitioner(clients, "label", labels, "deterministic")
    other = counts(theirs(partitioner, LABELS), LABELS)
    for seed in range(10):
        mine = label_counts(make_split(settings("labels", clients=clients, labels=labels), LABELS, seed), LABELS)
        assert ((mine > 0).sum(axis=1) == labels).all()
        assert np.array_equal(np.sort(mine, axis=0), np.sort(other, axis=0))
