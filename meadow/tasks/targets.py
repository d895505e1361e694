"""Targets from raw columns: the grammar of `task.kinds` (docs/data.md), and the encoding of columns as numbers.

    class [N | NAME ...] [above T] [weights W ... | balanced]
    labels [N | NAME ...] [weights W ... | balanced]
    value [scale S] [offset O]
    quantiles Q ... [scale S] [offset O]

An empty cell and NaN are a missing label, and so is -1 in an array of whole numbers unless it is one of the classes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from meadow.config.load import nearest
from meadow.runtime.errors import UserError
from meadow.runtime.limits import check_fits
from meadow.tasks.data import MISSING, Data, Part, Raw, Target

KINDS: tuple[str, ...] = get_args(Target.__dataclass_fields__["kind"].type)
_KEYWORDS = {"class": ("above", "weights", "balanced"), "labels": ("weights", "balanced")}
"""Kind -> its keywords; the others take scale and offset."""
MOST_CLASSES = 1_000_000
Column = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A parsed entry of `task.kinds`. `words`: the words before the first keyword."""

    target: str
    text: str
    kind: str
    words: tuple[str, ...]
    above: float | None = None
    weights: tuple[float, ...] = ()
    balanced: bool = False
    scale: float = 1.0
    offset: float = 0.0

    def wrong(self, why: str) -> UserError:
        """The error that names the entry."""
        return UserError(f'task.kinds = "{self.text}" for the target "{self.target}": {why}')

    def number(self, word: str) -> float:
        if not is_number(word):
            raise self.wrong(f'"{word}" is not a number')
        return float(word)


def read_kind(target: str, text: str) -> Kind:
    """Parse an entry of `task.kinds`. Raises UserError that says what to write instead."""
    first, *rest = text.split() or [""]
    kind = Kind(target, text, first, ())
    if first not in KINDS:
        raise kind.wrong(f"a kind begins with one of {', '.join(KINDS)}")
    allowed, found, words = _KEYWORDS.get(first, ("scale", "offset")), dict[str, Any](), list[str]()
    parts = {"words": words}
    for word in rest:
        if word not in ("above", "weights", "balanced", "scale", "offset"):
            words.append(word)
        elif word in parts:
            raise kind.wrong(f'"{word}" is there twice')
        elif word not in allowed:
            raise kind.wrong(f'"{word}" is not for {first}, which takes {", ".join(allowed)}')
        else:
            words = parts[word] = []
    for word, values in parts.items():
        if word in ("above", "scale", "offset"):
            if len(values) != 1:
                raise kind.wrong(f'"{word}" takes one number')
            found[word] = kind.number(values[0])
        elif word == "weights":
            if not values:
                raise kind.wrong('"weights" takes a number for each class')
            found[word] = tuple(map(kind.number, values))
        elif word == "balanced":
            if values:
                raise kind.wrong(f'"balanced" takes no "{values[0]}"')
            found[word] = True
    kind = Kind(target, text, first, tuple(parts["words"]), **found)
    _check(kind)
    return kind


def _check(kind: Kind) -> None:
    """Raise UserError unless the entry's words and numbers go together."""
    if kind.scale <= 0 or (kind.weights and min(kind.weights) <= 0):
        raise kind.wrong("scale and weights are positive numbers")
    if kind.weights and kind.balanced:
        raise kind.wrong("give weights or balanced, not both")
    if kind.kind == "quantiles":
        levels = [kind.number(word) for word in kind.words]
        if not levels or sorted(set(levels)) != levels or min(levels) <= 0 or max(levels) >= 1:
            raise kind.wrong("write the levels in ascending order, each between 0 and 1: quantiles 0.1 0.5 0.9")
    if kind.kind == "value" and kind.words:
        raise kind.wrong(f'"{kind.words[0]}" is unknown; write value [scale S] [offset O]')
    if kind.kind in ("class", "labels") and len(set(kind.words)) != len(kind.words):
        raise kind.wrong("two classes have the same name")
    if kind.above is not None and len(kind.words) not in (0, 2):
        raise kind.wrong('"above" makes two classes: give two names, or none')


