"""DP-SGD: per-sample gradients against a loop over samples, the private sum against hand-clipped ones and Opacus."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from helpers.refusals import refused
from helpers.rounding import close, rounding
from meadow.privacy.dpsgd.choose import SUMS, GradSample, Mode, chosen_mode
from meadow.privacy.dpsgd.mechanism import Mechanism, poisson
from meadow.privacy.dpsgd.step import VALUES_AT_ONCE, Privatiser
from meadow.privacy.noise import Stream
from meadow.runtime.seeds import torch_generator, torch_seeded

N = 7
Losses = Callable[[Tensor], Tensor]
Gradients = dict[str, Tensor]


class Recurrent(nn.Module):
    """Embedding with padding, two bidirectional layers, the last state's linear head."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, padding_idx=0)
        self.rnn = kind(5, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(self.embedding(x))[0].mean(1))
        return out


class Bag(nn.Module):
    """An embedding with padding, and a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.embedding(x).mean(1)))
        return out


class LowRank(nn.Module):
    """LoRA: a frozen linear layer and two small factors that are parameters of this module itself."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return out


class Packed(nn.Module):
    """Texts of unlike lengths, packed, so that the recurrent layer has them in another order than the layers around it."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = x * (torch.arange(x.shape[1]) <= x[:, :1] % x.shape[1])
        total = self.states(x)
        out: Tensor = self.head(total + self.states(x.flip(0)).flip(0) if self.twice else total)
        return out

    def states(self, x: Tensor) -> Tensor:
        lengths = (x != 0).sum(1).clamp(min=1)
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0].sum(1)


class TwoHeads(nn.Module):
    """A trunk and two heads; the sum of both losses, one of them missing for some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))
        self.heads = nn.ModuleDict({"class": nn.Linear(5, 3), "value": nn.Linear(5, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding="same"),
        nn.GroupNorm(1, 4),
        nn.GELU(),
        nn.Conv1d(4, 4, 3, dilation=2, stride=2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def odd() -> nn.Module:
    """Every odd form of a covered layer: grouped, dilated, strided, padded by reflection, one bias and one scale frozen."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1), padding_mode="reflect"),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 6, 3, groups=2, padding="same"),
        nn.LayerNorm([6, 6, 8]),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Linear(48, 7),
        nn.LayerNorm(7, bias=False),
        nn.Flatten(),
        nn.Linear(42, 3),
    )
    model[1].bias.requires_grad_(False)
    model[6].weight.requires_grad_(False)
    return model


class Again(nn.Module):
    """A convolution, a linear layer and a norm that are used twice, with unlike numbers of places, and a layer of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.GroupNorm(1, 2)
        self.linear = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)
        self.none = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.none(x.mean((2, 3)))
        x = self.norm(self.conv(x)).tanh()[:, :, ::2]
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.linear(self.linear(x).tanh()[:, :9]).mean(1))
        return out


def frozen_trunk() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model[:2].requires_grad_(False)
    model[:2].eval()
    return model


def lora() -> nn.Module:
    return nn.Sequential(LowRank(nn.Linear(6, 8)), nn.Tanh(), LowRank(nn.Linear(8, 3)))


class Transposed(nn.Module):
    """A layer kind that Opacus has no hook for: functorch computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 2)
        self.scale = nn.Linear(3 * 49, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale(self.up(x).flatten(1))
        return out


class Attention(nn.Module):
    """A vision transformer in small: a token and positions that are parameters of this module, torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(torch.cat([self.token.expand(len(x), 1, 8), x], 1) + self.places)[:, 0])
        return out


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(N, 6)),
    "cnn": (cnn, lambda: torch.randn(N, 2, 8, 8)),
    "conv1d": (conv1d, lambda: torch.randn(N, 3, 12)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randint(0, 11, (N, 6))),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randint(0, 11, (N, 6))),
    "rnn": (lambda: Recurrent(nn.RNN), lambda: torch.randint(0, 11, (N, 6))),
    "packed": (Packed, lambda: torch.randint(0, 11, (N, 6))),
    "bag": (Bag, lambda: torch.randint(0, 11, (N, 6))),
    "lora": (lora, lambda: torch.randn(N, 6)),
    "odd": (odd, lambda: torch.randn(N, 3, 9, 8)),
    "again": (Again, lambda: torch.randn(N, 2, 9, 8)),
    "frozen trunk": (frozen_trunk, lambda: torch.randn(N, 2, 6, 6)),
    "two heads": (TwoHeads, lambda: torch.randn(N, 6)),
    "transposed": (Transposed, lambda: torch.randn(N, 2, 6, 6)),
    "attention": (Attention, lambda: torch.randn(N, 4, 8)),
}


