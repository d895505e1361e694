"""Averages and server optimisers: two rounds on two clients, each beside the paper's update worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from helpers.rounding import floats
from helpers.worlds import (
    LR,
    N,
    State,
    data,
    descend,
    experiment,
    gradient,
    mean,
    run,
    same,
    start,
    step,
    stored,
)
from meadow.arrays.named import auxiliary, of_kind


def averages(w: State, rounds: int = 2) -> State:
    """FedAvg by hand."""
    plan = experiment()
    for _ in range(rounds):
        w = mean([descend(w, data(plan, c)) for c in (0, 1)], N)
    return w


def test_the_world_is_as_told() -> None:
    plan = experiment()
    assert [len(data(plan, c)[1]) for c in (0, 1)] == N
    w = start(plan)
    for name, value in gradient(w, data(plan, 1)).items():  # the gradient by hand against differences
        for index in np.ndindex(value.shape):
            moved = [dict(w), dict(w)]
            for sign, one in zip((1, -1), moved, strict=True):
                one[name] = one[name].copy()
                one[name][index] += sign * 1e-6
            x, y = data(plan, 1)
            ends = [x @ m["trunk.weight"].T @ m["heads.y.weight"][0] + m["heads.y.bias"] for m in moved]
            losses = [np.mean((end - y) ** 2) for end in ends]
            assert value[index] == pytest.approx((losses[0] - losses[1]) / 2e-6, abs=1e-8)


def test_fedavg(tmp_path: Path) -> None:
    plan = experiment()
    same(run(plan, tmp_path).arrays, averages(start(plan)))


def test_fedavg_of_equal_weights(tmp_path: Path) -> None:
    plan = experiment("strategy.weights=equal", "run.rounds=1")
    same(run(plan, tmp_path).arrays, mean([descend(start(plan), data(plan, c)) for c in (0, 1)], [1, 1]))


def test_fedavg_with_a_server_rate(tmp_path: Path) -> None:
    plan = experiment("strategy.server_lr=0.5", "run.rounds=1")
    w = start(plan)
    same(run(plan, tmp_path).arrays, mean([w, averages(w, 1)], [1, 1]))


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_server_optimisers(name: str, tmp_path: Path) -> None:
    """Hsu et al. 2019, section 3; Reddi et al. 2021, algorithm 2: v_0 = tau^2, no bias correction."""
    settings = ("strategy.server_lr=0.3", "strategy.beta1=0.8", "strategy.beta2=0.7", "strategy.tau=0.05")
    plan = experiment(f"strategy.name={name}", "strategy.server_momentum=0.6", *settings)
    found = run(plan, tmp_path)
    w = start(plan)
    m = {n: np.zeros_like(v) for n, v in w.items()}
    v = {n: np.full_like(x, 0.05**2) for n, x in w.items()}
    for _ in range(2):
        delta = {n: x - w[n] for n, x in averages(w, 1).items()}
        for n, d in delta.items():
            if name == "fedavgm":
                m[n] = 0.6 * m[n] + d
                w[n] = w[n] + 0.3 * m[n]
                continue
            m[n] = 0.8 * m[n] + 0.2 * d
            if name == "fedadagrad":
                v[n] = v[n] + d**2
            elif name == "fedadam":
                v[n] = 0.7 * v[n] + 0.3 * d**2
            else:
                v[n] = v[n] - 0.3 * d**2 * np.sign(v[n] - d**2)
            w[n] = w[n] + 0.3 * m[n] / (np.sqrt(v[n]) + 0.05)
    same(found.arrays, w)
    kept = auxiliary("m", m) if name == "fedavgm" else auxiliary("m", m) | auxiliary("v", v)
    same(found.strategy, {n: np.asarray(x, np.float64) for n, x in kept.items()})


def test_fedprox(tmp_path: Path) -> None:
    """Li et al. 2020, equation 2: the gradient has mu (w - w^t) more."""
    plan = experiment("strategy.name=fedprox", "strategy.mu=0.7")
    w = start(plan)
    for _ in range(2):
        ends = []
        for c in (0, 1):
            y = w
            for _ in range(2):
                g = gradient(y, data(plan, c))
                y = step(y, {n: g[n] + 0.7 * (y[n] - w[n]) for n in g})
            ends.append(y)
        w = mean(ends, N)
    same(run(plan, tmp_path).arrays, w)


def test_fednova(tmp_path: Path) -> None:
    """Wang et al. 2020, equation 6 and algorithm 1, client 0 with one step, client 1 with two (batches of at most 3)."""
    once = ("local.batch_size=3", "local.epochs=1", "run.rounds=1")
    plan = experiment("strategy.name=fednova", "strategy.server_lr=0.9", *once)
    run(
        experiment("strategy.share=none", *once), tmp_path / "alone"
    )  # where each client ends, whatever its batches are
    w, ends = start(plan), [floats(stored(tmp_path / "alone", c, 1)) for c in (0, 1)]
    tau = [1.0, 2.0]
    p = [n / sum(N) for n in N]
    d = [{n: (w[n] - end[n]) / t for n in w} for end, t in zip(ends, tau, strict=True)]
    effective = sum(a * t for a, t in zip(p, tau, strict=True))
    by_hand = {n: w[n] - 0.9 * effective * (p[0] * d[0][n] + p[1] * d[1][n]) for n in w}
    same(run(plan, tmp_path / "a").arrays, by_hand)


def test_fednovas_normaliser_with_momentum() -> None:
    """Section 4.1: the weights of the gradients of five steps with velocity v <- rho v + g, added up one by one."""
    from meadow.strategies.algorithms.fednova import normaliser

    rho, steps = 0.9, 5
    weights = [sum(rho**j for j in range(steps - k)) for k in range(steps)]
    assert normaliser(steps, rho) == pytest.approx(sum(weights), rel=1e-14)
    assert normaliser(7, 0.0) == 7


def scaffold(w: State, plan_steps: int, rounds: int, rate: float = 1.0) -> tuple[State, State, list[State]]:
    """Karimireddy et al. 2020, algorithm 1 with option II, both clients; equal weights, N = 2."""
    plan = experiment()
    zero = {n: np.zeros_like(v) for n, v in w.items()}
    c, own = dict(zero), [dict(zero), dict(zero)]
    for _ in range(rounds):
        ends, new = [], []
        for i in (0, 1):
            y = w
            for _ in range(plan_steps):
                g = gradient(y, data(plan, i))
                y = step(y, {n: g[n] - own[i][n] + c[n] for n in g})
            new.append({n: own[i][n] - c[n] + (w[n] - y[n]) / (plan_steps * LR) for n in w})
            ends.append(y)
        c = {n: c[n] + sum(new[i][n] - own[i][n] for i in (0, 1)) / 2 for n in w}
        w = {n: w[n] + rate * ((ends[0][n] + ends[1][n]) / 2 - w[n]) for n in w}
        own = new
    return w, c, own


def test_scaffold(tmp_path: Path) -> None:
    plan = experiment("strategy.name=scaffold", "run.rounds=3", "strategy.server_lr=0.8")
    w, c, own = scaffold(start(plan), 2, 3, 0.8)
    found = run(plan, tmp_path)
    same(found.arrays, w)
    same(of_kind("c", found.strategy), c)
    for i in (0, 1):
        same(of_kind("c", stored(tmp_path, i, 3)), own[i])


def test_scaffold_moves_c_by_the_cohorts_sum_over_all_clients(tmp_path: Path) -> None:
    """One client of two takes part: c is half of that client's c_i, its mean gradient over two steps."""
    (tmp_path / "who").write_text("1\n")
    plan = experiment(
        "strategy.name=scaffold", "run.rounds=1", "cohort.sampling=schedule", f"cohort.schedule={tmp_path / 'who'}"
    )
    w = start(plan)
    end = descend(w, data(plan, 1))
    found = run(plan, tmp_path / "run")
    same(found.arrays, end)
    same(of_kind("c", found.strategy), {n: (w[n] - end[n]) / (2 * LR) / 2 for n in w})


def test_feddyn(tmp_path: Path) -> None:
    """Acar et al. 2021, algorithm 1, its argmin by two gradient steps."""
    alpha = 0.4
    plan = experiment("strategy.name=feddyn", f"strategy.alpha={alpha}", "run.rounds=3")
    w = start(plan)
    zero = {n: np.zeros_like(v) for n, v in w.items()}
    h, own = dict(zero), [dict(zero), dict(zero)]
    for _ in range(3):
        ends = []
        for k in (0, 1):
            y = w
            for _ in range(2):
                g = gradient(y, data(plan, k))
                y = step(y, {n: g[n] - own[k][n] + alpha * (y[n] - w[n]) for n in g})
            own[k] = {n: own[k][n] - alpha * (y[n] - w[n]) for n in w}
            ends.append(y)
        h = {n: h[n] - alpha / 2 * sum(end[n] - w[n] for end in ends) for n in w}
        w = {n: (ends[0][n] + ends[1][n]) / 2 - h[n] / alpha for n in w}
    found = run(plan, tmp_path)
    same(found.arrays, w)
    same(of_kind("h", found.strategy), h)
    for k in (0, 1):
        same(of_kind("h", stored(tmp_path, k, 3)), own[k])
