"""Comparisons: the same data, splits and seeds under several methods, or over a grid of settings."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meadow.config.load import Tree, apply, flatten, parse_override, preset_names, read_tree
from meadow.experiments.api import Job
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


def methods_jobs(base: Tree, methods: Sequence[str], overrides: Sequence[str], seeds: int, out: Path) -> list[Job]:
    """The runs of a comparison: for each seed each method, which is a preset whose values go over the base's.

    Overrides go over both. Raises UserError for a method that is no preset, or none at all.
    """
    known = preset_names()
    for method in methods:
        if method not in known:
            raise UserError(f"--methods {method}: there is no such preset; there are {', '.join(known)}")
    if not methods or len(set(methods)) != len(methods):
        raise UserError(f"--methods {','.join(methods)}: name one or more presets, each once")
    changes = [parse_override(o) for o in overrides]
    trees = {m: apply(apply(base, flatten(read_tree(m))), changes) for m in methods}
    return _with_seeds({m: apply(tree, [("run.name", m)]) for m, tree in trees.items()}, seeds, out)


def sweep_jobs(base: Tree, overrides: Sequence[str], seeds: int, out: Path) -> list[Job]:
    """The runs of a sweep: every combination of the overrides that give several values (`local.lr=0.1,0.3`).

    Each run is named after its values. Budgets (`privacy.epsilon=1,2,4`) are held against the same run without protection,
    which a sweep over them has too, once for all settings of privacy. Raises UserError if no override gives several.
    """
    grid: list[tuple[str, list[Any]]] = []
    fixed: list[tuple[str, Any]] = []
    for text in overrides:
        key, value = parse_override(text)
        several = value.split(",") if isinstance(value, str) and "," in value else [value]
        if key == BUDGET and len(several) > 1 and NONE not in several:
            several.append(NONE)
        if len(several) > 1:
            grid.append((key, [parse_override(f"{key}={v.strip()}")[1] for v in several]))
        else:
            fixed.append((key, value))
    if not grid:
        raise UserError("sweep: give at least one setting several values, for example local.lr=0.03,0.1,0.3")
    trees = {}
    for values in itertools.product(*(v for _, v in grid)):
        point = [(key, value) for (key, _), value in zip(grid, values, strict=True)]
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
