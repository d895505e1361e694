"""Personal layers and personal models: two rounds on two clients, each beside the paper's update worked out by hand."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.worlds import (
    BIAS,
    LR,
    TRUNK,
    WEIGHT,
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
from meadow.arrays.named import of_kind
from meadow.config.schema import Experiment
from meadow.tasks.task import open_task

HEAD = (WEIGHT, BIAS)


def head(name: str) -> bool:
    return name in HEAD


def body(name: str) -> bool:
    return name == TRUNK


def part(w: State, names: tuple[str, ...]) -> State:
    return {name: w[name] for name in names}


def errors(out: Path, model: str = "used") -> list[float]:
    """Each client's root mean squared error on its test part, as `clients.csv` says it."""
    return [float(row[f"{model}.y.rmse"]) for row in csv.DictReader((out / "clients.csv").open())]


def error(plan: Experiment, client: int, w: State) -> float:
    own = open_task(plan).client(client).test
    x, y = own.x.numpy().astype(np.float64), own.y["y"].numpy().astype(np.float64)
    return float(np.sqrt(np.mean((x @ w[TRUNK].T @ w[WEIGHT][0] + w[BIAS] - y) ** 2)))


@pytest.mark.parametrize(
    ("share", "shared"), [("body", (TRUNK,)), ("head", HEAD), ("heads.y.bias,trunk.*", (BIAS, TRUNK))]
)
def test_fedavg_over_a_part(share: str, shared: tuple[str, ...], tmp_path: Path) -> None:
    """FedPer (share = body), LG-FedAvg (head), FedSim (any split): the rest stays where it was trained."""
    plan = experiment(f"strategy.share={share}", "strategy.name=fedsim")
    personal = tuple(n for n in (TRUNK, *HEAD) if n not in shared)
    w, own = start(plan), [part(start(plan), personal)] * 2
    for _ in range(2):
        ends = [descend(w | own[c], data(plan, c)) for c in (0, 1)]
        own = [part(end, personal) for end in ends]
        w = mean(ends, N)
    found = run(plan, tmp_path)
    same(found.arrays, part(w, shared))
    for c in (0, 1):
        same(stored(tmp_path, c), own[c])
    assert errors(tmp_path) == pytest.approx([error(plan, c, w | own[c]) for c in (0, 1)], rel=1e-12)


def test_fedrep(tmp_path: Path) -> None:
    """Collins et al. 2021, algorithm 1: three steps of the head, then two of the body with the new head."""
    plan = experiment("strategy.name=fedrep", "strategy.share=body", "strategy.head_epochs=3", "strategy.body_epochs=2")
    w, own = start(plan), [part(start(plan), HEAD)] * 2
    for _ in range(2):
        ends = []
        for c in (0, 1):
            y = descend(w | own[c], data(plan, c), 3, head)
            ends.append(descend(y, data(plan, c), 2, body))
        own = [part(end, HEAD) for end in ends]
        w = mean(ends, N)
    found = run(plan, tmp_path)
    same(found.arrays, part(w, (TRUNK,)))
    for c in (0, 1):
        same(stored(tmp_path, c), own[c])


def test_fedbabu_and_its_fine_tuning(tmp_path: Path) -> None:
    """Oh et al. 2022, algorithm 1: the body alone learns; afterwards a client tunes the whole model for three epochs."""
    plan = experiment("strategy.name=fedbabu", "strategy.share=body", "evaluate.fine_tune_epochs=3")
    w = start(plan)
    for _ in range(2):
        w = w | part(mean([descend(w, data(plan, c), 2, body) for c in (0, 1)], N), (TRUNK,))
    same(run(plan, tmp_path).arrays, part(w, (TRUNK,)))
    assert errors(tmp_path) == pytest.approx([error(plan, c, w) for c in (0, 1)], rel=1e-12)
    tuned = [error(plan, c, descend(w, data(plan, c), 3)) for c in (0, 1)]
    assert errors(tmp_path, "finetuned") == pytest.approx(tuned, rel=1e-12)


def test_ditto(tmp_path: Path) -> None:
    """Li et al. 2021, algorithm 1."""
    plan = experiment("strategy.name=ditto", "strategy.pull=0.6")
    w, own = start(plan), [start(plan)] * 2
    for _ in range(2):
        for c in (0, 1):
            v = own[c]
            for _ in range(2):
                g = gradient(v, data(plan, c))
                v = step(v, {n: g[n] + 0.6 * (v[n] - w[n]) for n in g})
            own[c] = v
        w = mean([descend(w, data(plan, c)) for c in (0, 1)], N)
    same(run(plan, tmp_path).arrays, w)
    for c in (0, 1):
        same(of_kind("own", stored(tmp_path, c)), own[c])
    assert errors(tmp_path) == pytest.approx([error(plan, c, own[c]) for c in (0, 1)], rel=1e-12)


