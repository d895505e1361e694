"""Splits: every law is complete and disjoint, repeatable to the bit, and has the moments of the law that it names."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from config.errors import UserError
from config.schema import Partition
from config.seeds import numpy_generator
from tasks import partition as laws
from tasks.data import Target
from tasks.partition import Split, deal, label_counts, strata

LABELS = np.random.Generator(np.random.Philox(5)).permutation(np.arange(600, dtype=np.int64) % 10)
SHA256 = {
    "iid": "0fc4063aa2d79c878384ab69fddb0d7bdf5ec05405f82d6a560d6dad9730d128",
    "dirichlet": "efc7a3d2ea8ca4e461472065e20578dd5b65744777d11bbc8f1737fbada90ec4",
    "dirichlet-class": "4858e0b2c61bb536de7780863c0b6016088f08efeaa5d92c60950162b59f550b",
    "dirichlet-balanced": "f9ee8764b60d9108d10a886b1ac6d25416c44d0035cd1be0705ab15529d140f9",
    "shards": "3efb30a6de8fe5042cf624988b6b4436fb65721794ff12dcc4bf7b348ffdd9e9",
    "labels": "30a9fe2121c7782ad1d0b3cec292bb65a5b5785d2f41475b4077c426612612ef",
    "quantity": "fb32b3be3fd82d7e53a981b0fa7cfd07193aa7a465e38df8c76b17bbdf495f1c",
}


def settings(law: str, **other: Any) -> Partition:
    return Partition.model_validate({"law": law, "clients": 10, "min_size": 5, "alpha": 2.0, **other})


def own(split: Split) -> list[npt.NDArray[np.int64]]:
    return [np.concatenate([c.train, c.validation, c.test]) for c in split.clients]


def owners(law: str, labels: npt.NDArray[np.int64], number: int, **other: Any) -> npt.NDArray[np.int64]:
    """One draw of a law itself, without rejection for size."""
    draw = numpy_generator(number, "test")
    return laws._LAWS[law](settings(law, **other), labels, int(labels.max()) + 1, draw)


@pytest.mark.parametrize("law", list(laws._LAWS))
def test_every_sample_has_one_owner_and_one_part(law: str) -> None:
    split = deal(settings(law), LABELS, 0)
    assert len(split.clients) == 10 and split.law == law and split.tries >= 1
    assert np.array_equal(np.sort(np.concatenate(own(split))), np.arange(600))
    for client in split.clients:
        for part in (client.train, client.validation, client.test):
            assert part.dtype == np.int64 and len(part) >= 1 and np.all(np.diff(part) > 0)
    assert min(map(len, own(split))) >= 5
    assert np.array_equal(label_counts(split, LABELS).sum(0), np.full(10, 60))


@pytest.mark.parametrize("law", list(laws._LAWS))
def test_the_seed_decides_the_split_and_its_hash_is_the_same_on_every_machine(law: str) -> None:
    first, again, other = (deal(settings(law), LABELS, seed) for seed in (0, 0, 1))
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
        sizes = [len(samples) for samples in own(deal(settings(law, clients=7, alpha=0.1), LABELS, 3))]
        assert max(sizes) - min(sizes) <= 1


def test_dirichlet_class_has_the_moments_of_the_dirichlet() -> None:
    """A client's share of a label is Beta(a, (N-1)a): mean 1/N, variance (1/N)(1-1/N)/(Na+1).

    1,600 independent shares; the bounds are five standard errors: of the mean sqrt(var/1600), of the variance
    var * sqrt((kurtosis - 1)/1600), where the kurtosis of Beta(2, 8) is 3.5. Cutting to whole samples moves a share by
    less than 1/1000.
    """
    labels = np.repeat(np.arange(4), 1000)
    shares = np.array(
        [
            np.bincount(labels[owners("dirichlet-class", labels, number, clients=5) == 0], minlength=4) / 1000
            for number in range(400)
        ]
    )
    variance = 0.2 * 0.8 / 11
    assert abs(shares.mean() - 0.2) < 5 * np.sqrt(variance / 1600) + 1e-3
    assert abs(shares.var() / variance - 1) < 5 * np.sqrt(2.5 / 1600)


def test_hsu_label_mix_has_the_moments_of_the_dirichlet_multinomial() -> None:
    """The first client to draw, before any label runs out, takes m samples by p ~ Dir(alpha * prior).

    Its share of label k has mean prior_k and variance prior_k (1 - prior_k)/m * (m + alpha)/(1 + alpha). Bounds: five
    standard errors of 1,000 draws; the kurtosis of none of these Beta laws is above 12.
    """
    prior, m, alpha = np.array([0.1, 0.2, 0.3, 0.4]), 50, 2.0
    labels = np.repeat(np.arange(4), (prior * 1000).astype(int))
    shares = []
    for number in range(1000):
        first = numpy_generator(number, "test").permutation(20)[0]  # the law's own first draw: the clients' order
        dealt = owners("dirichlet", labels, number, clients=20, alpha=alpha)
        shares.append(np.bincount(labels[dealt == first], minlength=4) / m)
    variance = prior * (1 - prior) / m * (m + alpha) / (1 + alpha)
    assert np.all(np.abs(np.mean(shares, axis=0) - prior) < 5 * np.sqrt(variance / 1000))
    assert np.all(np.abs(np.var(shares, axis=0) / variance - 1) < 5 * np.sqrt(11 / 1000))


def test_hsu_at_the_ends_of_alpha() -> None:
    labels = np.arange(10_000) % 10
    even = deal(settings("dirichlet", alpha=1e7, clients=10), labels, 0)
    # alpha -> infinity: 1,000 independent draws at p = 1/10 have a standard deviation of 9.5; the last client gets what
    # nine such clients leave, so three times that. The bound is five of those.
    assert np.abs(label_counts(even, labels) - 100).max() < 5 * 28.5
    single = deal(settings("dirichlet", alpha=1e-3, clients=10), labels, 0)
    # alpha -> 0: the first client to draw finds one label, of which there are just enough.
    assert label_counts(single, labels).max() == 1000


def test_quantity_sizes_have_the_moments_of_the_dirichlet() -> None:
    """As for dirichlet-class, with 800 draws of the sizes' share of client 0: Beta(2, 8)."""
    labels = np.zeros(1000, dtype=np.int64)
    shares = np.array([np.mean(owners("quantity", labels, number, clients=5) == 0) for number in range(800)])
    variance = 0.2 * 0.8 / 11
    assert abs(shares.mean() - 0.2) < 5 * np.sqrt(variance / 800) + 1e-3
    assert abs(shares.var() / variance - 1) < 5 * np.sqrt(2.5 / 800)


