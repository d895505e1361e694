"""What leaves a client in a run, declared: each quantity with its mechanism, or "not protected".

The rule: under DP nothing leaves unprotected unless `privacy.release` names it, or nothing can hide it (that a client took
part, and when its reply came). Whoever is about to let something leave asks `allowed`; a report shows `releases`, what
is not protected in red.
"""

from collections.abc import Callable
from dataclasses import dataclass

from config.schema import Experiment

NOT_PROTECTED = "not protected"


@dataclass(frozen=True)
class Quantity:
    """One thing that leaves: what, by which mechanism, and the word of `privacy.release` that let it ("" for none)."""

    what: str
    mechanism: str
    switch: str = ""

    @property
    def protected(self) -> bool:
        """Whether a mechanism protects it."""
        return self.mechanism != NOT_PROTECTED

    def as_json(self) -> dict[str, str]:
        """As `summary.json` has it."""
        return {"what": self.what, "mechanism": self.mechanism}


def _always(experiment: Experiment) -> bool:
    return True


def _scored_by_clients(experiment: Experiment) -> bool:
    return "clients" in experiment.evaluate.on


def _has_personal(experiment: Experiment) -> bool:
    return experiment.share not in ("all", "trainable")


SWITCHES: dict[str, tuple[str, Callable[[Experiment], bool]]] = {
    "samples": ("number of training samples, in all and of each target (and so weights by them)", _always),
    "loss": ("training loss", _always),
    "metrics": ("metrics on the client's own test part", _scored_by_clients),
    "labels": ("label counts and sizes of the parts (in the split manifest)", _always),
    "hashes": ("SHA-256 of the personal arrays", _has_personal),
    "errors": ("text of errors", _always),
}
"""Of each word of `privacy.release`: what it lets leave, and in which runs there is such a thing."""


def allowed(experiment: Experiment, switch: str) -> bool:
    """Whether the quantity may leave: always without DP, and under DP if `privacy.release` names it."""
    if switch not in SWITCHES:
        raise KeyError(f"{switch}: there is no such release; there are {', '.join(SWITCHES)}")
    return experiment.privacy.unit == "none" or switch in experiment.privacy.release


def releases(experiment: Experiment) -> tuple[Quantity, ...]:
    """Everything that leaves a client in this run, the arrays first."""
    private = experiment.privacy.unit != "none"
    left = list(_arrays(experiment))
    if experiment.run.placement == "pooled":
        return tuple(left)  # the data itself has moved: whatever is computed from it is with the same party
    left += [
        Quantity(what, NOT_PROTECTED, switch if private else "")
        for switch, (what, exists) in SWITCHES.items()
        if exists(experiment) and allowed(experiment, switch)
    ]
    left.append(Quantity("that a client takes part, has failed, or has left, and when its reply comes", NOT_PROTECTED))
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


def _dpsgd(experiment: Experiment) -> str:
    privacy = experiment.privacy
    return f"DP-SGD (Poisson rate {privacy.sample_rate:g}, gradients clipped to {privacy.clip:g}, Gaussian noise)"
