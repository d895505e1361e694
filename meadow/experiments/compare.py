"""The list of runs of a comparison (several methods, same data, splits and seeds) or of a sweep (a grid of settings)."""

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
"""The methods that `meadow compare` compares by default."""

BUDGET, NONE = "privacy.epsilon", "none"
"""A sweep over this setting also runs without privacy; the value of that run."""


@dataclass(frozen=True)
class Job:
    """An experiment to run, or to cross-validate, and its folder."""

    experiment: Experiment
    folder: Path


def methods_jobs(base: Tree, methods: Sequence[str], overrides: Mapping[str, Any], seeds: int, out: Path) -> list[Job]:
    """The runs of a comparison: each method for each seed. A method is a preset; its values replace those of `base`.

    Overrides, by dotted key, replace both. Raises UserError for an unknown preset, or if there is no method.
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
    """The values of a setting in a sweep, from the command's text ("0.1,0.3") or from a list.

    For a setting that is itself a list (`task.targets`), a list of lists is several values, any other list is one value.
    """
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
    """The runs of a sweep: every combination of the values in `axes`, which maps dotted keys to values.

    A run's name has its values of the keys with several values. A sweep over `privacy.epsilon` also has one run without
    privacy, against which the budgets are compared. Raises UserError if no key has several values.
    """
    fixed = [(key, values[0]) for key, values in axes.items() if len(values) == 1]
    grid = {key: [*values] for key, values in axes.items() if len(values) > 1}
    if BUDGET in grid and NONE not in grid[BUDGET]:
        grid[BUDGET].append(NONE)
    if not grid:
        raise UserError("sweep: no setting has several values; write for example local.lr=0.03,0.1,0.3")
    trees = {}
    for values in itertools.product(*grid.values()):
        point = list(zip(grid, values, strict=True))
        if (BUDGET, NONE) in point:
            rest = [(key, value) for key, value in point if not key.startswith("privacy.")]
            name = _name([*rest, (BUDGET, NONE)])
            public = {section: settings for section, settings in base.items() if section != "privacy"}
            tree = apply(public, [change for change in fixed if not change[0].startswith("privacy.")] + rest)
        else:
            name, tree = _name(point), apply(base, [*fixed, *point])
        trees[name] = apply(tree, [("run.name", name)])
    return _with_seeds(trees, seeds, out)


def _name(point: Sequence[tuple[str, Any]]) -> str:
    return "_".join(f"{key.partition('.')[2]}-{value}" for key, value in point)


def _with_seeds(trees: dict[str, Tree], seeds: int, out: Path) -> list[Job]:
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: there must be a seed; write 1 or more")
    first = {name: resolve(tree).run.seed for name, tree in trees.items()}
    return [
        Job(resolve(apply(tree, [("run.seed", first[name] + i)])), out / f"{name}-seed{first[name] + i}")
        for i in range(seeds)
        for name, tree in trees.items()
    ]