def case(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Losses]:
    """A model of the family in train mode, and its losses on N fixed samples, by index: the same numbers in either dtype."""
    make, inputs = FAMILIES[family]
    with torch_seeded(0, "test", family):
        model, x, y, z = make().to(dtype), inputs(), torch.randint(0, 3, (N,)), torch.randn(N).to(dtype)
    if x.is_floating_point():
        x = (3 * x).to(dtype)

    def losses(index: Tensor) -> Tensor:
        out: Tensor | dict[str, Tensor] = model(x[index])
        if isinstance(out, dict):
            known = (index % 2 == 0).to(dtype)
            return (
                F.cross_entropy(out["class"], y[index], reduction="none") + known * (out["value"][:, 0] - z[index]) ** 2
            )
        return F.cross_entropy(out, y[index], reduction="none")

    return model, losses


@dataclass(frozen=True)
class Sample:
    """A sample's gradient in float64, and the size of the terms that it is the sum of."""

    gradient: Gradients
    terms: float

    @property
    def length(self) -> float:
        return length(self.gradient.values())

    def factor(self, clip: float) -> float:
        return min(1.0, clip / self.length)


def length(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in parts))


def naive(model: nn.Module, losses: Losses, index: Tensor) -> list[Sample]:
    """Each sample's gradient, by a pass for each.

    It is J'(p - y), with J the outputs' gradients: what is left of p - y may be small, p and y are not, so that its terms
    are J's rows.
    """
    result, seen = [], list[Any]()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hook = model.register_forward_hook(lambda module, inputs, out: seen.append(out))
    for i in index:
        loss, out = losses(i[None]).sum(), seen[-1]
        entries = [z for part in (out.values() if isinstance(out, dict) else [out]) for z in part.flatten()]
        (mine, *others) = (
            torch.autograd.grad(entry, list(learning.values()), retain_graph=True, allow_unused=True)
            for entry in (loss, *entries)
        )
        found = {n: g for n, g in zip(learning, mine, strict=True) if g is not None}
        jacobian = length(g for row in others for g in row if g is not None)
        result.append(Sample(found, max(jacobian, length(found.values()))))
    hook.remove()
    return result


@functools.cache
def oracle(family: str) -> list[Sample]:
    """All samples of a family."""
    return naive(*case(family, torch.float64), torch.arange(N))


def clipped_sum(samples: Iterable[Sample], clip: float) -> Gradients:
    total: Gradients = {}
    for sample in samples:
        for name, g in sample.gradient.items():
            total[name] = total.get(name, torch.zeros(())) + g * sample.factor(clip)
    return total


OPERATIONS = 64
"""Roundings between a sample and its gradient: the longest sum in these models has 150 products, most have fewer than 16."""


def clipped_like(found: Gradients, samples: Iterable[Sample], clip: float) -> None:
    """The found sum is the hand-clipped one. Where its terms cancel it is small, and its error is as theirs."""
    samples = list(samples)
    terms = sum(sample.factor(clip) * sample.terms for sample in samples)
    for name, gradient in clipped_sum(samples, clip).items():
        assert gradient.dtype == torch.float64
        close(found[name], gradient, OPERATIONS, terms, name=name)


def private(
    model: nn.Module,
    losses: Losses,
    index: Tensor,
    mechanism: Mechanism,
    mode: GradSample = "auto",
    noise: Stream | None = None,
    values_at_once: int = VALUES_AT_ONCE,
) -> Gradients:
    with Privatiser(model, mechanism, Stream(0), noise or Stream(1), mode, values_at_once) as privatiser:
        privatiser.gradients(index, losses)
        result = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())
    return result


