"""The rooms' order: each imports only from those below it, and nothing of ours but as `meadow.…`. Read from the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["runtime", "arrays", "native", "config"]
"""Each may import those before it."""
UPPER = {
    "tasks": set[str](),
    "privacy": set[str](),
    "strategies": {"privacy"},
    "client": {"strategies", "privacy", "tasks"},
    "server": {"strategies", "privacy", "tasks"},
    "simulation": {"client", "server", "strategies", "privacy", "tasks"},
    "experiments": {"simulation", "client", "server", "strategies", "privacy", "tasks"},
}
MAY = {room: set(ORDER[:place]) for place, room in enumerate(ORDER)} | {
    room: rooms | set(ORDER) for room, rooms in UPPER.items()
}


def place(room: str) -> Path:
    """The folder of a room: below `meadow`, or at the top of the checkout."""
    return next(folder for folder in (ROOT / "meadow" / room, ROOT / room) if folder.is_dir())


def imports(source: str) -> Iterator[str]:
    """The modules that a file imports, by their whole names; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(source: str) -> set[str]:
    """The rooms that a file imports from."""
    names = (name.split(".") for name in imports(source))
    return {name[1] for name in names if name[0] == "meadow" and len(name) > 1} & MAY.keys()


def by_another_name(source: str) -> set[str]:
    """What a file imports of ours that is not called `meadow.…`: a user's `config.py` would be taken for it, and
    a dependency brings a package named `benchmarks`."""
    return {name for name in imports(source) if name.split(".")[0] in {*MAY, "benchmarks"}}


@pytest.mark.parametrize("room", MAY)
def test_room_imports_only_what_it_may(room: str) -> None:
    breaches = {
        (path.name, other)
        for path in place(room).rglob("*.py")
        for other in rooms_of(path.read_text())
        if other != room and other not in MAY[room]
    }
    assert breaches == set()


@pytest.mark.parametrize("folder", [*MAY, "deploy", "benchmarks", "tests"])
def test_everything_of_ours_is_imported_as_meadow(folder: str) -> None:
    found = place(folder) if folder in MAY else ROOT / folder
    assert {(path.name, name) for path in found.rglob("*.py") for name in by_another_name(path.read_text())} == set()


BREACH = """
def f():
    from meadow.server.rounds import play_round
    from meadow import client
    import tasks.data
"""


def test_a_breach_is_seen() -> None:
    assert rooms_of(dedent(BREACH)) == {"server", "client"}
    assert by_another_name(dedent(BREACH)) == {"tasks.data"}
