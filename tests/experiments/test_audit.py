"""`meadow audit`: an honest mechanism passes, each sabotage is found, and the statistics are the published ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from typer.testing import CliRunner

import meadow.client.loop.objective
import meadow.client.node
import meadow.client.release
import meadow.privacy.client_level
import meadow.privacy.dpsgd.step
import meadow.privacy.ledger
import meadow.server.client_level
from helpers.refusals import refused
from helpers.runs import small
from meadow.experiments.audit import audit
from meadow.experiments.command import app
from meadow.privacy.accounting import epsilon
from meadow.privacy.dpsgd.choose import SUMS, Mode
from meadow.privacy.dpsgd.mechanism import ClippedSum, gaussian, poisson
from meadow.privacy.dpsgd.step import Privatiser
from meadow.privacy.ledger import Ledger
from meadow.privacy.noise import Stream
from meadow.privacy.statistics import Check, noise_check, one_run_bound, sampling_checks
from meadow.runtime.errors import UserError
from meadow.tasks.losses import sample_losses

EXAMPLE = (
    "privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.sample_rate=0.1", "local.steps=10",
    "privacy.accountant=rdp", "run.rounds=10",
)  # fmt: skip
CLIENT = (
    "privacy.unit=client", "privacy.noise_multiplier=1.0", "cohort.sampling=poisson", "cohort.fraction=0.2",
    "privacy.accountant=rdp", "run.rounds=40",
)  # fmt: skip
LOCAL = ("privacy.unit=local", "privacy.noise_multiplier=2.0", "privacy.accountant=rdp", "privacy.clip=0.1")


def found(*settings: str, preset: str = "fedper") -> set[str]:
    """The names of the checks that do not hold."""
    return {check.name for check in audit(small(preset, *settings)) if not check.holds}


@pytest.mark.parametrize("settings", [EXAMPLE, CLIENT, LOCAL], ids=["example", "client", "local"])
def test_an_honest_mechanism_passes(settings: tuple[str, ...]) -> None:
    checks = audit(small("fedper", *settings))
    assert [check for check in checks if not check.holds] == []
    assert {"a repeated round", "epsilon in the summary", "epsilon is at least (Steinke 2023)"} <= {
        c.name for c in checks
    }


@pytest.mark.parametrize(
    "settings",
    [
        (*EXAMPLE, "strategy.name=scaffold", "local.momentum=0", "cohort.fraction=0.5"),
        (*EXAMPLE, "strategy.name=ditto", "local.trainable=last:1", "privacy.epsilon=2", "privacy.noise_multiplier=0"),
        (*EXAMPLE, "run.placement=pooled", "task.model=cnn"),
        (*CLIENT, "evaluate.unseen=0.2", "partition.clients=30"),
        (*CLIENT, "cohort.sampling=fixed", "partition.clients=30"),
        (*CLIENT, "partition.clients=40", "privacy.adaptive_clip=true", "privacy.clip_count_noise=1.6"),
    ],
    ids=["scaffold", "ditto", "pooled", "unseen", "fixed cohorts", "adaptive clip"],
)
def test_what_else_there_is_passes_too(settings: tuple[str, ...]) -> None:
    assert found(*settings, preset="fedavg") == set()


@pytest.mark.parametrize(("trainable", "mode"), [("head", "book"), ("all", "hooks")])
def test_it_measures_in_the_mode_that_the_run_trains_in(
    trainable: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set[str]()

    class Seen(dict[Mode, type[ClippedSum]]):
        def __getitem__(self, mode: Mode) -> type[ClippedSum]:
            seen.add(mode)
            return super().__getitem__(mode)

    monkeypatch.setattr(meadow.privacy.dpsgd.step, "SUMS", Seen(SUMS))
    settings = (*EXAMPLE, "task.model=helpers.objects:rows", f"local.trainable={trainable}", "partition.clients=2")
    assert found(*settings, preset="fedavg") == set()
    assert seen == {mode}


def scaled(factor: float) -> Callable[..., Any]:
    honest = gaussian

    def weaker(out: Tensor, deviation: float, stream: Stream) -> None:
        honest(out, deviation * factor, stream)

    return weaker


@pytest.mark.parametrize("factor", [0.5, 0.8, 0.97])
def test_too_little_noise_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meadow.privacy.dpsgd.step, "gaussian", scaled(factor))
    assert "noise multiplier, by canaries out" in found(*EXAMPLE)


def test_shuffling_sold_as_poisson_sampling_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of an epoch that is cut from a permutation: each record once an epoch, every batch of one size."""
    state: dict[int, list[Tensor]] = {}

    def shuffled(n: int, rate: float, stream: Stream) -> Tensor:
        if rate < 1e-9:  # the audit's own steps that take nobody
            return torch.zeros(0, dtype=torch.int64)
        left = state.setdefault(id(stream), [])
        if not left:
            left += stream.uniform(n).argsort().tensor_split(max(1, round(1 / rate)))
        return left.pop().sort().values

    monkeypatch.setattr(meadow.privacy.dpsgd.step, "poisson", shuffled)
    assert {"variance of batch sizes", "variance of a record's times"} <= found(*EXAMPLE)