def no_noise(clip: float) -> Mechanism:
    return Mechanism(0.5, 0.0, clip, 1.0, 1)


NOT = {  # Opacus errs on odd layers
    "book": {"lstm", "packed", "gru", "rnn", "lora", "transposed", "attention"},
    "hooks": {"odd", "attention"},
    "loop": set(),
}
MODES = [(family, mode) for family in FAMILIES for mode, without in NOT.items() if family not in without]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clip", [0.3, 100.0])
def test_the_bound_sees_one_sample_that_counts_a_thousandth_more(family: str, clip: float) -> None:
    samples = oracle(family)
    largest = max(samples, key=lambda sample: sample.length)
    extra = {n: g * largest.factor(clip) / 1000 for n, g in largest.gradient.items()}
    clipped_like(clipped_sum(samples, clip), samples, clip)
    with pytest.raises(AssertionError):
        clipped_like({n: g + extra[n] for n, g in clipped_sum(samples, clip).items()}, samples, clip)


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_each_samples_gradient_is_the_loops(family: str, mode: GradSample) -> None:
    model, losses = case(family)
    index = torch.arange(N)
    for i, expected in zip(index, oracle(family), strict=True):
        found = private(model, losses, i[None], no_noise(1e6), mode)
        assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        assert not any(found[name].any() for name in found.keys() - expected.gradient.keys())
        clipped_like(found, [expected], 1e6)


@pytest.mark.parametrize(("family", "mode"), MODES)
@pytest.mark.parametrize("clip", [0.3, 1.5, 100.0])
def test_without_noise_it_is_the_hand_clipped_sum(family: str, mode: GradSample, clip: float) -> None:
    model, losses = case(family)
    index = torch.tensor([0, 2, 3, 5, 6])
    found = private(model, losses, index, no_noise(clip), mode)
    clipped_like(found, [oracle(family)[i] for i in index], clip)
    assert torch.stack([g.norm() for g in found.values()]).norm() <= clip * len(index)


@pytest.mark.parametrize("mode", ["book", "hooks"])
@pytest.mark.parametrize("family", ["mlp", "cnn", "conv1d", "two heads"])
def test_clip_and_noise_are_those_of_opacus(family: str, mode: GradSample) -> None:
    """Its optimiser as the oracle, given the same numbers for noise: the same result to rounding."""
    index, plan = torch.tensor([0, 2, 3, 5, 6]), Mechanism(0.5, 1.3, 0.4, 3.0, 1)
    model, losses = case(family)
    drawn = torch_generator(0, "noise")

    class Torchs(Stream):
        def fill(self, out: npt.NDArray[np.float32], deviation: float = 1.0) -> None:
            sizes = [parameter.numel() for parameter in model.parameters()]
            parts = torch.from_numpy(out).split(sizes)  # type: ignore[no-untyped-call]
            for part, parameter in zip(parts, model.parameters(), strict=True):
                part.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=drawn).flatten())

    found = private(model, losses, index, plan, mode, Torchs(1))
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    wrapped = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=1.3,
        max_grad_norm=0.4,
        expected_batch_size=3,
        loss_reduction="mean",
        generator=torch_generator(0, "noise"),
    )
    losses(index).sum().backward()  # type: ignore[no-untyped-call]
    assert optimizer.pre_step()
    # Both are off by as much; beside five clipped gradients noise is added, five of its deviations large at most.
    terms = 2 * (len(index) * 0.4 + 5 * 1.3 * 0.4) / 3
    for name, parameter in wrapped._module.named_parameters():
        close(found[name], parameter.grad.double(), OPERATIONS, terms, name=name)


@pytest.mark.parametrize(
    ("family", "mode"), [("mlp", "hooks"), ("mlp", "loop"), ("mlp", "book"), ("cnn", "book"), ("lstm", "hooks")]
)
def test_an_empty_sample_is_noise_alone(family: str, mode: GradSample) -> None:
    model, losses = case(family)
    found = private(model, losses, torch.arange(0), Mechanism(0.5, 2.0, 0.5, 4.0, 1), mode)
    sizes = [parameter.numel() for parameter in model.parameters()]
    for (name, parameter), noise in zip(
        model.named_parameters(), torch.split(Stream(1).normal(sum(sizes)), sizes), strict=True
    ):
        assert torch.equal(found[name], 0.25 * noise.view_as(parameter))


