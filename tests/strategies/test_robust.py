"""Robust aggregation and attacks: each rule beside its definition or another library, each attack by hand."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm, trim_mean

from helpers.rounding import distance as norm_of_difference
from helpers.rounding import floats, run_off
from helpers.runs import Watching, run_inline, small
from meadow.arrays.files import read_arrays
from meadow.arrays.named import Arrays
from meadow.client.context import LocalContext
from meadow.config.schema import Attack
from meadow.config.schema import Strategy as Settings
from meadow.experiments.audit.ledgers import observed
from meadow.runtime.seeds import numpy_generator
from meadow.server.checkpoints import latest
from meadow.simulation.grid import become_server
from meadow.strategies.algorithms.robust import (
    BULYAN,
    KRUM,
    MEDIAN,
    TRIMMED_MEAN,
    centred_clipping,
    distance,
    geometric_median,
    multi_krum,
)
from meadow.strategies.attacks import attack, attackers, largest_z
from meadow.strategies.check import load
from meadow.strategies.stages.bucketing import Bucketing, Update, weighted_mean
from meadow.tasks.start import initial_state
from meadow.tasks.task import open_task

Floats = npt.NDArray[np.float64]


def updates(count: int, seed: int = 0, weights: bool = True) -> list[Update]:
    draw = np.random.default_rng(seed)
    each = draw.integers(1, 30, count).astype(float) if weights else np.ones(count)
    return [Update(float(w), {"a": draw.normal(size=(2, 3)), "b": draw.normal(size=4)}) for w in each]


def flat(moves: Any) -> Floats:
    return np.concatenate([np.ravel(moves["a"]), np.ravel(moves["b"])])


def matrix(given: list[Update]) -> Floats:
    return np.stack([flat(u.moves) for u in given])


def rule(algorithm: Any) -> Any:
    """The rule of one of the algorithms that are Flower's."""
    become_server()
    return algorithm.server.keywords["combine"]


def krum_scores(points: Floats, byzantine: int) -> Floats:
    """Blanchard et al. 2017, section 4: the sum of the n - f - 2 smallest squared distances to others."""
    apart = np.square(points[:, None] - points[None]).sum(-1)
    n = len(points)
    scores: Floats = np.sort(apart, axis=1)[:, 1 : n - byzantine - 1].sum(1)
    return scores


@pytest.mark.parametrize("count", [4, 7])
def test_median_is_numpys(count: int) -> None:
    given = updates(count, weights=False)
    assert flat(rule(MEDIAN)(given, Settings())) == pytest.approx(np.median(matrix(given), axis=0), rel=1e-14)


def test_trimmed_mean_is_scipys() -> None:
    given = updates(11, weights=False)
    found = flat(rule(TRIMMED_MEAN)(given, Settings(trim=0.2)))
    assert found == pytest.approx(trim_mean(matrix(given), 0.2), rel=1e-12)


def test_trimmed_mean_of_nothing_is_the_mean() -> None:
    given = updates(6, weights=False)
    assert flat(rule(TRIMMED_MEAN)(given, Settings(trim=0.0))) == pytest.approx(matrix(given).mean(0), rel=1e-12)


@pytest.mark.parametrize(("count", "byzantine"), [(5, 1), (9, 2), (12, 3)])
def test_krum_and_multi_krum_by_definition(count: int, byzantine: int) -> None:
    become_server()
    given = updates(count, seed=count, weights=False)
    points = matrix(given)
    order = np.argsort(krum_scores(points, byzantine), kind="stable")
    assert flat(rule(KRUM)(given, Settings(byzantine=byzantine))) == pytest.approx(points[order[0]], rel=1e-14)
    kept = flat(multi_krum(given, Settings(byzantine=byzantine)))
    assert kept == pytest.approx(points[order[: count - byzantine]].mean(0), rel=1e-12)
    kept = flat(multi_krum(given, Settings(byzantine=byzantine, keep=2)))
    assert kept == pytest.approx(points[order[:2]].mean(0), rel=1e-12)


@pytest.mark.parametrize(("count", "byzantine"), [(7, 1), (12, 2)])
def test_bulyan_by_definition(count: int, byzantine: int) -> None:
    """El Mhamdi et al. 2018, section 4: n - 2f times Krum's choice among those left; then for each coordinate the mean
    of the theta - 2f values nearest to the median."""
    given = updates(count, seed=3, weights=False)
    left, chosen = list(range(count)), []
    theta = count - 2 * byzantine
    for _ in range(theta):
        scores = krum_scores(matrix(given)[left], byzantine)
        chosen.append(left.pop(int(np.argmin(scores))))
    picked = matrix(given)[chosen]
    nearest = np.argsort(np.abs(picked - np.median(picked, axis=0)), axis=0)[: theta - 2 * byzantine]
    by_hand = np.take_along_axis(picked, nearest, axis=0).mean(0)
    assert flat(rule(BULYAN)(given, Settings(byzantine=byzantine))) == pytest.approx(by_hand, rel=1e-12)


