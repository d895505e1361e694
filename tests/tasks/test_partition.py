"""Splits: every law is complete and disjoint, repeatable to the bit, and has the moments of the law that it names."""

import functools
import hashlib
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from helpers.refusals import refused
from meadow.config.schema import Partition
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import numpy_generator
from meadow.tasks.data import Target
from meadow.tasks.splits import partitioners
from meadow.tasks.splits.partition import LeftOut, Split, label_counts, make_split, strata

Ints = npt.NDArray[np.int64]

LABELS = np.random.Generator(np.random.Philox(5)).permutation(np.arange(600, dtype=np.int64) % 10)
SHA256 = {
    "iid": "71a8d1467f647650f86347cf25f49e631471c17174feb59bd7c170c7955b0ca2",
    "dirichlet": "357a43a2eeb93beb2b530db9d49131a0d6ca08f1edbc5e8f171b09ed9ae4db16",
    "dirichlet-class": "2ab3d39c66d4caf7594e9bb043cfa560f6a35aef2feefd4cd06579a2c67cc089",
    "dirichlet-balanced": "6ede31478402c87d4277a7952ddf657122e20dc98f724657460d0876d4997efa",
    "shards": "fa957f18e41eef8f4afabb4f96d7e2e3410c333fec6ba4291175694d3d4e67c1",
    "labels": "5f00216eb0b40b151be65367ca89ea660576266733ffbc63060d8b9a23bdc355",
    "quantity": "d7bcc973120f1df13bf5c463b6dfde8d58bd9890b103d27e8e57d4b2f2e762d8",
    "feature-shift": "71a8d1467f647650f86347cf25f49e631471c17174feb59bd7c170c7955b0ca2",
}


def settings(law: str, **other: Any) -> Partition:
    return Partition.model_validate({"law": law, "clients": 10, "min_size": 5, "alpha": 2.0, **other})


def own(split: Split) -> list[Ints]:
    return [np.concatenate([c.train, c.validation, c.test]) for c in split.clients]


def amounts(law: str, counts: list[int], number: int, **other: Any) -> Ints:
    """One draw of a law along the labels, without rejection for size: samples of each client, int64 (clients, labels)."""
    partition = settings(law, **other)
    runs = partitioners.PARTITIONERS[law](partition, np.array(counts), numpy_generator(number, "test"))
    assert runs.by_label
    table = np.zeros((partition.clients, len(counts)), dtype=np.int64)
    np.add.at(table, (np.repeat(runs.owner, runs.amount), np.repeat(np.arange(len(counts)), counts)), 1)
    return table


@pytest.mark.parametrize("law", list(partitioners.PARTITIONERS))
def test_every_sample_has_one_owner_and_one_part(law: str) -> None:
    split = make_split(settings(law), LABELS, 0)
    assert len(split.clients) == 10 and split.law == law and split.tries >= 1
    assert np.array_equal(np.sort(np.concatenate(own(split))), np.arange(600))
    for client in split.clients:
        for part in (client.train, client.validation, client.test):
            assert part.dtype == np.int64 and len(part) >= 1 and np.all(np.diff(part) > 0)
    assert min(map(len, own(split))) >= 5
    assert np.array_equal(label_counts(split, LABELS).sum(0), np.full(10, 60))