def encode(raw: Raw, names: tuple[str, ...], kinds: Mapping[str, str]) -> tuple[tuple[Target, ...], Data, Data]:
    """Encode the named targets: (targets, training pool, test set).

    A target's kind comes from `kinds`, else from the reader, else from its values: "class" for text, integer arrays, and
    whole numbers with at most 100 distinct values; "value" for other numbers. Raises UserError for an unknown column, an
    unknown class, text where a number is expected, and a column of the wrong shape.
    """
    assert raw.test is not None
    for name in names:
        if name not in raw.train.columns:
            raise UserError(
                f'task.targets = {list(names)}: the data set "{raw.name}" has no target '
                f'"{name}"{nearest(name, raw.train.columns)}; it has {", ".join(raw.train.columns)}'
            )
        if name not in raw.test.columns:
            raise UserError(
                f'task.test: the test set of "{raw.name}" has no column "{name}", which the training pool has'
            )
    targets, train, test = [], {}, {}
    for name in names:
        if (kind_of := np.asarray(raw.train.columns[name]).dtype).kind not in "fiubOUSM":
            raise UserError(f'task.targets: "{name}" is of type {kind_of}; expected numbers or text')
        kind = read_kind(name, kinds.get(name) or raw.kinds.get(name) or _guess(raw.train.columns[name]))
        both = [np.asarray(part.columns[name]) for part in (raw.train, raw.test)]
        _check_shapes(raw, kind, both)
        target = _target(kind, both)
        targets.append(target)
        train[name], test[name] = (_numbers(target, kind, part) for part in (raw.train, raw.test))
    return tuple(targets), Data(raw.train.x, train), Data(raw.test.x, test)


def missing(column: Column) -> npt.NDArray[np.bool_]:
    """Which entries of a raw column are missing: empty text, NaN."""
    if column.dtype.kind in "fc":
        return np.isnan(column)
    if column.dtype.kind in "OUS":
        return np.asarray(column.astype(str) == "")
    return np.zeros(column.shape, dtype=bool)


def _guess(column: Column) -> str:
    words = _words(column)[0]
    known = [word for word in words if word]
    if not all(is_number(word) for word in known):
        return "class"
    if column.dtype.kind in "iub":
        return "class"
    return "class" if known and len(known) <= 100 and all(float(w).is_integer() for w in known) else "value"


def _check_shapes(raw: Raw, kind: Kind, columns: list[Column]) -> None:
    """Raise UserError unless a column has one entry per sample, a row per sample for labels, or a class per token."""
    for column in columns:
        rows = kind.kind == "labels" and column.ndim == 2
        tokens = kind.kind == "class" and raw.tokens and column.ndim == 2 and column.shape[1:] == raw.train.x.shape[1:]
        if column.ndim != 1 and not rows and not tokens:
            raise kind.wrong(
                f"the column has shape {column.shape}, but {kind.kind} takes one entry per sample; "
                'write "labels" for rows of 0 and 1, and split other arrays into one target each'
            )


def _target(kind: Kind, columns: list[Column]) -> Target:
    if kind.kind == "value":
        return Target(kind.target, "value", 1, kind.scale, kind.offset)
    if kind.kind == "quantiles":
        levels = tuple(map(float, kind.words))
        return Target(kind.target, "quantiles", len(levels), kind.scale, kind.offset, levels)
    if kind.above is not None:
        names: tuple[str, ...] = kind.words or (f"at most {kind.above:g}", f"above {kind.above:g}")
    elif len(kind.words) == 1 and kind.words[0].isdecimal():
        if int(kind.words[0]) > MOST_CLASSES:
            raise kind.wrong(f"so many classes are too many; the most is {MOST_CLASSES:,}")
        names = tuple(map(str, range(int(kind.words[0]))))
    else:
        names = kind.words or (_label_names(columns) if kind.kind == "labels" else _distinct(columns))
    if kind.weights and len(kind.weights) != len(names):
        raise kind.wrong(f"{len(kind.weights)} weights for {len(names)} classes {list(names)[:20]}")
    if len(names) < 2 and kind.kind == "class":
        raise kind.wrong(f"the column has {len(names)} distinct values; a class target needs two or more")
    which: Literal["class", "labels"] = "labels" if kind.kind == "labels" else "class"
    return Target(kind.target, which, len(names), weights=kind.weights, balanced=kind.balanced, names=names)


