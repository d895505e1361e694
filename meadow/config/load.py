"""Reads an experiment: a preset or a TOML file, then dotted overrides, then one check of all settings."""

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from meadow.config import rules
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.runtime.limits import is_file, read_file

Tree = dict[str, Any]

LARGEST_FILE, LONGEST_LINE, DEEPEST = 64 * 1024, 4000, 10
"""Bytes of an experiment file, characters of its lines, tables and lists in one another. TOML's parser takes quadratic
time for a key with many dots."""


def preset_names() -> list[str]:
    """The names of Meadow's presets, sorted."""
    return sorted(f.name[:-5] for f in resources.files("meadow.config.presets").iterdir() if f.name.endswith(".toml"))


def preset_about(name: str) -> str:
    """The description of a preset: its first comment line."""
    text = resources.files("meadow.config.presets").joinpath(f"{name}.toml").read_text()
    return text.splitlines()[0].lstrip("# ")


def read_tree(experiment: str | Path | Mapping[str, Any]) -> Tree:
    """The settings of a preset, a TOML file or a mapping as nested dictionaries, without defaults.

    Raises UserError for an unknown preset, a missing file, or text that is not TOML or larger than an experiment is
    (LARGEST_FILE, LONGEST_LINE).
    """
    if isinstance(experiment, Mapping):
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in experiment.items()}
    name = str(experiment)
    if name in preset_names():
        return tomllib.loads(resources.files("meadow.config.presets").joinpath(f"{name}.toml").read_text())
    path = Path(name)
    if not is_file(path):
        if path.suffix == ".toml" or len(path.parts) > 1:
            raise UserError(f"experiment = {shortened(name)}: there is no such file")
        raise UserError(
            f"experiment = {shortened(name)}: neither a preset nor a TOML file{nearest(name, preset_names()) or '.'} "
            f"Presets: {', '.join(preset_names())}"
        )
    try:
        tree = _toml(read_file(path, LARGEST_FILE).decode())
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{name} is not a TOML file: {error}") from None
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem))
    return tree