@pytest.mark.parametrize("mix_lr", [0.0, 0.02])
def test_apfl(mix_lr: float, tmp_path: Path) -> None:
    """Deng et al. 2020, algorithm 1 and equation 10; every gradient is taken before any step."""
    plan = experiment("strategy.name=apfl", "strategy.mix=0.3", f"strategy.mix_lr={mix_lr}")
    w, own, a = start(plan), [start(plan)] * 2, [0.3, 0.3]
    for _ in range(2):
        ends = []
        for c in (0, 1):
            y, v = w, own[c]
            for _ in range(2):
                at_y = gradient(y, data(plan, c))
                at_mix = gradient({n: a[c] * v[n] + (1 - a[c]) * y[n] for n in y}, data(plan, c))
                along = sum(float(((v[n] - y[n]) * at_mix[n]).sum()) for n in y)
                v = step(v, at_mix, LR * a[c])
                a[c] = min(1.0, max(0.0, a[c] - mix_lr * along))
                y = step(y, at_y)
            own[c] = v
            ends.append(y)
        w = mean(ends, N)
    same(run(plan, tmp_path).arrays, w)
    for c in (0, 1):
        kept = stored(tmp_path, c)
        same(of_kind("own", kept), own[c])
        assert kept["mix@"] == pytest.approx([a[c]], rel=1e-12)
    used = [{n: a[c] * own[c][n] + (1 - a[c]) * w[n] for n in w} for c in (0, 1)]
    assert errors(tmp_path) == pytest.approx([error(plan, c, used[c]) for c in (0, 1)], rel=1e-12)


def test_pfedme(tmp_path: Path) -> None:
    """Dinh et al. 2020, algorithm 1, with beta = 0.8."""
    inner = ("strategy.inner_steps=3", "strategy.inner_lr=0.04", "strategy.pull=1.5")
    plan = experiment("strategy.name=pfedme", "strategy.server_lr=0.8", *inner)
    w, own = start(plan), [start(plan)] * 2
    for _ in range(2):
        ends = []
        for c in (0, 1):
            theta = y = w
            for _ in range(2):
                for _ in range(3):
                    g = gradient(theta, data(plan, c))
                    theta = step(theta, {n: g[n] + 1.5 * (theta[n] - y[n]) for n in g}, 0.04)
                y = step(y, {n: 1.5 * (y[n] - theta[n]) for n in y})
            own[c] = theta
            ends.append(y)
        w = mean([w, mean(ends, N)], [0.2, 0.8])
    same(run(plan, tmp_path).arrays, w)
    for c in (0, 1):
        same(of_kind("own", stored(tmp_path, c)), own[c])
    assert errors(tmp_path) == pytest.approx([error(plan, c, own[c]) for c in (0, 1)], rel=1e-12)


@pytest.mark.parametrize("name", ["perfedavg", "perfedavg-hf"])
def test_perfedavg(name: str, tmp_path: Path) -> None:
    """Fallah et al. 2020, algorithm 1 and section 5; the model used has made one step more, on all training samples."""
    plan = experiment(f"strategy.name={name}", "strategy.inner_lr=0.03")
    w = start(plan)
    for _ in range(2):
        ends = []
        for c in (0, 1):
            y = w
            for _ in range(2):
                v = direction = gradient(step(y, gradient(y, data(plan, c)), 0.03), data(plan, c))
                if name == "perfedavg-hf":
                    above, below = (gradient(step(y, v, -sign * 1e-3), data(plan, c)) for sign in (1, -1))
                    direction = {n: v[n] - 0.03 * (above[n] - below[n]) / 2e-3 for n in v}
                y = step(y, direction)
            ends.append(y)
        w = mean(ends, N)
    same(run(plan, tmp_path).arrays, w, 1e-11)  # differences lose three digits
    used = [step(w, gradient(w, data(plan, c)), 0.03) for c in (0, 1)]
    assert errors(tmp_path) == pytest.approx([error(plan, c, used[c]) for c in (0, 1)], rel=1e-10)