@pytest.mark.parametrize("law", list(partitioners.PARTITIONERS))
def test_the_seed_decides_the_split_and_its_hash_is_the_same_on_every_machine(law: str) -> None:
    first, again, other = (make_split(settings(law), LABELS, seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.sha256 == SHA256[law]
    digest = hashlib.sha256()
    for number, client in enumerate(first.clients):
        digest.update(str(number).encode())
        for part in (client.train, client.validation, client.test):
            digest.update(b"".join(int(i).to_bytes(8, "little", signed=True) for i in part))
    assert digest.hexdigest() == first.sha256


def test_iid_and_dirichlet_deal_equal_sizes() -> None:
    for law in ("iid", "dirichlet"):
        sizes = [len(samples) for samples in own(make_split(settings(law, clients=7, alpha=0.1), LABELS, 3))]
        assert max(sizes) - min(sizes) <= 1


def test_dirichlet_class_has_the_moments_of_the_dirichlet() -> None:
    """A client's share of a label is Beta(a, (N-1)a): mean 1/N, variance (1/N)(1-1/N)/(Na+1).

    1,600 independent shares; the bounds are five standard errors: of the mean sqrt(var/1600), of the variance
    var * sqrt((kurtosis - 1)/1600), where the kurtosis of Beta(2, 8) is 3.5. Cutting to whole samples moves a share by
    less than 1/1000.
    """
    shares = np.stack([amounts("dirichlet-class", [1000] * 4, n, clients=5)[0] / 1000 for n in range(400)])
    variance = 0.2 * 0.8 / 11
    assert abs(shares.mean() - 0.2) < 5 * np.sqrt(variance / 1600) + 1e-3
    assert abs(shares.var() / variance - 1) < 5 * np.sqrt(2.5 / 1600)


def test_dirichlet_class_leaves_nobody_out_where_labels_are_rarer_than_clients() -> None:
    """60 samples of each label over 100 clients with even shares: each client gets one of a label with probability 0.6.

    Over 500 labels its number is binomial in mean and less in variance: five standard deviations.
    """
    sizes = amounts("dirichlet-class", [60] * 500, 0, clients=100, alpha=1e7).sum(axis=1)
    assert np.all(np.abs(sizes - 300) < 5 * np.sqrt(500 * 0.6 * 0.4))


def test_hsu_label_mix_has_the_moments_of_the_dirichlet_multinomial() -> None:
    """The first client to draw, before any label runs out, takes m samples by p ~ Dir(alpha * prior).

    Its share of label k has mean prior_k and variance prior_k (1 - prior_k)/m * (m + alpha)/(1 + alpha). Bounds: five
    standard errors of 1,000 draws; the kurtosis of none of these Beta laws is above 12.
    """
    prior, m, alpha = np.array([0.1, 0.2, 0.3, 0.4]), 50, 2.0
    shares = []
    for number in range(1000):
        first = numpy_generator(number, "test").permutation(20)[0]  # the law's own first draw: the clients' order
        shares.append(amounts("dirichlet", [100, 200, 300, 400], number, clients=20, alpha=alpha)[first] / m)
    variance = prior * (1 - prior) / m * (m + alpha) / (1 + alpha)
    assert np.all(np.abs(np.mean(shares, axis=0) - prior) < 5 * np.sqrt(variance / 1000))
    assert np.all(np.abs(np.var(shares, axis=0) / variance - 1) < 5 * np.sqrt(11 / 1000))


def test_hsu_at_the_ends_of_alpha() -> None:
    labels = np.arange(10_000) % 10
    even = make_split(settings("dirichlet", alpha=1e7, clients=10), labels, 0)
    # alpha -> infinity: 1,000 independent draws at p = 1/10 have a standard deviation of 9.5; the last client gets what
    # nine such clients leave, so three times that. The bound is five of those.
    assert np.abs(label_counts(even, labels) - 100).max() < 5 * 28.5
    single = make_split(settings("dirichlet", alpha=1e-3, clients=10), labels, 0)
    # alpha -> 0: the first client to draw finds one label, of which there are just enough.
    assert label_counts(single, labels).max() == 1000


def test_quantity_sizes_have_the_moments_of_the_dirichlet() -> None:
    """As for dirichlet-class, with 800 draws of the sizes' share of client 0: Beta(2, 8)."""
    partition, law = settings("quantity", clients=5), partitioners.PARTITIONERS["quantity"]
    draws = [law(partition, np.array([1000]), numpy_generator(number, "test")) for number in range(800)]
    shares = np.array([runs.amount[runs.owner == 0].sum() / 1000 for runs in draws])
    variance = 0.2 * 0.8 / 11
    assert abs(shares.mean() - 0.2) < 5 * np.sqrt(variance / 800) + 1e-3
    assert abs(shares.var() / variance - 1) < 5 * np.sqrt(2.5 / 800)


def test_dirichlet_balanced_gives_nothing_to_who_has_an_even_share() -> None:
    """Sixty samples are an even share. With alpha = 0.05 most Dirichlet shares round to nothing."""
    for number in range(40):
        counts = amounts("dirichlet-balanced", [60] * 10, number, alpha=0.5 if number % 2 else 0.05)
        before = np.cumsum(counts, axis=1) - counts
        assert not np.any((before >= 60) & (counts > 0)) and counts.sum() == 600


def test_shards_of_one_label_give_two_labels_and_equal_sizes() -> None:
    """600 samples in 20 shards of 30, and 60 of each label: every shard has one label."""
    counts = label_counts(make_split(settings("shards"), LABELS, 0), LABELS)
    assert np.all(counts.sum(1) == 60) and np.all(counts % 30 == 0) and np.all((counts > 0).sum(1) <= 2)


@pytest.mark.parametrize(("clients", "labels"), [(10, 2), (4, 3), (17, 3), (10, 10)])
def test_labels_law_holds_k_labels_each_all_labels_and_deals_evenly(clients: int, labels: int) -> None:
    counts = label_counts(make_split(settings("labels", clients=clients, labels=labels), LABELS, 0), LABELS)
    assert np.all((counts > 0).sum(1) == labels)
    for of_label in counts.T:
        held = of_label[of_label > 0]
        assert held.sum() == 60 and held.max() - held.min() <= 1


def test_parts_have_exact_sizes_and_keep_the_labels_shares() -> None:
    """Systematic sampling: test within 1 of its share of each label; validation, drawn from what is left, within 2."""
    split = make_split(settings("dirichlet-class"), LABELS, 0)
    for client in split.clients:
        n = len(client.train) + len(client.validation) + len(client.test)
        assert len(client.test) == len(client.validation) == max(1, round(0.2 * n))
        whole = np.bincount(LABELS[np.concatenate([client.train, client.validation, client.test])], minlength=10)
        for part, bound in ((client.test, 1), (client.validation, 2), (client.train, 2)):
            assert np.all(np.abs(np.bincount(LABELS[part], minlength=10) - whole * (len(part) / n)) < bound + 1e-9)


@pytest.mark.parametrize("parts", [(0.6, 0.2, 0.2), (0.01, 0.5, 0.49), (0.05, 0.475, 0.475), (0.98, 0.01, 0.01)])
@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_no_part_is_ever_empty(parts: tuple[float, ...], n: int) -> None:
    split = make_split(settings("iid", clients=1, min_size=3, parts=parts), np.arange(n) % 2, 0)
    client = split.clients[0]
    assert min(len(client.train), len(client.validation), len(client.test)) >= 1
    assert np.array_equal(np.sort(own(split)[0]), np.arange(n))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"law": "iid", "clients": 601, "min_size": 3}, "partition.clients = 601"),
        ({"law": "dirichlet", "clients": 100, "min_size": 7}, "partition.min_size = 7"),
        ({"law": "labels", "labels": 11}, "partition.labels = 11"),
        ({"law": "labels", "labels": 2, "clients": 4}, "at least 3"),
        ({"law": "shards", "shards": 61}, "partition.shards = 61"),
        ({"law": "dirichlet-class", "alpha": 0.001}, "partition.min_size = 5"),
    ],
)
def test_an_impossible_split_names_the_setting(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_split(settings(**wrong), LABELS, 0)


def test_rejected_draws_are_counted_and_drawn_anew() -> None:
    split = make_split(settings("quantity", alpha=0.7, min_size=5), LABELS, 0)
    assert split.tries > 1 and min(map(len, own(split))) >= 5


def test_values_are_dealt_by_their_deciles() -> None:
    values = np.random.Generator(np.random.Philox(1)).permutation(np.linspace(-1, 1, 1000)).astype(np.float32)
    deciles = strata(torch.from_numpy(values), Target("slant", "value", 1))
    assert np.array_equal(np.bincount(deciles), np.full(10, 100))
    assert all(values[deciles == d].max() < values[deciles == d + 1].min() for d in range(9))


def test_iid_label_counts_are_hypergeometric() -> None:
    """60 of 600 samples to client 0, 60 of them of label 0: mean 6, variance 60 * 0.1 * 0.9 * 540/599. Five standard
    errors of 600 seeds; the kurtosis is below 3."""
    found = np.array([label_counts(make_split(settings("iid"), LABELS, seed), LABELS)[0, 0] for seed in range(600)])
    variance = 60 * 0.1 * 0.9 * 540 / 599
    assert abs(found.mean() - 6) < 5 * np.sqrt(variance / 600)
    assert abs(found.var() / variance - 1) < 5 * np.sqrt(2 / 600)


def test_two_shards_of_a_client_have_one_label_as_often_as_by_chance() -> None:
    """20 shards, 2 of each label: the second shard of client 0 is the one in 19 that has the first one's label."""
    hits = sum(amounts("shards", [60] * 10, number)[0].max() == 60 for number in range(2000))
    assert abs(hits / 2000 - 1 / 19) < 5 * np.sqrt(1 / 19 * 18 / 19 / 2000)


def one_after_another(counts: list[int], clients: int, alpha: float, draw: np.random.Generator) -> Ints:
    """Hsu's law as it is told: clients in a random order draw a mix, then samples, again for what has run out."""
    stock, prior = np.array(counts), np.array(counts) / sum(counts)
    table = np.zeros((clients, len(counts)), dtype=np.int64)
    for client in draw.permutation(clients):
        mix = draw.dirichlet(alpha * prior)
        for _ in range(sum(counts) // clients):
            left = np.where(stock > 0, mix, 0)
            label = draw.choice(len(counts), p=left / left.sum() if left.sum() > 0 else stock / stock.sum())
            table[client, label] += 1
            stock[label] -= 1
    return table


@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_hsu_in_blocks_is_the_law_of_one_client_after_another(alpha: float) -> None:
    """Kolmogorov-Smirnov on two statistics of 250 splits each, after many labels have run out: the evenness of all
    clients' labels, and the number of labels of the client that has most. 1e-3 would be a chance of one in 500."""
    counts = [40, 40, 20, 10, 10]
    plain = [one_after_another(counts, 12, alpha, numpy_generator(n, "plain")) for n in range(250)]
    block = [amounts("dirichlet", counts, n, clients=12, alpha=alpha) for n in range(250)]
    statistics: tuple[Callable[[Ints], Any], ...] = (
        lambda t: (t**2).sum(),
        lambda t: (t > 0).sum(),
        lambda t: (t[:, 3] ** 2).sum(),
    )
    for statistic in statistics:
        a, b = ([float(statistic(table)) for table in tables] for tables in (plain, block))
        assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_hsu_client_that_uses_up_a_label_had_drawn_it() -> None:
    """One sample of label 0, three of label 1, two clients, even mixes: the first to draw takes two by (1/4, 3/4), so
    it gets the only sample of label 0 with probability 1 - (3/4)^2. Five standard errors of 2,000 draws."""
    got = 0
    for number in range(2000):
        first = numpy_generator(number, "test").permutation(2)[0]
        got += amounts("dirichlet", [1, 3], number, clients=2, alpha=1e6)[first, 0]
    assert abs(got / 2000 - 7 / 16) < 5 * np.sqrt(7 / 16 * 9 / 16 / 2000)


@pytest.mark.parametrize("law", list(partitioners.PARTITIONERS))
def test_labels_that_occur_nowhere_change_nothing(law: str) -> None:
    few = LABELS % 3
    assert make_split(settings(law), np.array([2, 7, 900])[few], 0).sha256 == make_split(settings(law), few, 0).sha256


def test_labels_law_counts_the_labels_that_occur() -> None:
    with refused("partition.labels = 4", 3):
        make_split(settings("labels", labels=4), np.array([2, 7, 900])[LABELS % 3], 0)


def test_feature_shift_deals_as_iid() -> None:
    assert make_split(settings("feature-shift"), LABELS, 0).sha256 == make_split(settings("iid"), LABELS, 0).sha256


def test_clients_are_a_sequence_of_views() -> None:
    split = make_split(settings("quantity"), LABELS, 0)
    assert np.shares_memory(split.clients[3].train, split.order)
    assert [len(split.clients[c].test) for c in (2, 3, 4)] == split.sizes[2:5, 2].tolist()
    assert np.array_equal(split.clients[-1].validation, list(split.clients)[9].validation)
    with pytest.raises(IndexError):
        split.clients[10]


OWNER = np.repeat(np.arange(8), [4, 100, 0, 96, 5, 95, 200, 100])[numpy_generator(0, "owner").permutation(600)]


def test_natural_keeps_the_datas_own_clients_and_leaves_small_ones_out() -> None:
    split = make_split(settings("natural", clients=0), LABELS, 0, OWNER)
    assert split.natural is not None and split.natural.tolist() == [1, 3, 4, 5, 6, 7]
    assert (split.left_out, split.tries) == (LeftOut(1, 4), 1)
    for number, samples in zip(split.natural, own(split), strict=True):
        assert np.array_equal(np.sort(samples), np.flatnonzero(number == OWNER))
    larger = make_split(settings("natural", clients=0, min_size=96), LABELS, 0, OWNER)
    assert larger.natural is not None and larger.natural.tolist() == [1, 3, 6, 7]
    assert larger.left_out == LeftOut(3, 104)


def test_natural_draws_n_clients_each_as_likely_as_another() -> None:
    """Three of six, by 600 seeds: each is in with probability 1/2. Five standard errors."""
    drawn = [make_split(settings("natural", clients=3), LABELS, seed, OWNER).natural for seed in range(600)]
    counts = np.bincount(np.concatenate([d for d in drawn if d is not None]), minlength=8)
    assert counts.sum() == 1800 and all(np.all(np.diff(d) > 0) for d in drawn if d is not None)
    assert np.all(np.abs(counts[[1, 3, 4, 5, 6, 7]] - 300) < 5 * np.sqrt(600 / 4))


@pytest.mark.parametrize(
    ("wrong", "owner", "named"),
    [
        ({"clients": 0}, None, "task.client"),
        ({"clients": 7}, OWNER, "partition.clients = 7: 6 of the data's 7 clients"),
        ({"clients": 0, "min_size": 201}, OWNER, "lower partition.min_size"),
    ],
)
def test_an_impossible_natural_split_says_what_to_write(wrong: dict[str, Any], owner: Ints | None, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_split(settings("natural", **wrong), LABELS, 0, owner)


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("law", ["dirichlet-class", "iid", "natural"])
def test_folds_are_disjoint_stratified_and_cover_every_client(law: str, folds: int) -> None:
    partition = settings(law, clients=0 if law == "natural" else 10, parts=(0.5, 0.25, 0.25))
    splits = [make_split(partition, LABELS, 4, OWNER, folds, fold) for fold in range(1, folds + 1)]
    assert len({split.sha256 for split in splits}) == folds
    for of_client in zip(*(split.clients for split in splits), strict=True):
        tests = [parts.test for parts in of_client]
        whole = np.sort(np.concatenate(tests))  # every sample is in one fold's test part, and only in one
        for parts in of_client:
            assert np.array_equal(np.sort(np.concatenate([parts.train, parts.validation, parts.test])), whole)
            rest = len(whole) - len(parts.test)
            assert len(parts.validation) == min(max(1, round(rest / 3)), rest - 1)
        assert len(whole) // folds <= min(map(len, tests)) and max(map(len, tests)) <= -(-len(whole) // folds)
        counts = np.stack([np.bincount(LABELS[test], minlength=10) for test in tests])
        assert np.all(counts.max(axis=0) - counts.min(axis=0) <= 1)


def test_folds_deal_the_same_samples_to_a_client_as_no_folds() -> None:
    plain, fold = (
        make_split(settings("dirichlet"), LABELS, 0),
        make_split(settings("dirichlet"), LABELS, 0, folds=4, fold=2),
    )
    assert [set(a) for a in map(list, own(plain))] == [set(b) for b in map(list, own(fold))]
    assert make_split(settings("dirichlet"), LABELS, 0, folds=4).sha256 == plain.sha256


def test_too_many_folds_for_the_smallest_client() -> None:
    few = np.arange(40) % 2
    assert make_split(settings("iid", min_size=4), few, 0, folds=4, fold=1).sizes.min() >= 1
    assert make_split(settings("iid", min_size=4), few, 0, folds=2, fold=2).sizes.min() >= 1
    with refused("evaluate.folds = 5", 4):
        make_split(settings("iid", min_size=4), few, 0, folds=5, fold=1)
    with refused("evaluate.folds = 2", 3):
        make_split(settings("iid", min_size=3), few[:30], 0, folds=2, fold=1)


@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("law", list(partitioners.PARTITIONERS))
def test_memory_is_linear_in_the_samples(law: str, classes: int) -> None:
    """At most 12 numbers of 8 bytes a sample, with 20 samples a client; a table of clients and labels would need 15
    more a sample with 300 labels."""
    labels = numpy_generator(0, "labels").integers(0, classes, 200_000)
    tracemalloc.start()
    try:
        make_split(settings(law, clients=10_000, min_size=3, alpha=50.0 if law == "quantity" else 1000.0), labels, 0)
        assert tracemalloc.get_traced_memory()[1] < 96 * len(labels) + 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("law", [*partitioners.PARTITIONERS, "natural"])
def test_ten_million_samples_over_a_hundred_thousand_clients_are_dealt(law: str) -> None:
    labels = numpy_generator(0, "labels").integers(0, 10, 10_000_000)
    owner = numpy_generator(0, "owner").integers(0, 100_000, len(labels))
    split = make_split(settings(law, clients=100_000, alpha=10.0), labels, 0, owner)
    assert len(split.clients) == 100_000


def _count(calls: list[int], frame: object, event: str, arg: object) -> None:
    if event in ("call", "c_call"):
        calls.append(1)


@pytest.mark.parametrize("law", list(partitioners.PARTITIONERS))
def test_calls_are_linear_in_the_clients(law: str) -> None:
    """Calls of any function while ten times as many clients are dealt ten times as many samples: ten times as many, or
    fewer; a loop over pairs of clients would make a hundred times as many. (What an array operation costs is bounded by
    the memory above.)"""
    found = []
    for clients in (100, 1000):
        labels, calls = numpy_generator(0, "labels").integers(0, 10, 50 * clients), list[int]()
        plan = settings(law, clients=clients, min_size=3, alpha=50.0 if law == "quantity" else 1000.0)
        sys.setprofile(functools.partial(_count, calls))
        try:
            make_split(plan, labels, 0)
        finally:
            sys.setprofile(None)
        found.append(len(calls))
    assert found[1] <= 10 * found[0]
