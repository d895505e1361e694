"""What the server does for privacy in a run: accounts of the clients' ledgers, and under client-level DP clip and noise.

Example-level and local DP are the clients' own affair; the server keeps what they say of their ledgers. Client-level DP is
the server's: it alone sees the updates, clips each one, adds the noise once, and counts the rounds.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict
from meadow.server.accounts import Account, account_of, over_accounts, remind, require_budget
from meadow.strategies import algorithm
from meadow.strategies.protocol import Roles
from meadow.strategies.wire.packing import Answer, Request
from torch import nn

from meadow.arrays.files import read_json, write_json
from meadow.arrays.flower import from_record
from meadow.arrays.named import Arrays, arrays_sha256
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
from meadow.privacy.dpsgd import chosen_mode, refuse_what_mixes_samples
from meadow.privacy.ledger import noise_seed, secret, simulated_secret
from meadow.privacy.releases import releases
from meadow.runtime.errors import RunStopped, UserError
from meadow.tasks.task import Task

_MADE = "releases.json"
"""In the run's folder: `Protection.made`."""

_SERVER = -1
"""In the place of a client's number: the server's own secret."""


@dataclass
class Protection:
    """The privacy of one run, as the server has it. `accounts`, `bound` and `made` change from round to round.

    bound: the clip of the next round. made: of each combined model with client-level DP the hash of what it was made of; one
    more is a release more, in whichever round. noise_multiplier: z of client-level DP, of updates and count together.
    secret: what client-level noise and cohorts derive from.
    """

    experiment: Experiment
    learned: tuple[str, ...]
    accounts: dict[int, Account] = field(default_factory=dict)
    bound: float = 0.0
    made: list[str] = field(default_factory=list)
    noise_multiplier: float = 0.0
    secret: bytes = b""
    simulated: bool = True
    folder: Path | None = None

    def begin(self, simulated: bool, folder: Path | None) -> None:
        """Before the first round, once it is known whether all nodes are simulated: get what noise derives from, and what
        was released before a crash. `folder`: the run's; None: what is made is not kept."""
        if self.experiment.privacy.unit == "client":
            own = simulated_secret(self.experiment.run.seed, _SERVER) if simulated or folder is None else secret(folder)
            self.secret, self.simulated, self.folder = own, simulated, folder
            if folder is not None and (folder / _MADE).exists():
                self.made = [str(inputs) for inputs in read_json(folder / _MADE)]

    def require(self, round_: int) -> None:
        """Raise RunStopped if client-level DP has no budget left for the round."""
        experiment = self.experiment
        if experiment.privacy.unit != "client":
            return
        self._afford(round_, max(round_, len(self.made)))

    @property
    def cohort_secret(self) -> int | None:
        """What cohorts are drawn from in the place of the seed, where nobody may foretell them."""
        return noise_seed(self.secret, "cohorts", "cohort") if self.secret and not self.simulated else None

    @property
    def left(self) -> set[int]:
        """The clients whose budget is spent."""
        return {client for client, account in self.accounts.items() if account.exhausted}

    def remind(self, requests: Sequence[Request]) -> list[Request]:
        """The requests, each with what its client last said of its ledger."""
        return remind(requests, self.accounts)

    def read(self, replies: Iterable[Answer], round_: int) -> list[int]:
        """Take in what the replies say of the ledgers; return who has left with this round, ascending.

        Raises RunStopped if the run is to stop then, or nobody is left.
        """
        left = []
        for reply in replies:
            client = reply.client
            if (account := account_of(reply, self.accounts.get(client))) is not None:
                self.accounts[client] = account
                left += [client] if account.exhausted else []
        require_budget(self.experiment, self.accounts, round_)
        return sorted(left)

    def combine(self, sent: Arrays, admitted: Sequence[Answer], round_: int) -> Arrays:
        """Client-level DP: the next model out of the clients' replies, in their order; none at all moves it by noise alone.

        What does not learn stays as it was sent. Moves the clip of the next round, if that is adaptive. The noise is a
        function of the secret and of all that it is added to: a round that is made again with other replies has other
        noise, and is charged as another one, on disk before its noise is drawn. Raises RunStopped if that is too much.
        """
        privacy, experiment = self.experiment.privacy, self.experiment
        before = {name: sent[name] for name in self.learned}
        clipped = [self._clipped(before, answer.content) for answer in admitted if answer.content is not None]
        facts = [str(round_), repr(self.bound), arrays_sha256(before), *(arrays_sha256(c.update) for c in clipped)]
        inputs = hashlib.sha256(" ".join(facts).encode()).hexdigest()
        self._charge(inputs, round_)
        denominator, noise = plan.client_denominator(experiment), self.noise_multiplier
        if privacy.adaptive_clip:
            noise = update_noise(noise, adaptive(experiment).count_noise)
        updates = [c.update for c in clipped]
        moved = combine(before, updates, self.bound, noise, denominator, self._generator(inputs, "noise"))
        if privacy.adaptive_clip:
            bits = [c.within for c in clipped]
            generator = self._generator(inputs, "count")
            self.bound = next_clip(self.bound, bits, adaptive(experiment), denominator, generator)
        return {name: moved.get(name, value) for name, value in sent.items()}

    def epsilon(self) -> dict[str, float | None]:
        """The largest and the median epsilon over the clients; None if nothing was released."""
        if self.experiment.privacy.unit != "client":
            return over_accounts(self.accounts)
        spent = self._client_epsilon() if self.made else None
        return {"max": spent, "median": spent}

    def epsilons(self) -> dict[int, float]:
        """Each client's epsilon, of those that have released anything."""
        everyone = range(self.experiment.partition.clients)
        if self.experiment.privacy.unit == "client":
            return dict.fromkeys(everyone, self._client_epsilon()) if self.made else {}
        if self.experiment.run.placement == "pooled":
            return {client: account.epsilon for client in everyone for account in self.accounts.values()}
        return {client: account.epsilon for client, account in self.accounts.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        accounts = {str(client): asdict(account) for client, account in sorted(self.accounts.items())}
        return {"accounts": accounts, "bound": self.bound, "made": self.made}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.accounts = {int(client): Account(**account) for client, account in state["accounts"].items()}
        self.bound = float(state["bound"])
        self.made += [str(inputs) for inputs in state["made"] if inputs not in self.made]

    def summary(self) -> dict[str, Any]:
        """What was protected, how well by which account, and what left: the summary's "privacy"."""
        privacy, spent = self.experiment.privacy, self.epsilon()
        sends = algorithm(self.experiment.strategy.name).sends.values()
        left = [quantity.as_json() for quantity in releases(self.experiment, sends)]
        if privacy.unit == "none":
            return {"unit": "none", "delta": None, "accountant": None, "epsilon": spent, "releases": left}
        claim = plan.claim(self.experiment, spent["max"] or 0.0)
        secret = not self.simulated if privacy.unit == "client" else all(a.secret for a in self.accounts.values())
        return {
            "unit": privacy.unit,
            "delta": claim.delta,
            "accountant": claim.accountant,
            "adjacency": claim.adjacency,
            "epsilon": spent,
            "statement": str(claim),
            "budget": privacy.epsilon or None,
            "exhausted": sum(bool(account.exhausted) for account in self.accounts.values()),
            "noise": "from secrets that are in no experiment file"
            if secret and (self.accounts or self.secret)
            else "from the experiment's seed, so that runs repeat: not secret, no protection from who has the file",
            "releases": left,
        }

    def _client_epsilon(self) -> float:
        return plan.client_cost(self.experiment, self.noise_multiplier, len(self.made)).epsilon

    def _charge(self, inputs: str, round_: int) -> None:
        if inputs in self.made:
            return
        self._afford(round_, len(self.made) + 1)
        self.made.append(inputs)
        if self.folder is not None:
            write_json(self.folder / _MADE, self.made)

    def _afford(self, round_: int, releases_: int) -> None:
        budget = self.experiment.privacy.epsilon or float("inf")
        cost = plan.client_cost(self.experiment, self.noise_multiplier, releases_)
        if cost.epsilon > budget:
            raise RunStopped(
                f"round {round_}: the privacy budget of every client is spent: with this round, {cost}, "
                f"and privacy.epsilon = {budget:g}"
            )

    def _clipped(self, before: Arrays, content: RecordDict) -> Clipped:
        received = from_record(content.array_records["arrays"])
        return clip(before, {name: value for name, value in received.items() if name in before}, self.bound)

    def _generator(self, inputs: str, purpose: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(noise_seed(self.secret, inputs, purpose)))


def protection(experiment: Experiment, task: Task, roles: Roles) -> Protection:
    """The protection that `[privacy]` asks for. Raises UserError if this task's model or losses cannot have it."""
    learned = tuple(name for name in roles.shared if name in roles.trained)
    privacy = experiment.privacy
    if privacy.unit != "none":
        _refuse(experiment, task, roles)
    if privacy.unit != "client":
        return Protection(experiment, learned)
    noise = plan.client_noise(experiment)
    if privacy.adaptive_clip:
        refuse_small_cohort(plan.client_denominator(experiment), adaptive(experiment))
        update_noise(noise, adaptive(experiment).count_noise)
    return Protection(experiment, learned, bound=privacy.clip, noise_multiplier=noise)


def adaptive(experiment: Experiment) -> AdaptiveClip:
    """The adaptive clip of `[privacy]`; its count's noise is a twentieth of the denominator unless it is set."""
    privacy = experiment.privacy
    count_noise = privacy.clip_count_noise or plan.client_denominator(experiment) / 20
    return AdaptiveClip(privacy.clip, privacy.clip_quantile, privacy.clip_rate, count_noise)


def _refuse(experiment: Experiment, task: Task, roles: Roles) -> None:
    for target in task.targets:
        if target.balanced:
            raise UserError(
                f'privacy.unit = "{experiment.privacy.unit}": the target {target.name} weighs its classes by the private '
                "labels; write the weights as constants in task.kinds"
            )
    model = task.new_model()
    parameters = dict(model.named_parameters())
    if experiment.privacy.unit == "example":
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in roles.trained)
        for place, module in model.named_modules():  # as `meadow.client.loop.trainable.freeze` does
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            module.training = any((f"{place}.{name}" if place else name) in roles.trained for name, _ in own)
            if experiment.local.statistics == "kept" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        refuse_what_mixes_samples(model)
        chosen_mode(model, experiment.privacy.grad_sample)
        return
    for name in roles.shared:
        if name in roles.trained and name not in parameters:
            raise UserError(
                f'privacy.unit = "{experiment.privacy.unit}": the shared "{name}" is no parameter but a statistic of the '
                'private data, which noise would make useless: write task.norm = "group", or do not share it'
            )