def test_perfedavgs_second_order_term_is_the_hessian() -> None:
    """(I - alpha H) v by differences of width 1e-3 is that of the loss' own Hessian, to the square of that width."""
    plan = experiment()
    w, points = start(plan), data(plan, 1)
    v = gradient(w, points)
    above, below = (gradient(step(w, v, -sign * 1e-3), points) for sign in (1, -1))
    x, y = (torch.from_numpy(p) for p in points)
    names = (TRUNK, WEIGHT, BIAS)

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        trunk, weight, bias = tensors
        return torch.mean((x @ trunk.T @ weight[0] + bias - y) ** 2)

    at = tuple(torch.from_numpy(w[n]) for n in names)
    along = tuple(torch.from_numpy(v[n]) for n in names)
    _, exact = torch.autograd.functional.hvp(loss, at, along)  # type: ignore[no-untyped-call]
    for name, product in zip(names, exact, strict=True):
        assert (above[name] - below[name]) / 2e-3 == pytest.approx(product.numpy(), abs=1e-4)


def test_fedrod(tmp_path: Path) -> None:
    """Chen and Chao 2022, section 4: balanced softmax for body and generic head; the personal head on what these give."""
    plan = experiment("strategy.name=fedrod", "task.targets=c", "task.kinds=class")
    names = (TRUNK, "heads.c.weight", "heads.c.bias")
    w, own = start(plan), [{n: np.zeros_like(start(plan)[n]) for n in names[1:]} for _ in (0, 1)]
    for _ in range(2):
        ends = []
        for c in (0, 1):
            train = open_task(plan).client(c).train
            x, y = train.x.double(), train.y["c"]
            prior = torch.log(torch.bincount(y, minlength=2).double().clamp(min=1e-9).float()).double()
            shared = {n: torch.from_numpy(w[n]) for n in names}
            mine = {n: torch.from_numpy(own[c][n]) for n in names[1:]}
            for _ in range(2):
                leaves = {n: t.clone().requires_grad_() for n, t in shared.items()}
                heads = {n: t.clone().requires_grad_() for n, t in mine.items()}
                z = x @ leaves[TRUNK].T
                balanced = F.cross_entropy(z @ leaves[names[1]].T + leaves[names[2]] + prior, y)
                weight, bias = (leaves[n].detach() + heads[n] for n in names[1:])
                both = F.cross_entropy(z.detach() @ weight.T + bias, y)
                by_shared = torch.autograd.grad(balanced, list(leaves.values()))
                by_mine = torch.autograd.grad(both, list(heads.values()))
                shared = {n: t - LR * g for (n, t), g in zip(shared.items(), by_shared, strict=True)}
                mine = {n: t - LR * g for (n, t), g in zip(mine.items(), by_mine, strict=True)}
            ends.append({n: t.numpy() for n, t in shared.items()})
            own[c] = {n: t.numpy() for n, t in mine.items()}
        w = mean(ends, N)
    same(run(plan, tmp_path).arrays, w)
    for c in (0, 1):
        same(of_kind("own", stored(tmp_path, c)), own[c])


def test_moon(tmp_path: Path) -> None:
    """Li et al. 2021, equation 3, between what the trunk gives now, as received, and after the last turn."""
    plan = experiment("strategy.name=moon", "strategy.mu=0.8", "strategy.temperature=0.5", "run.rounds=3")
    w, previous = start(plan), [start(plan)[TRUNK]] * 2
    for round_ in range(3):
        ends = []
        for c in (0, 1):
            x, y = (torch.from_numpy(p) for p in data(plan, c))
            now = {n: torch.from_numpy(v) for n, v in w.items()}
            for _ in range(2):
                leaves = {n: t.clone().requires_grad_() for n, t in now.items()}
                z = x @ leaves[TRUNK].T
                loss = torch.mean((z @ leaves[WEIGHT][0] + leaves[BIAS] - y) ** 2)
                like = [torch.cosine_similarity(z, x @ torch.from_numpy(t).T) / 0.5 for t in (w[TRUNK], previous[c])]
                if round_ > 0:
                    loss = loss - 0.8 * torch.mean(torch.log(like[0].exp() / (like[0].exp() + like[1].exp())))
                slopes = torch.autograd.grad(loss, list(leaves.values()))
                now = {n: t - LR * g for (n, t), g in zip(now.items(), slopes, strict=True)}
            ends.append({n: t.numpy() for n, t in now.items()})
            previous[c] = ends[-1][TRUNK]
        w = mean(ends, N)
    same(run(plan, tmp_path).arrays, w)
    for c in (0, 1):
        same(of_kind("previous", stored(tmp_path, c, 3)), {TRUNK: previous[c]})
