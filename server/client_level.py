"""Client-level DP at the server: it clips each update, adds noise once to their sum, and accounts for each release."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meadow.arrays.files import DamagedFile, read_json, write_json
from meadow.arrays.named import Arrays, arrays_sha256
from meadow.config.schema import Experiment
from meadow.privacy import plan
from meadow.privacy.client_level import (
    AdaptiveClip,
    clip,
    combine,
    next_clip,
    refuse_small_cohort,
    update_noise,
)
from meadow.privacy.ledger import noise_seed, secret, simulated_secret
from meadow.runtime.errors import RunStopped
from meadow.server.protection import Protection
from meadow.strategies.stages import Stage
from meadow.strategies.stages.builtin import BuiltIn

_MADE = "releases.json"
"""File in the run folder: `ClientLevel.made`."""

_SERVER = -1
"""Stands for the server where a simulated secret is derived from a client's number."""


class ClientLevel(Protection):
    """Clipping, noise and accounting of releases.

    bound: the clipping bound of the next round. made: for each combined model, the hash of its
    inputs; each entry is one release, in whichever round. noise_multiplier: z, for updates and the clip's count together.
    learned: names of the shared arrays that learn; the others keep the values that were sent.
    """

    sync_each_round = True

    def __init__(self, experiment: Experiment, learned: Sequence[str], noise_multiplier: float) -> None:
        super().__init__(experiment)
        self.learned, self.noise_multiplier = tuple(learned), noise_multiplier
        self.bound, self.made = experiment.privacy.clip, list[str]()
        self.stages = (ClipAndNoise(self),)
        self._secret, self._simulated = b"", True
        self._folder: Path | None = None

    def begin(self, simulated: bool, folder: Path | None) -> None:
        """Get the secret from which noise derives, and the releases made before a crash."""
        own = simulated_secret(self.experiment.run.seed, _SERVER) if simulated or folder is None else secret(folder)
        self._secret, self._simulated, self._folder = own, simulated, folder
        if not simulated:
            self.cohort_secret = noise_seed(own, "cohorts", "cohort")
        if folder is not None and (folder / _MADE).exists():
            self.made = [str(inputs) for inputs in read_json(folder / _MADE, list)]

    def require(self, round_: int) -> None:
        self._afford(round_, max(round_, len(self.made)))

    def quorum(self, asked: int, withdrawn: int) -> int:
        """0 for a Poisson cohort, whose size is private."""
        cohort = self.experiment.cohort
        return 0 if cohort.sampling == "poisson" else min(cohort.quorum, asked - withdrawn)

    def combine(self, sent: Arrays, updates: Sequence[Arrays], round_: int) -> Arrays:
        """The next model from the clients' updates, in their order. Without updates the model moves by noise alone.

        Arrays that do not learn keep the values that were sent. An adaptive clip moves for the next round. The noise is a
        function of the secret and of everything it is added to: a round repeated with other replies gets other noise and
        is charged as another release, on disk before its noise is drawn. Raises RunStopped if the budget does not allow it.
        """
        privacy, experiment = self.experiment.privacy, self.experiment
        before = {name: sent[name] for name in self.learned}
        learned = [{name: value for name, value in update.items() if name in before} for update in updates]
        clipped = [clip(before, update, self.bound) for update in learned]
        facts = [str(round_), repr(self.bound), arrays_sha256(before), *(arrays_sha256(c.update) for c in clipped)]
        inputs = hashlib.sha256(" ".join(facts).encode()).hexdigest()
        self._charge(inputs, round_)
        denominator, noise = plan.client_denominator(experiment), self.noise_multiplier
        if privacy.adaptive_clip:
            noise = update_noise(noise, adaptive(experiment).count_noise)
        moves = [c.update for c in clipped]
        moved = combine(before, moves, self.bound, noise, denominator, self._generator(inputs, "noise"))
        if privacy.adaptive_clip:
            bits = [c.within for c in clipped]
            generator = self._generator(inputs, "count")
            self.bound = next_clip(self.bound, bits, adaptive(experiment), denominator, generator)
        return {name: moved.get(name, value) for name, value in sent.items()}

    def epsilon(self) -> dict[str, float | None]:
        spent = self._spent() if self.made else None
        return {"max": spent, "median": spent}

    def epsilons(self) -> dict[int, float]:
        return dict.fromkeys(range(self.experiment.partition.clients), self._spent()) if self.made else {}

    def state(self) -> dict[str, Any]:
        return {"bound": self.bound, "made": list(self.made)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.bound = float(state["bound"])
        known = [str(inputs) for inputs in state["made"] if inputs not in self.made]
        if known and self._folder is not None:  # each was on disk before its checkpoint
            raise DamagedFile(
                f"{self._folder / _MADE}: {len(known)} releases that the checkpoint knows are missing or altered; restore "
                "the file and continue with --resume, or start a new run"
            )
        self.made += known

    def summary(self, stages: Iterable[Stage]) -> dict[str, Any]:
        return self._claim(stages, bool(self._secret) and not self._simulated, 0)

    def _spent(self) -> float:
        return plan.client_cost(self.experiment, self.noise_multiplier, len(self.made)).epsilon

    def _charge(self, inputs: str, round_: int) -> None:
        if inputs in self.made:
            return
        self._afford(round_, len(self.made) + 1)
        self.made.append(inputs)
        if self._folder is not None:
            write_json(self._folder / _MADE, self.made)

    def _afford(self, round_: int, releases_: int) -> None:
        budget = self.experiment.privacy.epsilon or float("inf")
        cost = plan.client_cost(self.experiment, self.noise_multiplier, releases_)
        if cost.epsilon > budget:
            raise RunStopped(
                f"round {round_}: the privacy budget of every client is spent: with this round, {cost}, "
                f"and privacy.epsilon = {budget:g}"
            )

    def _generator(self, inputs: str, purpose: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(noise_seed(self._secret, inputs, purpose)))


class ClipAndNoise(BuiltIn):
    """The stage that computes the next model by `ClientLevel.combine`."""

    name = "clip-and-noise"

    def __init__(self, protection: ClientLevel) -> None:
        self._protection = protection

    def combine(self, sent: Arrays, updates: Sequence[Arrays], round_: int) -> Arrays:
        return self._protection.combine(sent, updates, round_)


def client_level(experiment: Experiment, learned: Sequence[str]) -> ClientLevel:
    """Client-level DP with the noise that `[privacy]` asks for. Raises UserError if that is impossible."""
    noise = plan.client_noise(experiment)
    if experiment.privacy.adaptive_clip:
        refuse_small_cohort(plan.client_denominator(experiment), adaptive(experiment))
        update_noise(noise, adaptive(experiment).count_noise)
    return ClientLevel(experiment, learned, noise)


def adaptive(experiment: Experiment) -> AdaptiveClip:
    """The adaptive clip of `[privacy]`. The default noise of its count is a twentieth of the denominator."""
    privacy = experiment.privacy
    count_noise = privacy.clip_count_noise or plan.client_denominator(experiment) / 20
    return AdaptiveClip(privacy.clip, privacy.clip_quantile, privacy.clip_rate, count_noise)