def test_a_higher_sampling_rate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        meadow.privacy.dpsgd.step, "poisson", lambda n, rate, stream: poisson(n, min(1, 1.25 * rate), stream)
    )
    assert "sampling rate" in found(*EXAMPLE)


def test_no_clip_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClippedSum, "_factors", lambda self, norms: np.ones_like(norms))
    assert {"longest part of a canary", "mean of canaries in", "largest effect of one record"} <= found(*EXAMPLE)


def test_a_loss_that_is_coupled_over_the_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sample_losses

    def by_its_size(*args: Any) -> dict[str, Tensor]:
        """One record more turns the sign of every loss."""
        return {name: values if len(values) % 2 else -values for name, values in honest(*args).items()}

    def by_its_mean(*args: Any) -> dict[str, Tensor]:
        each = honest(*args)
        # Every gradient turns round when the number of samples changes by one: longer ones would not survive the clip.
        sign = 5 if len(next(iter(args[1].values()))) % 2 else -5
        return {name: values * (sign + values.detach().mean() - values.mean()) for name, values in each.items()}

    monkeypatch.setattr(meadow.client.loop.objective, "sample_losses", by_its_size)
    assert "largest effect of one record" in found(*EXAMPLE, "privacy.clip=0.5", "privacy.grad_sample=hooks")
    monkeypatch.setattr(meadow.client.loop.objective, "sample_losses", by_its_mean)
    # Book-keeping sees it as it trains.
    with refused("task.model"):
        found(*EXAMPLE, "privacy.clip=0.5")


def test_a_ledger_that_drops_an_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Ledger.charge

    def forgetful(self: Ledger, release: Any, budget: Any, mark: Any) -> Any:
        before = self.path.read_bytes() if self.path.exists() else b""
        charged = honest(self, release, budget, mark)
        if release.round == 3:
            self.path.write_bytes(before)
        return charged

    monkeypatch.setattr(Ledger, "charge", forgetful)
    assert "entries of the ledgers" in found(*EXAMPLE)


@pytest.mark.parametrize("settings", [EXAMPLE, LOCAL, CLIENT], ids=["example", "local", "client"])
def test_fresh_noise_in_a_replayed_round_is_found(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = iter(range(10**6))
    monkeypatch.setattr(meadow.client.release, "noise_seed", lambda *_: next(fresh))
    monkeypatch.setattr(meadow.server.client_level, "noise_seed", lambda *_: next(fresh))
    assert found(*settings) == {"a repeated round"}


def test_an_account_that_begins_anew_each_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meadow.privacy.ledger, "_history", lambda entries, unit: ())
    assert found(*EXAMPLE) == {"epsilon in the summary"}


