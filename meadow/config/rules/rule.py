"""A rule: settings that are each right, and wrong beside one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meadow.config.schema import Experiment

Text = str | Callable[["Experiment"], str]


@dataclass(frozen=True)
class Rule:
    """Settings that do not go together, and what to write instead.

    settings: the dotted keys that the message names with their values. when: whether the experiment breaks the rule; a rule
    of an algorithm may be given more (its traits, the model's roles). why: the reason. write: the way out. wrong: overrides
    of the preset `fedavg` that break this rule and no other. right: overrides close to them that break none.
    """

    settings: tuple[str, ...]
    when: Callable[..., bool]
    why: Text
    write: Text
    wrong: tuple[str, ...] = ()
    right: tuple[str, ...] = ()

    def fault(self, experiment: Experiment, *more: Any) -> str:
        """What is wrong, why, and the way out; "" if the experiment keeps the rule."""
        if not self.when(experiment, *more):
            return ""
        named = [f"{key} = {_shown(_value(experiment, key))}" for key in self.settings]
        why, write = (text if isinstance(text, str) else text(experiment) for text in (self.why, self.write))
        return f"{' with '.join([named[0], ' and '.join(named[1:])] if named[1:] else named)}: {why}; {write}"


def _value(experiment: Experiment, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(experiment, section), name)


def _shown(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else repr(value)
