"""Tables in files: CSV, TSV and JSON lines, also compressed by xz or gzip, as columns of text.

What is wrong with a file is told with its path, the line as a text editor counts, the column, and what was expected.
"""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.errors import UserError
from config.load import nearest

Text = npt.NDArray[np.object_]
FORMATS = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True, eq=False)
class Table:
    """A table: text columns (n,) by name, "" where empty; `lines`: where each row stands in the file, int64 (n,)."""

    source: str
    columns: dict[str, Text]
    lines: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, setting: str) -> Text:
        """The column of that name, which `setting` asks for. Raises UserError that lists the columns if it is not there."""
        if name not in self.columns:
            raise UserError(
                f'{setting}: {self.source} has no column "{name}"{nearest(name, self.columns)}; it has '
                f"{', '.join(self.columns)}"
            )
        return self.columns[name]

    def joined(self, names: str, setting: str) -> Text:
        """The column of that name; of several, "play+role", their values joined by "+"."""
        parts = [self.column(name, setting) for name in names.split("+")]
        if len(parts) == 1:
            return parts[0]
        return np.array(["+".join(values) for values in zip(*parts, strict=True)], dtype=object)

    def numbers(self, name: str, setting: str) -> npt.NDArray[np.float64]:
        """The column as numbers, NaN where it is empty. Raises UserError for the first value that is none."""
        values = self.column(name, setting)
        result = np.full(len(values), np.nan)
        for i, value in enumerate(values):
            if value.strip() in ("", "?", "NA", "nan", "NaN"):
                continue
            try:
                result[i] = float(value)
            except ValueError:
                raise UserError(
                    f'{self.source}, line {self.lines[i]}, column "{name}": "{value}" is not a number (a gap is an empty '
                    'cell); a column of names is written "NAME category" or "NAME among ..." in task.inputs'
                ) from None
        return result


def read_table(path: Path) -> Table:
    """The table in a file, by its name: .csv, .tsv, .jsonl, each also with .xz or .gz behind.

    CSV and TSV have a header. JSON lines have an object a line; all have the keys of the first one, whose values are
    texts, numbers, booleans, null, or lists of them (joined by "|"). Raises UserError for what is missing or malformed.
    """
    kind = next((s for s in reversed(path.suffixes) if s in FORMATS), "")
    if not kind:
        raise UserError(f"{path}: a table is a file named *.csv, *.tsv or *.jsonl, also with .xz or .gz behind")
    text = _text(path)
    rows = list(_json_rows(path, text) if kind in (".jsonl", ".json") else _rows(path, text, kind))
    if not rows:
        raise UserError(f"{path}: the file has no rows")
    names = list(rows[0][1])
    columns = {name: np.array([row[name] for _, row in rows], dtype=object) for name in names}
    return Table(str(path), columns, np.array([line for line, _ in rows], dtype=np.int64))


def find_file(folder: Path, name: str, setting: str, candidates: Sequence[str]) -> Path:
    """The file `name` in the folder; if it is empty, the first candidate that exists. Raises UserError if there is none."""
    for candidate in [name] if name else candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    wanted = f'"{name}"' if name else "none of " + ", ".join(candidates)
    raise UserError(
        f'{setting} = "{name}": {folder} has {"no file " if name else ""}{wanted}; '
        f"it has {', '.join(files[:20]) or 'nothing'}"
    )


def candidates(stem: str) -> list[str]:
    """The names that a table called `stem` may have."""
    return [f"{stem}{kind}{packed}" for kind in FORMATS[:3] for packed in ("", ".xz", ".gz")]


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".xz":
            raw = lzma.decompress(raw)
        elif path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: the compressed file is damaged or cut short ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _rows(path: Path, text: str, kind: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == ".csv" else "\t", strict=True)
    try:
        header = next(reader, [])
        if any(not name.strip() for name in header):
            raise UserError(f"{path}, line 1: a column has no name: {header}")
        if len(set(header)) != len(header):
            raise UserError(f"{path}, line 1: two columns have the same name: {', '.join(header)}")
        before = reader.line_num
        for row in reader:
            line, before = before + 1, reader.line_num
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {line}: {len(row)} cells, but the header has {len(header)}")
            if row:
                yield line, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    names: list[str] | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: this is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        names = names or list(row)
        if set(row) != set(names):
            raise UserError(
                f"{path}, line {number}: the keys are {sorted(row)}, those of the first line {sorted(names)}"
            )
        yield number, {name: _cell(path, number, name, row[name]) for name in names}


def _cell(path: Path, line: int, name: str, value: Any) -> str:
    if isinstance(value, list):
        return "|".join(_cell(path, line, name, v) for v in value)
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise UserError(f'{path}, line {line}, "{name}": expected a text, a number or a list, found {type(value).__name__}')