def test_a_personal_head_without_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways: its noise left out of the private step, and a pass over the head alone before it."""
    noisy, heads = Privatiser._noisy, {"heads.digit.weight", "heads.digit.bias"}

    def silent(self: Privatiser) -> dict[str, Tensor]:
        before, shares = self._drawn, noisy(self)
        for name in () if before else heads & shares.keys():
            shares[name].zero_()
        return shares

    with monkeypatch.context() as patch:
        patch.setattr(Privatiser, "_noisy", silent)
        assert {f"noise on {name}" for name in heads} <= found(*EXAMPLE)

    from meadow.strategies.protocol import ClientAlgorithm

    half = ClientAlgorithm.train

    def twice(self: ClientAlgorithm, context: Any) -> Any:
        context.fit(learns=lambda name: "heads" in name, leaves=False)
        return half(self, context)

    monkeypatch.setattr(ClientAlgorithm, "train", twice)
    assert found(*EXAMPLE) >= {"arrays trained without noise", "entries of the ledgers"}


def test_batch_norm_in_train_mode_is_refused() -> None:
    with refused('"trunk.2"', 'task.norm = "group"'):
        audit(small("fedavg", *EXAMPLE, "task.model=helpers.worlds:normed"))


def test_sabotage_of_whole_clients_and_of_local_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    combine, clip, noised = (
        meadow.privacy.client_level.combine,
        meadow.privacy.client_level.clip,
        meadow.privacy.client_level.noised,
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            meadow.server.client_level, "combine", lambda s, u, bound, z, d, g: combine(s, u, bound, 0.8 * z, d, g)
        )
        assert "noise multiplier, by canaries out" in found(*CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(meadow.server.client_level, "clip", lambda sent, trained, bound: clip(sent, trained, 2 * bound))
        with pytest.raises(ValueError, match="norm <= clip"):  # the sum itself refuses what is longer
            found(*CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(meadow.client.release, "noised", lambda u, bound, z, g: noised(u, bound, 0.9 * z, g))
        assert "noise multiplier" in found(*LOCAL)
    with monkeypatch.context() as patch:
        patch.setattr(meadow.client.release, "clip", lambda sent, trained, bound: clip(sent, trained, 3 * bound))
        assert found(*LOCAL) == {"longest update"}


def test_the_command_exits_3_where_the_claim_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["audit", "fedavg", *EXAMPLE, "partition.clients=4", "--json"]
    honest = CliRunner().invoke(app, given)
    assert honest.exit_code == 0 and json.loads(honest.stdout)["holds"]
    monkeypatch.setattr(meadow.privacy.dpsgd.step, "gaussian", scaled(0.5))
    wrong = CliRunner().invoke(app, given)
    assert wrong.exit_code == 3 and not json.loads(wrong.stdout)["holds"]
    assert CliRunner().invoke(app, given[:-1]).exit_code == 3
    with pytest.raises(UserError, match=r"privacy\.unit = .none."):
        audit(small("fedavg"))


# ---- the statistics ----


def test_a_bound_of_no_abstention_and_delta_0_is_clopper_and_pearsons() -> None:
    """With delta = 0 theorem 5.2 is a binomial tail: epsilon is the logit of the lower bound on the accuracy."""
    for guesses, correct in ((100, 90), (300, 200), (50, 50)):
        low = float(stats.beta.ppf(0.05, correct, guesses - correct + 1))
        assert one_run_bound(guesses, guesses, correct, 0.0) == pytest.approx(math.log(low / (1 - low)), abs=2e-4)
    assert one_run_bound(100, 100, 50, 1e-5) == 0
    assert one_run_bound(1000, 600, 500, 1e-5) < one_run_bound(1000, 600, 500, 0.0)


def test_bounds_stay_below_the_truth_of_a_gaussian_and_come_near_it() -> None:
    """1,000 canaries of sensitivity 1 under a Gaussian of deviation 0.4, of which epsilon is known."""
    from meadow.privacy.statistics import bound_checks

    generator = np.random.Generator(np.random.Philox(1))
    truth = epsilon([(1.0, 0.4, 1)], 1e-5)
    for _ in range(5):
        included = generator.random(1000) < 0.5
        scores = included + generator.normal(0, 0.4, 1000)
        checks = bound_checks(scores, included, truth, 1e-5)
        assert all(check.holds and 2.0 < float(check.measured) < truth for check in checks)


def rejected(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.holds}


def test_sampling_is_told_from_what_only_looks_like_it() -> None:
    generator = np.random.Generator(np.random.Philox(2))
    for _ in range(20):
        assert rejected(sampling_checks(generator.random((200, 500)) < 0.05, 0.05)) == set()
    shuffled = np.zeros((200, 500), dtype=bool)
    for epoch in range(10):
        for step, batch in enumerate(np.array_split(generator.permutation(500), 20)):
            shuffled[20 * epoch + step, batch] = True
    assert rejected(sampling_checks(shuffled, 0.05)) == {"variance of batch sizes", "variance of a record's times"}
    fixed = np.zeros((200, 500), dtype=bool)
    for row in fixed:
        row[generator.choice(500, 25, replace=False)] = True
    assert rejected(sampling_checks(fixed, 0.05)) == {"variance of batch sizes"}
    assert rejected(sampling_checks(generator.random((200, 500)) < 0.06, 0.05)) >= {"sampling rate"}


def test_more_noise_than_is_claimed_is_no_fault_and_none_at_all_is() -> None:
    values = np.random.Generator(np.random.Philox(3)).normal(0, 1, 5000)
    assert noise_check("", values, 1.0).holds and noise_check("", 2 * values, 1.0).holds
    assert not noise_check("", values, 1.1).holds and not noise_check("", 0 * values, 1.0).holds


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    audit(small("fedavg", *LOCAL, "run.rounds=1"))
    assert list(tmp_path.iterdir()) == []
