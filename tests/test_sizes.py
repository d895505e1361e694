"""Files of one subject and functions that a reader can hold in mind: their length, with the exceptions named."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("meadow", "strategies", "client", "server", "simulation", "deploy", "benchmarks")

LONGEST_FILE = 350
LONGEST_FUNCTION = 60

FILES = {
    "meadow/config/schema.py": "every setting with its documentation: one table",
}
"""File -> why it is longer."""

FUNCTIONS = {
    "benchmarks/dp.py:sides": "the sides of one measurement",
}
"""File:function -> why it is longer."""


def files() -> Iterator[tuple[str, str]]:
    """(path from the root, source) of every file of ours."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def long_functions(source: str) -> dict[str, int]:
    """Name -> lines of the functions that are too long, decorators not counted."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lines = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return {name: count for name, count in lines.items() if count > LONGEST_FUNCTION}


def test_files_are_no_longer_than_one_subject_needs() -> None:
    assert {path for path, source in files() if source.count("\n") > LONGEST_FILE} == FILES.keys()


def test_functions_can_be_read_at_once() -> None:
    assert {f"{path}:{name}" for path, source in files() for name in long_functions(source)} == FUNCTIONS.keys()


def test_a_long_function_is_seen() -> None:
    body = "\n".join(f"    x = {i}" for i in range(LONGEST_FUNCTION - 1))
    assert long_functions(f"def f():\n{body}\n") == {}
    assert long_functions(f"def f():\n{body}\n    y = 1\n") == {"f": LONGEST_FUNCTION + 1}