def _numbers(target: Target, kind: Kind, part: Part) -> Tensor:
    column = np.asarray(part.columns[target.name])
    gone = missing(column)
    if target.kind in ("value", "quantiles"):
        return torch.from_numpy(_floats(kind, part, gone).astype(np.float32))
    if target.kind == "labels":
        return torch.from_numpy(_rows(target, kind, part))
    if kind.above is not None:
        values = _floats(kind, part, gone)
        return torch.from_numpy(np.where(gone, MISSING, (values > kind.above).astype(np.int64)))
    index = {name: i for i, name in enumerate(target.names)}
    words, inverse = _words(column)
    words = [word if word in index else _whole(word) for word in words]
    if column.dtype.kind == "i":
        index.setdefault(str(MISSING), MISSING)  # how whole numbers say that there is none, unless -1 is a class
    for number, word in enumerate(words):
        if word and word not in index:
            row = int(np.argwhere(inverse == number)[0][0])
            raise kind.wrong(f'{part.where(row)}, has "{word}", which is none of {list(target.names)[:20]}')
    return torch.from_numpy(np.array([index.get(word, MISSING) for word in words], dtype=np.int64)[inverse])


def _words(column: Column) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The distinct values as text (whole numbers without a decimal point, "" if missing), and the index of each entry's."""
    values = column if column.dtype.kind in "fiub" else column.astype(str)
    distinct, inverse = np.unique(values, return_inverse=True)
    if column.dtype.kind == "f":
        words = ["" if np.isnan(v) else _whole(repr(float(v))) for v in distinct]
    elif column.dtype.kind in "iub":
        words = [str(int(v)) for v in distinct]
    else:
        # Half characters, as of a name in another encoding, become escapes: no file and no font takes them.
        words = [str(v).encode(errors="backslashreplace").decode() for v in distinct]
    return words, inverse.reshape(column.shape)


def _whole(word: str) -> str:
    """A whole number without its decimal point ("3.0" as "3"), which files add to columns with missing values."""
    return str(int(float(word))) if is_number(word) and float(word).is_integer() else word


def _distinct(columns: list[Column]) -> tuple[str, ...]:
    seen = {word for column in columns for word in _words(column)[0]} - {""}
    if all(is_number(v) for v in seen):
        return tuple(sorted(seen, key=lambda word: (float(word), word)))
    return tuple(sorted(seen))


def _label_names(columns: list[Column]) -> tuple[str, ...]:
    if columns[0].ndim == 2:
        return tuple(str(i) for i in range(columns[0].shape[1]))
    return tuple(sorted({name for column in columns for cell in _words(column)[0] for name in _cell(cell)}))


def _cell(cell: str) -> list[str]:
    return [name.strip() for name in str(cell).split("|") if name.strip()]


def _rows(target: Target, kind: Kind, part: Part) -> npt.NDArray[np.float32]:
    column = np.asarray(part.columns[target.name])
    if column.ndim == 2:
        if column.shape[1] != target.size:
            raise kind.wrong(f"rows have {column.shape[1]} entries, not {target.size}")
        rows = column.astype(np.float32)
        if not np.isin(rows[~np.isnan(rows)], (0, 1)).all():
            raise kind.wrong("rows of labels contain 0 and 1 (NaN for missing)")
        return rows
    index = {name: i for i, name in enumerate(target.names)}
    check_fits(
        f'task.targets = "{target.name}": {len(column):,} rows of {target.size:,}', 4 * len(column) * target.size
    )
    rows = np.zeros((len(column), target.size), dtype=np.float32)
    words, inverse = _words(column)
    for row, word in enumerate(inverse):
        cell = words[word]
        if cell == "":
            rows[row] = np.nan
        for name in _cell(cell):
            if name not in index:
                raise kind.wrong(f'{part.where(row)}, has "{name}", which is none of {list(target.names)[:20]}')
            rows[row, index[name]] = 1
    return rows


def _floats(kind: Kind, part: Part, gone: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    column = np.asarray(part.columns[kind.target])
    if column.dtype.kind in "fiub":
        if (infinite := np.flatnonzero(np.isinf(column))).size:
            raise kind.wrong(f"{part.where(int(infinite[0]))}, is not a finite number")
        return column.astype(np.float64)
    values = np.full(column.shape, np.nan)
    for row in np.flatnonzero(~gone):
        if not is_number(str(column[row])):
            raise kind.wrong(f'{part.where(int(row))}, has "{column[row]}", which is not a number')
        values[row] = float(column[row])
    return values


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
