"""A rule: settings that are valid by themselves but not together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meadow.config.schema import Experiment

Text = str | Callable[[Experiment], str]


@dataclass(frozen=True)
class Rule:
    """Settings that do not go together, and what to write instead.

    settings: the dotted keys that the message shows with their values. when: whether the experiment breaks the rule; rules
    of algorithms take more arguments (the algorithm's traits, the model's roles). why: the reason. write: what to write
    instead. wrong: overrides of the preset `fedavg` that break only this rule. right: similar overrides that break none.
    """

    settings: tuple[str, ...]
    when: Callable[..., bool]
    why: Text
    write: Text
    wrong: tuple[str, ...] = ()
    right: tuple[str, ...] = ()

    def fault(self, experiment: Experiment, *more: Any) -> str:
        """The message: settings, reason and what to write instead; "" if the experiment keeps the rule."""
        if not self.when(experiment, *more):
            return ""
        named = [f"{key} = {_as_toml(_value(experiment, key))}" for key in self.settings]
        why, write = (text if isinstance(text, str) else text(experiment) for text in (self.why, self.write))
        return f"{' with '.join([named[0], ' and '.join(named[1:])] if named[1:] else named)}: {why}; {write}"


def _value(experiment: Experiment, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(experiment, section), name)


def _as_toml(value: Any) -> str:
    """A value as it is written in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else repr(value)
