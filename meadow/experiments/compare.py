"""The runs of a comparison or a sweep: the same data, splits and seeds under several methods, or over a grid of settings."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meadow.config.load import Tree, apply, flatten, parse_override, preset_names, read_tree, to_tree
from meadow.config.schema import Experiment
from meadow.runtime.errors import UserError
from meadow.strategies.check import resolve

METHODS = (
    "pooled",
    "local",
    "transfer",
    "finetune",
    "multitask",
    "fedavg",
    "fedper",
    "federated-transfer",
    "federated-finetune",
    "federated-multitask",
)
"""What `meadow compare` compares if it is not told."""

BUDGET, NONE = "privacy.epsilon", "none"
"""The setting whose sweep is held against no protection, and the word for it."""


@dataclass(frozen=True)
class Job:
    """One run to do, or a cross-validation's runs: an experiment and its folder."""

    experiment: Experiment
    folder: Path


def methods_jobs(base: Tree, methods: Sequence[str], overrides: Mapping[str, Any], seeds: int, out: Path) -> list[Job]:
    """The runs of a comparison: for each seed each method, which is a preset whose values go over the base's.

    Overrides, by dotted key, go over both. Raises UserError for a method that is no preset, or none at all.
    """
    known = preset_names()
    for method in methods:
        if method not in known:
            raise UserError(f"--methods {method}: there is no such preset; there are {', '.join(known)}")
    if not methods or len(set(methods)) != len(methods):
        raise UserError(f"--methods {','.join(methods)}: name one or more presets, each once")
    trees = {m: apply(apply(base, flatten(read_tree(m))), overrides.items()) for m in methods}
    return _with_seeds({m: apply(tree, [("run.name", m)]) for m, tree in trees.items()}, seeds, out)


def values_of(key: str, given: Any) -> list[Any]:
    """The values that a sweep gives a setting: of a text as the command takes it ("0.1,0.3"), or of a list. For a setting
    that is a list itself (`task.targets`), a list of lists has several values and a list of anything else is one."""
    if isinstance(given, str):
        value = parse_override(f"{key}={given}")[1]
        if not isinstance(value, str) or "," not in value:
            return [value]
        return [parse_override(f"{key}={one.strip()}")[1] for one in value.split(",")]
    if not isinstance(given, list | tuple):
        return [given]
    is_list = isinstance(dict(flatten(to_tree(resolve({})))).get(key), list)
    return [*given] if not is_list or any(isinstance(one, list | tuple) for one in given) else [given]


def sweep_jobs(base: Tree, axes: Mapping[str, Sequence[Any]], seeds: int, out: Path) -> list[Job]:
    """The runs of a sweep: every combination of the values that `axes` gives to its dotted keys.

    Each run is named after its values of those keys that have several. Budgets (`privacy.epsilon`) are held against the
    same run without protection, which a sweep over them has too, once for all settings of privacy. Raises UserError if no
    key has several values.
    """
    fixed = [(key, values[0]) for key, values in axes.items() if len(values) == 1]
    grid = {key: [*values] for key, values in axes.items() if len(values) > 1}
    if BUDGET in grid and NONE not in grid[BUDGET]:
        grid[BUDGET].append(NONE)
    if not grid:
        raise UserError("sweep: give at least one setting several values, for example local.lr=0.03,0.1,0.3")
    trees = {}
    for values in itertools.product(*grid.values()):
        point = list(zip(grid, values, strict=True))
        if (BUDGET, NONE) in point:
            rest = [(key, value) for key, value in point if not key.startswith("privacy.")]
            named = _named([*rest, (BUDGET, NONE)])
            open_ = {section: settings for section, settings in base.items() if section != "privacy"}
            tree = apply(open_, [change for change in fixed if not change[0].startswith("privacy.")] + rest)
        else:
            named, tree = _named(point), apply(base, [*fixed, *point])
        trees[named] = apply(tree, [("run.name", named)])
    return _with_seeds(trees, seeds, out)


def _named(point: Sequence[tuple[str, Any]]) -> str:
    return "_".join(f"{key.partition('.')[2]}-{value}" for key, value in point)


def _with_seeds(trees: dict[str, Tree], seeds: int, out: Path) -> list[Job]:
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give 1 or more")
    first = {name: resolve(tree).run.seed for name, tree in trees.items()}
    return [
        Job(resolve(apply(tree, [("run.seed", first[name] + i)])), out / f"{name}-seed{first[name] + i}")
        for i in range(seeds)
        for name, tree in trees.items()
    ]