def test_geometric_median_is_the_minimum_that_scipy_finds() -> None:
    given = updates(9)
    points, weights = matrix(given), np.array([u.weight for u in given])
    best = minimize(lambda z: float(weights @ np.linalg.norm(points - z, axis=1)), points.mean(0), tol=1e-12)
    found = flat(geometric_median(given, Settings(iterations=200)))
    assert found == pytest.approx(best.x, abs=2e-5)


def test_geometric_median_at_a_point_does_not_divide_by_zero() -> None:
    """Three of five updates are the same: that point is the geometric median."""
    point = updates(1)[0].moves
    given = [Update(1.0, point)] * 3 + updates(2, seed=4, weights=False)
    found = flat(geometric_median(given, Settings(iterations=100)))
    assert found == pytest.approx(flat(point), abs=1e-4)


def test_centred_clipping_and_norm_bound_by_hand() -> None:
    """Two updates in one dimension, of moves 1 and 10, radius 2; weights 1 and 3."""
    given = [Update(1.0, {"a": np.array([1.0])}), Update(3.0, {"a": np.array([10.0])})]
    plan = Settings(radius=2.0, iterations=2)
    first = (1 * 1 + 3 * 2) / 4  # 10 is cut to 2
    assert centred_clipping(given, plan, once=True)["a"] == pytest.approx(first)
    second = first + (1 * (1 - first) + 3 * 2) / 4  # 10 - 1.75 is cut to 2
    assert centred_clipping(given, plan)["a"] == pytest.approx(second)
    assert centred_clipping(given, Settings(radius=1e9, iterations=1))["a"] == pytest.approx((1 + 30) / 4)


def test_distance_is_over_all_arrays() -> None:
    one, other = updates(2)
    assert distance(one, other.moves) == pytest.approx(np.linalg.norm(flat(one.moves) - flat(other.moves)))


