"""Declare everything that leaves a client in a run: each quantity with its mechanism, or "not protected".

Under DP nothing leaves unprotected unless `privacy.release` names it. A few quantities that no mechanism can cover, such as
the time of a reply, are declared as "outside the guarantee", with the reason. Code that sends a quantity must ask `allowed`;
a report lists `releases`, unprotected ones in red.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from meadow.config.schema import Experiment

NOT_PROTECTED = "not protected"
OUTSIDE = "outside the guarantee"


@dataclass(frozen=True)
class Quantity:
    """A quantity that leaves: what, by which mechanism, and the word of `privacy.release` that permits it ("" for none)."""

    what: str
    mechanism: str
    switch: str = ""

    @property
    def protected(self) -> bool:
        """Whether a mechanism covers it, or it is declared as outside the guarantee."""
        return self.mechanism != NOT_PROTECTED

    def as_json(self) -> dict[str, str]:
        """The entry in `summary.json`."""
        return {"what": self.what, "mechanism": self.mechanism}


SWITCHES: dict[str, tuple[str, ...]] = {
    "samples": ("number of training samples, in all and of each target (and so weights by them), and steps",),
    "loss": ("training loss",),
    "metrics": ("metrics on the test part", "metrics on the validation part", "confusion counts of the test part"),
    "labels": ("label counts and sizes of the parts (in the split manifest)",),
    "hashes": ("SHA-256 of the personal arrays",),
    "errors": ("text of errors",),
}
"""The quantities that each word of `privacy.release` permits."""


def allowed(experiment: Experiment, switch: str) -> bool:
    """Whether the quantity may leave: always without DP, and under DP if `privacy.release` names it."""
    if switch not in SWITCHES:
        raise KeyError(f"{switch}: no such release; known are {', '.join(SWITCHES)}")
    return experiment.privacy.unit == "none" or switch in experiment.privacy.release


def releases(experiment: Experiment, sends: Iterable[str] = ()) -> tuple[Quantity, ...]:
    """Everything that leaves a client in this run, the arrays first. `sends`: the algorithm's auxiliary arrays."""
    private = experiment.privacy.unit != "none"
    left = [*_arrays(experiment), *_auxiliary(experiment, sends)]
    if experiment.run.placement == "pooled" and not private:
        return tuple(left)  # that party has the data already
    left += [
        Quantity(what, NOT_PROTECTED, switch if private else "")
        for switch, whats in SWITCHES.items()
        for what in whats
        if allowed(experiment, switch)
    ]
    hashes, part, channel = (
        "SHA-256 of the data and of the split",
        "that a client takes part, or has left",
        "that a client has failed, and when its reply comes",
    )
    if not private:
        return (*left, *(Quantity(what, NOT_PROTECTED) for what in (hashes, part, channel)))
    drawn = "drawn from the seed, independently of the examples"
    if experiment.privacy.unit == "client":
        drawn = "it stays with the server, and so must the run folder"
    left += [
        Quantity(hashes, f"{OUTSIDE}: it reveals data only to someone who can guess all of it"),
        Quantity(part, f"{OUTSIDE}: {drawn}"),
        Quantity(channel, f"{OUTSIDE}: a side channel"),
    ]
    return tuple(left)


def _arrays(experiment: Experiment) -> list[Quantity]:
    privacy, what = experiment.privacy, f'model arrays (share = "{experiment.share}")'
    if experiment.run.placement == "pooled":
        moved = Quantity("all training data, into one place", NOT_PROTECTED)
        if privacy.unit == "none":
            return [moved]
        return [moved, Quantity("the trained model, out of that place", _dpsgd(experiment))]
    if experiment.share == "none":
        return []
    if privacy.unit == "none":
        return [Quantity(what, NOT_PROTECTED)]
    if privacy.unit == "example":
        return [Quantity(what, _dpsgd(experiment))]
    bound = "an adaptive norm" if privacy.adaptive_clip else f"norm {privacy.clip:g}"
    if privacy.unit == "local":
        return [Quantity(what, f"update clipped to {bound} and noised by the client (local DP)")]
    left = [
        Quantity(what + ", to the server", NOT_PROTECTED),
        Quantity(
            "the combined model, to everyone else",
            f"updates clipped to {bound}, Gaussian noise once on their sum (client-level DP)",
        ),
    ]
    if privacy.adaptive_clip:
        left.append(Quantity("share of updates within the clip, to everyone else", "Gaussian noise on the count"))
    return left


def _auxiliary(experiment: Experiment, sends: Iterable[str]) -> list[Quantity]:
    """The auxiliary arrays that the algorithm sends."""
    name = experiment.strategy.name
    if experiment.run.placement != "federated":
        return []
    if ":" in name:
        return [Quantity(f"all that {name} sends besides or instead of the training loop's arrays", NOT_PROTECTED)]
    if experiment.share == "none":
        return []
    how = f"computed from what left by {_dpsgd(experiment)}" if experiment.privacy.unit == "example" else NOT_PROTECTED
    return [Quantity(what, how) for what in sends]


def _dpsgd(experiment: Experiment) -> str:
    privacy = experiment.privacy
    return f"DP-SGD (Poisson rate {privacy.sample_rate:g}, gradients clipped to {privacy.clip:g}, Gaussian noise)"
