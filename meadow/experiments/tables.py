"""A table of the report as plain values: its columns, its cells and a note."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller text after it, and whether it is the best of its column."""

    text: str = ""
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column. `group`: a second heading above its own, shared by neighbours of the same group."""

    name: str
    group: str = ""
    left: bool = False
    wrap: bool = False
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, and rows with a cell for each. `aside`: rows that are references only; `note`: how to read the figures."""

    id: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    aside: frozenset[int] = field(default_factory=frozenset)
    note: str = ""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(heading, number of columns below it) from left to right; [] if no column has a group."""
        runs = itertools.groupby(column.group for column in self.columns)
        found = [(group, len(list(columns))) for group, columns in runs]
        return found if any(group for group, _ in found) else []

    def full(self, always: int = 1) -> "Table":
        """The table without its empty columns; the first `always` columns stay."""
        kept = [i for i in range(len(self.columns)) if i < always or any(row[i].text for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.id, [self.columns[i] for i in kept], rows, self.aside, self.note)