def test_dirichlet_balanced_gives_nothing_to_who_has_an_even_share() -> None:
    for number in range(20):
        dealt = owners("dirichlet-balanced", LABELS, number, alpha=0.5)
        counts = np.stack([np.bincount(LABELS[dealt == client], minlength=10) for client in range(10)])
        before = np.cumsum(counts, axis=1) - counts
        assert not np.any((before >= 60) & (counts > 0))


def test_shards_of_one_label_give_two_labels_and_equal_sizes() -> None:
    """600 samples in 20 shards of 30, and 60 of each label: every shard has one label."""
    counts = label_counts(deal(settings("shards"), LABELS, 0), LABELS)
    assert np.all(counts.sum(1) == 60) and np.all(counts % 30 == 0) and np.all((counts > 0).sum(1) <= 2)


@pytest.mark.parametrize(("clients", "labels"), [(10, 2), (4, 3), (17, 3), (10, 10)])
def test_labels_law_holds_k_labels_each_all_labels_and_deals_evenly(clients: int, labels: int) -> None:
    counts = label_counts(deal(settings("labels", clients=clients, labels=labels), LABELS, 0), LABELS)
    assert np.all((counts > 0).sum(1) == labels)
    for of_label in counts.T:
        held = of_label[of_label > 0]
        assert held.sum() == 60 and held.max() - held.min() <= 1


def test_parts_have_exact_sizes_and_keep_the_labels_shares() -> None:
    """Systematic sampling: test within 1 of its share of each label; validation, drawn from what is left, within 2."""
    split = deal(settings("dirichlet-class"), LABELS, 0)
    for client in split.clients:
        n = len(client.train) + len(client.validation) + len(client.test)
        assert len(client.test) == len(client.validation) == max(1, round(0.2 * n))
        whole = np.bincount(LABELS[np.concatenate([client.train, client.validation, client.test])], minlength=10)
        for part, bound in ((client.test, 1), (client.validation, 2), (client.train, 2)):
            assert np.all(np.abs(np.bincount(LABELS[part], minlength=10) - whole * (len(part) / n)) < bound + 1e-9)


@pytest.mark.parametrize("parts", [(0.6, 0.2, 0.2), (0.01, 0.5, 0.49), (0.05, 0.475, 0.475), (0.98, 0.01, 0.01)])
@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_no_part_is_ever_empty(parts: tuple[float, ...], n: int) -> None:
    split = deal(settings("iid", clients=1, min_size=3, parts=parts), np.arange(n) % 2, 0)
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
        deal(settings(**wrong), LABELS, 0)


def test_rejected_draws_are_counted_and_drawn_anew() -> None:
    split = deal(settings("quantity", alpha=0.7, min_size=5), LABELS, 0)
    assert split.tries > 1 and min(map(len, own(split))) >= 5


def test_values_are_dealt_by_their_deciles() -> None:
    values = np.random.Generator(np.random.Philox(1)).permutation(np.linspace(-1, 1, 1000)).astype(np.float32)
    deciles = strata(torch.from_numpy(values), Target("slant", "value", 1))
    assert np.array_equal(np.bincount(deciles), np.full(10, 100))
    assert all(values[deciles == d].max() < values[deciles == d + 1].min() for d in range(9))