@given(st.integers(1, 13), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_buckets_hold_everybody_once(count: int, size: int) -> None:
    given = updates(count)
    found = Bucketing(size).gather(given, numpy_generator(0, "bucket", 1))
    assert len(found) == -(-count // size)
    assert sum(u.weight for u in found) == pytest.approx(sum(u.weight for u in given))
    assert flat(weighted_mean(found)) == pytest.approx(flat(weighted_mean(given)), rel=1e-10, abs=1e-12)


def test_a_bucket_of_one_is_none() -> None:
    given = updates(5)
    assert Bucketing(1).gather(given, numpy_generator(0, "bucket", 1)) == given


ROBUST_MEAN = (
    ("centred-clipping", "strategy.radius=1e9", "strategy.iterations=1"),
    ("norm-bound", "strategy.radius=1e9"),
    ("trimmed-mean", "strategy.trim=0"),
    ("multi-krum", "strategy.keep=8"),
)


@pytest.mark.parametrize("plan", ROBUST_MEAN)
def test_rules_that_cut_nothing_are_fedavg(plan: tuple[str, ...], tmp_path: Path) -> None:
    name, *settings = plan
    alike = ("run.rounds=2", "partition.law=quantity", "strategy.weights=equal")
    run_inline(small("fedavg", f"strategy.name={name}", *settings, *alike), tmp_path / "one")
    run_inline(small("fedavg", *alike), tmp_path / "other")
    found, plain = (latest(tmp_path / n / "checkpoints")[0] for n in ("one", "other"))
    assert found is not None and plain is not None
    # The means are worked out in float64, each in its own way, and rounded: the second round begins a rounding apart.
    experiment = small("fedavg", *alike)
    moved = norm_of_difference(plain.arrays, initial_state(experiment))
    assert norm_of_difference(found.arrays, plain.arrays) <= 2 * run_off(experiment) < moved / 500


# Attacks


def test_attackers_come_from_the_seed() -> None:
    plan = partial(load, "fedavg")
    ten = ["attack.kind=ipm", "attack.fraction=0.25", "partition.clients=40"]
    assert attackers(plan([])) == frozenset()
    assert len(attackers(plan(ten))) == 10
    assert attackers(plan(ten)) == attackers(plan([*ten, "run.rounds=3"])) != attackers(plan([*ten, "run.seed=1"]))


SENT: Arrays = {"w": np.array([1, 2], dtype=np.float32), "n": np.array(3)}
HONEST: dict[int, Arrays] = {
    0: {"w": np.array([2, 2], dtype=np.float32), "n": np.array(4)},
    1: {"w": np.array([4, 0], dtype=np.float32), "n": np.array(5)},
}
EVIL: dict[int, Arrays] = {
    2: {"w": np.array([0, 3], dtype=np.float32), "n": np.array(6)}
}  # its honest move would be (-1, 1)


@pytest.mark.parametrize(
    ("kind", "scale", "move"),
    [
        ("sign-flip", 3.0, [3, -3]),
        ("replacement", 0.0, [-3, 3]),  # n/m = 3
        ("replacement", 2.0, [-2, 2]),
        ("ipm", 0.5, [-1, 0.5]),  # the honest mean is (2, -1)
        ("alie", 1.5, [2 - 1.5, -1 - 1.5]),  # of standard deviation (1, 1)
    ],
)
def test_attacks_by_hand(kind: Any, scale: float, move: list[float]) -> None:
    found = attack(HONEST | EVIL, frozenset({2}), SENT, Attack(kind=kind, scale=scale), 0, 1)
    assert found.keys() == {2}
    assert found[2]["w"] == pytest.approx(np.array([1, 2]) + move)
    assert found[2]["w"].dtype == np.float32 and found[2]["n"] == 6


def test_noise_is_drawn_from_seed_round_and_client() -> None:
    noisy = partial(attack, HONEST | EVIL, frozenset({2}), SENT, Attack(kind="noise", scale=0.1))
    draw = numpy_generator(4, "attack", 7, 2)
    assert noisy(4, 7)[2]["w"] == pytest.approx(floats(EVIL[2])["w"] + 0.1 * draw.standard_normal(2), rel=1e-6)
    assert not np.array_equal(noisy(4, 7)[2]["w"], noisy(4, 8)[2]["w"])


def test_alies_largest_z() -> None:
    """Baruch et al. 2019: n = 50, m = 24 leaves s = 2 supporters, and 24 of 26 honest ones to be nearer."""
    assert largest_z(50, 24) == pytest.approx(norm.ppf(24 / 26))
    assert largest_z(50, 24) == pytest.approx(1.4260769, abs=1e-6)


@pytest.mark.parametrize("kind", ["label-flip", "replacement"])
def test_label_flip_trains_on_the_other_labels(kind: str, tmp_path: Path) -> None:
    """Label y of ten classes becomes 9 - y at the attackers, and stays what it is at the others."""
    experiment = small("fedavg", f"attack.kind={kind}", "attack.fraction=0.25", "run.rounds=1")
    seen: dict[int, Any] = {}

    def begins(context: LocalContext) -> None:
        seen[context.client] = context.data.y["digit"]

    with observed(experiment, tmp_path, Watching(begins)):
        run_inline(experiment, tmp_path)
    assert len(attackers(experiment)) == 2 and seen.keys() == set(range(8))
    for client, found in seen.items():
        own = open_task(experiment).client(client).train.y["digit"]
        assert (found == (9 - own if client in attackers(experiment) else own)).all()


@pytest.mark.parametrize("kind", ["label-flip", "sign-flip", "replacement", "ipm", "alie", "noise"])
def test_an_attack_changes_what_it_should_and_repeats(kind: str, tmp_path: Path) -> None:
    plan = ("run.rounds=2", "evaluate.on=global")
    attacked = small("fedavg", f"attack.kind={kind}", "attack.fraction=0.25", *plan)
    one, again = (run_inline(attacked, tmp_path / n)["model_sha256"] for n in ("one", "again"))
    assert one == again != run_inline(small("fedavg", *plan), tmp_path / "none")["model_sha256"]


@pytest.mark.parametrize(
    "name", ["median", "trimmed-mean", "multi-krum", "geometric-median", "centred-clipping", "krum"]
)
def test_a_defence_holds_where_the_mean_falls(name: str, tmp_path: Path) -> None:
    """Two of eight clients send noise of scale 100: the robust model stays within what honest clients sent."""
    plan = ("attack.kind=noise", "attack.scale=100", "attack.fraction=0.25", "run.rounds=1", "strategy.trim=0.3")
    defended = small("fedavg", f"strategy.name={name}", "strategy.byzantine=2", *plan)
    run_inline(defended, tmp_path / "one")
    run_inline(small("fedavg", *plan), tmp_path / "other")
    found, mean = (latest(tmp_path / n / "checkpoints")[0] for n in ("one", "other"))
    assert found is not None and mean is not None
    start, robust, fallen = floats(initial_state(defended)), floats(found.arrays), floats(mean.arrays)
    moved = max(float(np.abs(robust[n] - start[n]).max()) for n in start)
    thrown = max(float(np.abs(fallen[n] - start[n]).max()) for n in start)
    assert moved < 10 < thrown
    assert json.loads((tmp_path / "one" / "rounds.jsonl").read_text())["failed"] == []


@pytest.mark.parametrize("name", ["krum", "multi-krum", "bulyan"])
def test_too_few_updates_for_the_rule_leave_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    """Eleven clients are enough for two attackers, the two that are scheduled for the second round are not."""
    (tmp_path / "who").write_text(" ".join(map(str, range(11))) + "\n3 4\n")
    schedule = ("cohort.sampling=schedule", f"cohort.schedule={tmp_path / 'who'}", "run.rounds=2")
    plan = (f"strategy.name={name}", "strategy.byzantine=2", "partition.clients=11")
    run_inline(small("fedavg", *plan, *schedule), tmp_path / "run")
    one, two = (read_arrays(tmp_path / "run" / "checkpoints" / f"round-0000000{r}.safetensors") for r in (1, 2))
    assert all(np.array_equal(one[n], two[n]) for n in one)