def _toml(text: str) -> Tree:
    """Parse TOML. Raises ValueError if it is none, or would take the parser minutes or all of the stack."""
    if any(len(line) > LONGEST_LINE for line in text.splitlines()):
        raise ValueError(f"a line has over {LONGEST_LINE:,} characters")
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in level if isinstance(each, dict | list)]
    if level:
        raise ValueError("its values are nested too deeply")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value`; the value is read as TOML or, if it is not TOML, as a string."""
    key, separator, value = text.partition("=")
    if any(not char.isprintable() for char in key) or not _is_text(value):
        raise UserError(f"{shortened(ascii(text))}: an override is UTF-8 text, and its key has no control characters")
    if not separator or key.count(".") != 1:
        raise UserError(f"{shortened(text)}: an override is written section.key=value, for example run.rounds=5")
    try:
        return key.strip(), _toml(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value
    except ValueError as error:
        raise UserError(f"{shortened(key)} = {shortened(value)}: {error}") from None


def _is_text(value: str) -> bool:
    """Whether UTF-8 can say it: an argument of other bytes has half characters in their place."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def apply(tree: Tree, overrides: Iterable[tuple[str, Any]]) -> Tree:
    """A copy of the tree with dotted keys replaced."""
    result: Tree = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
    for dotted, value in overrides:
        section, _, key = dotted.partition(".")
        place = result.setdefault(section, {})
        if isinstance(place, dict):
            place[key] = value
    return result


Faults = Callable[[Experiment], list[str]]
"""Further rules: takes an experiment, returns one line for each rule that it breaks."""


def resolve(tree: Mapping[str, Any], faults: Faults | None = None) -> Experiment:
    """Check a tree of settings and fill in the defaults. `faults`: rules in addition to `meadow.config.rules`.

    Raises UserError that lists all faults, each with dotted key, value and reason, and the nearest key for an unknown one.
    """
    try:
        experiment = Experiment.model_validate(dict(tree))
    except ValidationError as error:
        found = [_explain(fault) for fault in error.errors()] + _broken_rules(tree, faults, error)
        raise UserError("\n".join(found)) from None
    if found := _all_faults(experiment, faults):
        raise UserError("\n".join(found))
    return experiment


def _all_faults(experiment: Experiment, faults: Faults | None) -> list[str]:
    return [*rules.faults(experiment), *(faults(experiment) if faults else ())]


def _broken_rules(tree: Mapping[str, Any], faults: Faults | None, error: ValidationError) -> list[str]:
    """The rules that a tree with wrong values breaks besides: those about none of the wrong settings."""
    wrong = {tuple(map(str, fault["loc"][:2])) for fault in error.errors()}
    if not all(isinstance(values, Mapping) for values in tree.values()):
        return []
    rest = {
        section: {key: value for key, value in values.items() if not wrong & {(section,), (section, key)}}
        for section, values in tree.items()
        if section in Experiment.model_fields
    }
    try:
        lines = _all_faults(Experiment.model_validate(rest), faults)
    except ValidationError:  # what is wrong together with a setting left out
        return []
    names = [".".join(place) + ("." if len(place) == 1 else " = ") for place in wrong]
    return [line for line in lines if not any(name in line for name in names)]


def load(
    experiment: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), faults: Faults | None = None
) -> Experiment:
    """Read, override and check an experiment."""
    return resolve(apply(read_tree(experiment), [parse_override(o) for o in overrides]), faults)


def flatten(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ("section.key", value) for every setting of a two-level tree."""
    for section, values in tree.items():
        for key, value in values.items():
            yield f"{section}.{key}", value


def to_tree(experiment: Experiment) -> Tree:
    """The complete experiment as nested dictionaries of TOML's types."""
    return experiment.model_dump(mode="json")


def to_toml(experiment: Experiment) -> str:
    """The complete experiment as TOML; `meadow run` on that text gives the same run."""
    return tomli_w.dumps(to_tree(experiment))


def to_flat(experiment: Experiment) -> dict[str, bool | int | float | str]:
    """The experiment as Flower's run configuration: dotted keys, lists written "a,b"."""
    return {
        key: ",".join(str(v) for v in value) if isinstance(value, list) else value
        for key, value in flatten(to_tree(experiment))
    }


def from_flat(flat: Mapping[str, Any]) -> Experiment:
    """The inverse of `to_flat`; ignores keys outside the schema's sections, because Flower adds its own."""
    sections = Experiment.model_fields
    return resolve(apply({}, [(k, v) for k, v in flat.items() if k.partition(".")[0] in sections and "." in k]))


def _known_keys() -> list[str]:
    """All dotted keys of the schema."""
    return [
        f"{section}.{key}"
        for section, field in Experiment.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    ]


def _explain(fault: Any) -> str:
    dotted = ".".join(str(part) for part in fault["loc"][:2])
    if fault["type"] == "extra_forbidden":
        names = _known_keys() if "." in dotted else list(Experiment.model_fields)
        return f"{dotted}: there is no such setting{nearest(dotted, names) or ';'} `meadow show` lists all of them"
    if fault["type"] == "value_error" and "." not in dotted:
        # The check of a section raised it, and its message names the setting already.
        return f"{dotted}." + str(fault["msg"]).removeprefix("Value error, ")
    reason = str(fault["msg"]).removeprefix("Value error, ")
    value = fault["input"]
    if fault["type"] == "model_type":
        return f"[{dotted}] must be a section with settings, not {shortened(repr(value))}"
    near = ""
    if fault["type"] == "literal_error" and isinstance(value, str):
        options = [part.strip("' ") for part in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = nearest(value, options)
    return f"{shortened(dotted)} = {shortened(repr(value))}: {shortened(reason[0].lower() + reason[1:])}{near}"


def shortened(text: str, most: int = 200) -> str:
    """The text, or its beginning and its length if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean X?" for the closest of the names, or "" if none is close.

    Close in spelling, in any case, or equal to the initials of its words (learning_rate: lr)."""
    folded = {known.lower(): known for known in names}
    section, dot, words = name.lower().rpartition(".")
    initials = section + dot + "".join(word[0] for word in words.split("_") if word)
    match = [initials] if initials in folded else difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[match[0]]}?" if match else ""