@pytest.mark.parametrize("mode", ["book", "hooks", "loop"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 2])
def test_a_sample_without_a_finite_gradient_adds_nothing(mode: GradSample, bad: float, where: int) -> None:
    model, losses = case("mlp")
    index = torch.arange(N)
    others = index[index != where]

    def spoiled(at: Tensor) -> Tensor:
        return losses(at) * torch.where(at == where, bad, 1.0)

    found = private(model, spoiled, index, no_noise(0.5), mode)
    clipped_like(found, [oracle("mlp")[i] for i in others], 0.5)


@pytest.mark.parametrize("mode", ["book", "hooks", "loop"])
def test_adding_one_sample_moves_the_sum_by_the_clip_at_most(mode: GradSample) -> None:
    for family in ("mlp", "cnn", "bag", "two heads"):
        model, losses = case(family)
        for i in range(N):
            others = torch.tensor([j for j in range(N) if j != i])
            with_it, without = (private(model, losses, at, no_noise(0.2), mode) for at in (torch.arange(N), others))
            moved = length(with_it[n] - without[n] for n in with_it)
            assert moved <= 0.2 + rounding(OPERATIONS) * 0.2 * 2 * N  # two sums, each of N gradients of that length


def test_pieces_of_a_large_sample_add_up() -> None:
    model, losses = case("cnn")
    whole = private(model, losses, torch.arange(N), no_noise(0.5), "hooks")
    sizes = []

    def watched(index: Tensor) -> Tensor:
        sizes.append(len(index))
        return losses(index)

    pieces = private(model, watched, torch.arange(N), no_noise(0.5), "hooks", values_at_once=500)
    assert sum(sizes) == N
    assert max(sizes) < N - 1
    for found in (whole, pieces):
        clipped_like(found, oracle("cnn"), 0.5)


def test_a_correction_after_the_noise_acts_in_full() -> None:
    """FIELD: Opacus overwrites p.grad, so that a proximal term is lost; here the loop adds it after `gradients`."""
    model, losses = case("mlp")
    plan = Mechanism(0.5, 1.0, 0.5, 2.0, 1)
    plain = private(model, losses, torch.arange(N), plan)
    with Privatiser(model, plan, Stream(0), Stream(1)) as privatiser:
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e6)  # what stood there before is not taken in
        privatiser.gradients(torch.arange(N), losses)
        for p in model.parameters():
            assert p.grad is not None
            p.grad += 10.0 * p.detach()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], plain[name] + 10.0 * parameter.detach())


def test_the_noise_has_the_deviation_that_is_claimed() -> None:
    """Chi-square of 10^5 draws: 4 standard deviations of its own, a false alarm in 16,000 for another seed."""
    model = nn.Linear(1000, 100, bias=False)
    plan = Mechanism(0.5, 1.7, 0.3, 8.0, 1)
    with Privatiser(model, plan, Stream(2), Stream(3)) as privatiser:
        privatiser.gradients(torch.arange(0), lambda index: index.float())
        assert model.weight.grad is not None
        variance = float(model.weight.grad.double().square().mean())
    assert variance == pytest.approx((1.7 * 0.3 / 8) ** 2, rel=4 * math.sqrt(2 / 1e5))


@pytest.mark.parametrize("mode", ["book", "hooks", "loop"])
def test_the_deviation_is_that_of_the_sensitivity(mode: Mode) -> None:
    """One example more or less moves the sum by `sensitivity("add-remove")` at most, another in its place by that of
    "replace"; and two examples whose gradients are opposite and longer than the clip move it by just that much."""
    model, x = nn.Linear(3, 1, bias=False), torch.tensor([[4.0, 0, 0], [-4.0, 0, 0]])
    plan = Mechanism(0.5, 0.0, 0.3, 1.0, 1)
    made = SUMS[mode](model, dict(model.named_parameters()), plan)
    sensitivity = {adjacency: made.sensitivity(adjacency) for adjacency in ("add-remove", "replace")}
    made.close()
    assert sensitivity == {"add-remove": 0.3, "replace": 0.6}
    one, other, none = (
        private(model, lambda index: model(x[index])[:, 0], torch.tensor(index, dtype=torch.int64), plan, mode)[
            "weight"
        ]
        for index in ([0], [1], [])
    )
    assert float((one - none).norm()) == pytest.approx(sensitivity["add-remove"], rel=1e-5)
    assert float((one - other).norm()) == pytest.approx(sensitivity["replace"], rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.001, 1.0), st.integers(0, 400))
