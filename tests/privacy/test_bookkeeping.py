"""Book-keeping: the norm of each sample's gradient against a loop over samples, and what it must refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.refusals import refused
from meadow.privacy.dpsgd import layers
from meadow.privacy.dpsgd.book import Book, covers
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_seeded

N = 6


def tall() -> nn.Module:
    """More numbers than places: ghost norms everywhere."""
    return nn.Sequential(
        nn.Conv2d(5, 9, 3), nn.ReLU(), nn.Conv2d(9, 11, 2, padding=1), nn.Flatten(2), nn.Linear(9, 14), nn.Flatten()
    )


def flat() -> nn.Module:
    """More places than numbers: every sample's gradient is made."""
    return nn.Sequential(nn.Conv2d(5, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 2, groups=1), nn.Flatten(2), nn.Linear(9, 2))


def one_dimension() -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 8, 3, stride=2, bias=False), nn.Flatten(1), nn.Linear(8, 4))


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tall": (tall, (5, 4, 4)),
    "flat": (flat, (5, 4, 4)),
    "one dimension": (one_dimension, (5, 4)),
}


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3, padding_idx=2), nn.LayerNorm(3), nn.Flatten(), nn.Linear(15, 2))


@pytest.mark.parametrize("at_once", [2**22, 100])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [*SHAPES, "tokens"])
def test_norms_and_weighted_sums_are_those_of_a_loop(
    kind: str, layout: torch.memory_format, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double, so that 1e-12 tells a right formula from one that is nearly right."""
    monkeypatch.setattr(layers, "AT_ONCE", at_once)
    with torch_seeded(0, "test", kind):
        model = (tokens if kind == "tokens" else SHAPES[kind][0])().double()
        x = torch.randint(0, 7, (N, 5)) if kind == "tokens" else torch.randn(N, *SHAPES[kind][1]).double()
        factors = torch.rand(N).double()
    if x.ndim == 4:
        model, x = model.to(memory_format=layout), x.to(memory_format=layout)  # type: ignore[call-overload]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    norms = []
    for one, factor in zip(x, factors, strict=True):
        gradients = torch.autograd.grad(model(one[None]).square().sum(), list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += factor * gradient
    assert covers(model)
    book = Book(model)
    for _ in range(2):  # as the second step of a round, too
        found = {name: torch.ones(p.shape).double() for name, p in model.named_parameters()}
        torch.testing.assert_close(
            book.norms(model(x).square().flatten(1).sum(1)), torch.stack(norms), rtol=1e-12, atol=0
        )
        book.add(factors, found)
        book.forget()
        for name, total in expected.items():
            torch.testing.assert_close(found[name], 1 + total, rtol=1e-11, atol=1e-11)
    book.close()
    assert not any(module._forward_hooks for module in model.modules())


class SecondDimension(nn.Module):
    """Keeps its samples in the second dimension, as a recurrent layer's default is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.transpose(0, 1)).sum((0, 2))
        return out


class Centred(nn.Module):
    """Takes the mean over the batch away: batch normalisation under a name that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out: Tensor = self.head((h - h.mean(0)).square())[:, 0]
        return out


class InPlace(nn.Module):
    """Changes a layer's input after its use; autograd does not notice, as no weight's gradient is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).sin()
        out: Tensor = self.head(h)[:, 0]
        h.detach().mul_(2)
        return out


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (SecondDimension(), (N, 5, 4), "5 rows of a batch of 6"),
        (SecondDimension(), (N, N, 4), "depends on the other samples"),
        (Centred(), (N, 4), "depends on the other samples"),
        (InPlace(), (N, 4), "changed in place"),
    ],
)
def test_what_is_no_samples_own_is_refused(model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    book = Book(model)
    with torch_seeded(0, "test"):
        x = torch.randn(shape)
    with pytest.raises(UserError, match=words):
        book.norms(model(x))


def test_a_layer_whose_use_leads_nowhere_does_not_cover_up_another_use() -> None:
    layer = nn.Linear(4, 1)
    book = Book(layer)
    x = torch.randn(N, 4)
    layer(x)
    with refused("task.model", "privacy.grad_sample"):
        book.norms(torch.nn.functional.linear(x, layer.weight)[:, 0])


def test_what_is_not_covered() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight

    class Mine(nn.Linear):
        pass

    for model in (
        tied,
        Mine(2, 2),
        nn.LSTM(2, 2),
        nn.ConvTranspose2d(1, 1, 1),
        nn.Embedding(3, 2, max_norm=1.0),
        nn.Embedding(3, 2, scale_grad_by_freq=True),
        nn.MultiheadAttention(4, 2),
        nn.BatchNorm1d(3),
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ):
        assert not covers(model), model
        assert covers(nn.Sequential(model.requires_grad_(False), nn.Linear(2, 2)))
