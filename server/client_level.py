"""Client-level DP at the server, which alone sees the updates: it clips each one, adds the noise once, counts the rounds."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from meadow.server.protection import Protection
from meadow.strategies.protocol import ClientUpdate, ServerAlgorithm, State

from meadow.arrays.files import read_json, write_json
from meadow.arrays.named import Arrays, Kinds, arrays_sha256
from meadow.config.schema import Experiment
from meadow.privacy import plan
from meadow.privacy.client_level import (
    AdaptiveClip,
    Clipped,
    clip,
    combine,
    next_clip,
    refuse_small_cohort,
    update_noise,
)
from meadow.privacy.ledger import noise_seed, secret, simulated_secret
from meadow.runtime.errors import RunStopped

_MADE = "releases.json"
"""In the run's folder: `ClientLevel.made`."""

_SERVER = -1
"""In the place of a client's number: the server's own secret."""


class ClientLevel(Protection):
    """Clip, noise and the count of rounds.

    bound: the clip of the next round. round: the round in hand. made: of each combined model the hash of what it was made
    of; one more is a release more, in whichever round. noise_multiplier: z, of updates and count together. learned: the
    shared arrays that learn; the others stay as they were sent.
    """

    lasting = needs_no_reply = True

    def __init__(self, experiment: Experiment, learned: Sequence[str], noise_multiplier: float) -> None:
        super().__init__(experiment)
        self.learned, self.noise_multiplier = tuple(learned), noise_multiplier
        self.bound, self.made = experiment.privacy.clip, list[str]()
        self.round, self._secret, self._simulated = 0, b"", True
        self._folder: Path | None = None

    def begin(self, simulated: bool, folder: Path | None) -> None:
        """Get what noise derives from, and what was released before a crash."""
        own = simulated_secret(self.experiment.run.seed, _SERVER) if simulated or folder is None else secret(folder)
        self._secret, self._simulated, self._folder = own, simulated, folder
        if not simulated:
            self.cohort_secret = noise_seed(own, "cohorts", "cohort")
        if folder is not None and (folder / _MADE).exists():
            self.made = [str(inputs) for inputs in read_json(folder / _MADE)]

    def algorithm(self, server: ServerAlgorithm[Any]) -> ServerAlgorithm[Any]:
        return NoisedMean(self, server)

    def require(self, round_: int) -> None:
        self.round = round_
        self._afford(round_, max(round_, len(self.made)))

    def quorum(self, asked: int, left: int) -> int:
        """None at all of a Poisson cohort, whose size is private."""
        return 0 if self.experiment.cohort.sampling == "poisson" else min(self.experiment.cohort.quorum, asked - left)

    def combine(self, sent: Arrays, updates: Sequence[Arrays], round_: int) -> Arrays:
        """The next model out of what the clients sent, in their order; none at all moves it by noise alone.

        What does not learn stays as it was sent. Moves the clip of the next round, if that is adaptive. The noise is a
        function of the secret and of all that it is added to: a round that is made again with other replies has other
        noise, and is charged as another one, on disk before its noise is drawn. Raises RunStopped if that is too much.
        """
        privacy, experiment = self.experiment.privacy, self.experiment
        before = {name: sent[name] for name in self.learned}
        clipped = [self._clipped(before, update) for update in updates]
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
        self.made += [str(inputs) for inputs in state["made"] if inputs not in self.made]

    def summary(self) -> dict[str, Any]:
        return self._claim(bool(self._secret) and not self._simulated, 0)

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

    def _clipped(self, before: Arrays, update: Arrays) -> Clipped:
        return clip(before, {name: value for name, value in update.items() if name in before}, self.bound)

    def _generator(self, inputs: str, purpose: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(noise_seed(self._secret, inputs, purpose)))


class NoisedMean(ServerAlgorithm[Sequence[ClientUpdate]]):
    """Client-level DP in the place of an algorithm whose step is a mean of what clients send."""

    sums_only = False

    def __init__(self, protection: ClientLevel, server: ServerAlgorithm[Any]) -> None:
        super().__init__(server.setup)
        self._protection, self._server = protection, server

    def init(self, model: Arrays) -> State:
        return self._server.init(model)

    def auxiliary(self, state: State, model: Arrays) -> Kinds:
        return self._server.auxiliary(state, model)

    def judge(self, metrics: Mapping[str, Any], size: int) -> str:
        return self._server.judge(metrics, size)

    def update(self, state: State, total: Sequence[ClientUpdate], model: Arrays) -> tuple[Arrays, State]:
        return self._protection.combine(model, [update.arrays for update in total], self._protection.round), state


def client_level(experiment: Experiment, learned: Sequence[str]) -> ClientLevel:
    """Client-level DP with the noise that `[privacy]` asks for. Raises UserError if it cannot be."""
    noise = plan.client_noise(experiment)
    if experiment.privacy.adaptive_clip:
        refuse_small_cohort(plan.client_denominator(experiment), adaptive(experiment))
        update_noise(noise, adaptive(experiment).count_noise)
    return ClientLevel(experiment, learned, noise)


def adaptive(experiment: Experiment) -> AdaptiveClip:
    """The adaptive clip of `[privacy]`; its count's noise is a twentieth of the denominator unless it is set."""
    privacy = experiment.privacy
    count_noise = privacy.clip_count_noise or plan.client_denominator(experiment) / 20
    return AdaptiveClip(privacy.clip, privacy.clip_quantile, privacy.clip_rate, count_noise)