def test_a_poisson_sample_is_a_rising_subset(rate: float, n: int) -> None:
    index = poisson(n, rate, Stream(0))
    assert index.dtype == torch.int64
    assert torch.equal(index, torch.unique(index))
    assert not len(index) or 0 <= int(index.min()) <= int(index.max()) < n


def test_poisson_sizes_have_the_binomials_mean_and_variance() -> None:
    """2,000 samples of 300 at rate 0.1: mean 30 and variance 27, each within 4 of its own standard deviations."""
    generator = Stream(0)
    samples = [poisson(300, 0.1, generator) for _ in range(2000)]
    sizes = torch.tensor([float(len(s)) for s in samples], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(30, abs=4 * math.sqrt(27 / 2000))
    assert float(sizes.var()) == pytest.approx(27, rel=4 * math.sqrt(2 / 2000))
    taken = torch.bincount(torch.cat(samples), minlength=300).double()  # every sample alike
    assert float(((taken - 200) ** 2 / 180).sum()) == pytest.approx(300, abs=4 * math.sqrt(2 * 300))
    assert torch.equal(poisson(9, 1.0, generator), torch.arange(9))


def test_nothing_is_left_on_the_model() -> None:
    for family in ("lstm", "mlp", "two heads"):
        model, losses = case(family)
        names, modules = list(model.state_dict()), [(n, type(m)) for n, m in model.named_modules()]
        inplace = [m.inplace for m in model.modules() if hasattr(m, "inplace")]
        expected = losses(torch.arange(N)).tolist()
        private(model, losses, torch.arange(N), no_noise(1.0))
        assert list(model.state_dict()) == names
        assert [(n, type(m)) for n, m in model.named_modules()] == modules
        assert [m.inplace for m in model.modules() if hasattr(m, "inplace")] == inplace
        assert not any(hasattr(p, "grad_sample") for p in model.parameters())
        assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
        assert losses(torch.arange(N)).tolist() == expected


def test_an_exception_in_the_loss_leaves_the_next_step_right() -> None:
    model, losses = case("two heads")
    expected = private(model, losses, torch.arange(N), no_noise(0.5), "hooks")
    with Privatiser(model, no_noise(0.5), Stream(0), Stream(1), "hooks") as privatiser:

        def fails(index: Tensor) -> Tensor:
            losses(index)
            raise KeyError("a bad batch")

        with pytest.raises(KeyError):
            privatiser.gradients(torch.arange(3), fails)
        privatiser.gradients(torch.arange(N), losses)
        for name, p in model.named_parameters():
            assert p.grad is not None and torch.equal(p.grad, expected[name])


class Around(nn.Module):
    """Uses its layer's weight behind its back: hooks on the layer see only half of the gradient."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(6, 3), seen

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.linear(x, self.layer.weight) + (self.layer(x) if self.seen else 0)
        return out


def squares(model: nn.Module) -> Losses:
    """The squared length of its outputs for N fixed samples, in the dtype of its weights."""
    x = torch.randn(N, 6, generator=torch_generator(0, "squares")).to(next(model.parameters()).dtype)

    def losses(index: Tensor) -> Tensor:
        out: Tensor = model(x[index]).square().sum(1)
        return out

    return losses


@pytest.mark.parametrize("seen", [True, False])
def test_a_gradient_that_the_hooks_do_not_see_is_refused_and_the_loop_sees_it(seen: bool) -> None:
    with torch_seeded(0, "test"):
        model = Around(seen)
    losses = squares(model)
    for mode in ("book", "hooks"):
        with refused("task.model", "privacy.grad_sample"):
            private(model, losses, torch.arange(N), no_noise(1.0), mode)
    found = private(model, losses, torch.arange(N), no_noise(1.0), "loop")
    model.double()
    clipped_like(found, naive(model, squares(model), torch.arange(N)), 1.0)


@pytest.mark.parametrize("trainable", [True, False])
def test_batch_norm_in_train_mode_is_refused_frozen_or_not(trainable: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].requires_grad_(trainable)
    with refused("BatchNorm1d", 'task.norm = "group"'):
        private(model, lambda index: model(torch.randn(N, 6)[index]).sum(1), torch.arange(N), no_noise(1.0))
    assert not hasattr(model[0].weight, "grad_sample")
    if trainable:  # in eval() but learning: its statistics are constants, but Opacus has no gradient for it
        model[1].eval()
        with refused("task.model", 'task.norm = "group"'):
            private(model, lambda index: model(torch.randn(N, 6)[index]).sum(1), torch.arange(N), no_noise(1.0))
        assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


class Counts(nn.Module):
    """Keeps a running mean of what it sees, under a name that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean(0)
        out: Tensor = self.layer(x)
        return out


def test_a_buffer_that_follows_the_data_is_refused() -> None:
    model, x = Counts(), torch.randn(N, 6)
    with refused('"seen"'):
        private(model, lambda index: model(x[index]).sum(1), torch.arange(N), no_noise(1.0))


def test_what_cannot_be_done_is_refused_with_a_way_out() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert chosen_mode(tied) == "hooks"
    attention, losses = case("attention")
    with refused("MultiheadAttention", 'privacy.grad_sample = "loop"'):
        private(attention, losses, torch.arange(N), no_noise(1.0), "hooks")
    with refused():
        private(mlp().requires_grad_(False), lambda i: i, torch.arange(N), no_noise(1.0))
    model, losses = case("mlp")
    for wrong in (lambda i: losses(i).mean(), lambda i: losses(i)[:, None]):
        with refused(kind=TypeError):
            private(model, wrong, torch.arange(N), no_noise(1.0))


def test_a_recurrent_layer_that_has_the_samples_in_two_orders_is_refused() -> None:
    with torch_seeded(0, "test"):
        model, x = Packed(twice=True), torch.randint(1, 11, (N, 6))
    with refused("task.model"):
        private(model, lambda i: model(x[i]).square().sum(1), torch.arange(N), no_noise(1.0), "hooks")


def test_tied_parameters_are_summed_by_the_hooks() -> None:
    with torch_seeded(0, "test"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    found = private(model, squares(model), torch.arange(N), no_noise(0.7))
    model.double()
    clipped_like(found, naive(model, squares(model), torch.arange(N)), 0.7)


def test_the_mode_is_chosen_by_where_the_parameters_are() -> None:
    for covered in ("mlp", "cnn", "conv1d", "bag", "frozen trunk", "two heads", "odd", "again"):
        assert chosen_mode(case(covered)[0]) == "book"
    assert chosen_mode(nn.Sequential(nn.ConvTranspose2d(3, 8, 5), nn.Linear(10, 10))) == "hooks"
    assert chosen_mode(case("attention")[0]) == "loop"
    for family in ("lstm", "lora", "transposed", "attention"):
        assert chosen_mode(case(family)[0]) != "book"
        with refused('privacy.grad_sample = "auto"'):
            chosen_mode(case(family)[0], "book")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.0, 1.0, 1.0, 1.0, 1), "sample_rate=0.0"),
        ((1.1, 1.0, 1.0, 1.0, 1), "sample_rate=1.1"),
        ((0.5, -1.0, 1.0, 1.0, 1), "noise_multiplier=-1.0"),
        ((0.5, math.nan, 1.0, 1.0, 1), "noise_multiplier=nan"),
        ((0.5, 1.0, 0.0, 1.0, 1), "clip=0.0"),
        ((0.5, 1.0, math.inf, 1.0, 1), "clip=inf"),
        ((0.5, 1.0, 1.0, 0.0, 1), "denominator=0.0"),
        ((0.5, 1.0, 1.0, 1.0, 0), "steps=0"),
    ],
)
def test_a_mechanism_out_of_range_is_named(values: tuple[float, float, float, float, int], words: str) -> None:
    with refused(words, kind=ValueError):
        Mechanism(*values)
