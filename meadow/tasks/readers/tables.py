"""Reads tables as columns of text: CSV, TSV and JSON lines, optionally compressed with xz or gzip.

Errors name the file, the line (as a text editor counts), the column, and what was expected.
"""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meadow.config.load import nearest
from meadow.runtime.errors import UserError
from meadow.runtime.limits import LARGEST_RATIO, SMALL, check_ratio, is_file, memory, read_file

Text = npt.NDArray[np.object_]
FORMATS = (".csv", ".tsv", ".jsonl")
PACKED = (".xz", ".gz")
_LISTS = 10  # in one another, in a cell
GAPS = ("", "?", "NA", "nan", "NaN")
"""Cells of a column of numbers or categories that mean a missing value."""


@dataclass(frozen=True, eq=False)
class Table:
    """A table: text columns (n,) by name, "" if empty; `lines`: the line of each row in the file, int64 (n,)."""

    source: str
    columns: dict[str, Text]
    lines: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, setting: str) -> Text:
        """The column with this name. Raises UserError that names `setting` and lists the columns if there is none."""
        if name not in self.columns:
            raise UserError(
                f'{setting}: {self.source} has no column "{name}"{nearest(name, self.columns)}; it has '
                f"{', '.join(self.columns)}"
            )
        return self.columns[name]

    def joined(self, names: str, setting: str) -> Text:
        """A column, or several ("play+role") with their values joined by "+". Raises UserError for an empty cell."""
        several = names.split("+") if names not in self.columns else [names]
        parts = [self.column(name, setting) for name in several]
        for name, part in zip(several, parts, strict=True):
            if (gaps := np.flatnonzero(part == "")).size:
                raise UserError(f"{setting}: {self.cell(int(gaps[0]), name)}: this cell is empty")
        return np.array(["+".join(values) for values in zip(*parts, strict=True)], dtype=object)

    def cell(self, row: int, name: str) -> str:
        """The location of a cell, for errors: file, line and column."""
        return f'{self.source}, line {self.lines[row]}, column "{name}"'

    def numbers(self, name: str, setting: str) -> npt.NDArray[np.float64]:
        """The column as numbers, NaN if missing (`GAPS`). Raises UserError for the first value that is not a number."""
        values = self.column(name, setting)
        result = np.full(len(values), np.nan)
        for i, value in enumerate(values):
            if value.strip() in GAPS:
                continue
            with suppress(ValueError):
                result[i] = float(value)
            if not np.isfinite(result[i]):
                raise UserError(
                    f'{self.cell(i, name)}: "{value}" is not a finite number (leave missing cells empty); for a column of '
                    'categories write "NAME category" or "NAME among ..." in task.inputs'
                )
        return result


def read_table(path: Path) -> Table:
    """Read the table in a file named .csv, .tsv or .jsonl, optionally followed by .xz or .gz.

    CSV and TSV have a header; empty lines are ignored. JSON lines have one object per line, all with the same keys; values
    are texts, numbers, booleans, null, or lists of them (joined by "|"). Raises UserError for a missing or malformed
    file.
    """
    kind = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    if kind not in FORMATS:
        raise UserError(f"{path}: a table is a file named *.csv, *.tsv or *.jsonl, optionally followed by .xz or .gz")
    text = _text(path)
    rows = list(_json_rows(path, text) if kind == ".jsonl" else _rows(path, text, kind))
    if not rows:
        raise UserError(f"{path}: it has no rows; expected {'' if kind == '.jsonl' else 'a header and '}at least one")
    names = list(rows[0][1])
    columns = {name: np.array([row[name] for _, row in rows], dtype=object) for name in names}
    return Table(str(path), columns, np.array([line for line, _ in rows], dtype=np.int64))


def find_file(folder: Path, name: str, setting: str, candidates: Sequence[str]) -> Path:
    """The file `name` in the folder or, if name is "", the first candidate that exists. Raises UserError if none does."""
    for candidate in [name] if name else candidates:
        if is_file(folder / candidate):
            return folder / candidate
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    wanted = f'"{name}"' if name else "none of " + ", ".join(candidates)
    raise UserError(
        f'{setting} = "{name}": {folder} has {"no file " if name else ""}{wanted}{nearest(name, files)}; '
        f"it has {', '.join(files[:20]) or 'nothing'}"
    )


def candidates(stem: str) -> list[str]:
    """The possible file names of a table called `stem`."""
    return [f"{stem}{kind}{packed}" for kind in FORMATS for packed in ("", *PACKED)]


def _text(path: Path) -> str:
    try:
        raw = read_file(path, memory() // 16)  # Python's texts take many times that
        if path.suffix in PACKED:
            packed, opener = len(raw), lzma.open if path.suffix == ".xz" else gzip.open
            with opener(io.BytesIO(raw)) as file:
                raw = file.read(max(SMALL, LARGEST_RATIO * packed) + 1)
            check_ratio(str(path), len(raw), packed)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is damaged or truncated ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _rows(path: Path, text: str, kind: str) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the default refuses texts above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == ".csv" else "\t", strict=True)
    header: list[str] = []
    begin = 1
    try:
        for row in reader:
            line, begin = begin, reader.line_num + 1
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
                if "" in header or len(set(header)) < len(header):
                    raise UserError(f"{path}, line {line}: the header {header} has an empty or repeated name")
            elif len(row) != len(header):
                raise UserError(
                    f"{path}, line {line}: it has {len(row)} cells, but the header has {len(header)}: {', '.join(header)}"
                )
            else:
                yield line, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {begin}: {error} (in the row that begins here)") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    names: list[str] | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: this is not a JSON object on one line ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        names = names or list(row)
        if set(row) != set(names):
            raise UserError(
                f"{path}, line {number}: the keys are {sorted(row)}, those of the first line {sorted(names)}"
            )
        yield number, {name: _cell(path, number, name, row[name]) for name in names}


def _cell(path: Path, line: int, name: str, value: Any, inside: int = 0) -> str:
    if isinstance(value, list) and inside < _LISTS:
        return "|".join(_cell(path, line, name, v, inside + 1) for v in value)
    if value is None or value != value:  # null, NaN
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(
        f'{path}, line {line}, "{name}": expected a text, a number or a list of them, found {type(value).__name__}'
    )
