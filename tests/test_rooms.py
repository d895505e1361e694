"""The rooms' order: each imports only from those above it. Read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY: dict[str, set[str]] = {
    "config": set(),
    "tasks": {"config"},
    "privacy": {"config"},
    "strategies": {"config", "privacy"},
    "client": {"strategies", "privacy", "tasks", "config"},
    "server": {"strategies", "privacy", "tasks", "config"},
    "simulation": {"client", "server", "strategies", "privacy", "tasks", "config"},
    "experiments": {"simulation", "client", "server", "strategies", "privacy", "tasks", "config"},
}


def imported_rooms(source: str) -> set[str]:
    """The rooms that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} & MAY.keys()


@pytest.mark.parametrize("room", [room for room in MAY if (ROOT / room).is_dir()])
def test_room_imports_only_what_it_may(room: str) -> None:
    breaches = {
        (str(path.relative_to(ROOT)), other)
        for path in (ROOT / room).rglob("*.py")
        for other in imported_rooms(path.read_text())
        if other != room and other not in MAY[room]
    }
    assert breaches == set()


def test_a_breach_is_seen() -> None:
    assert imported_rooms("def f():\n    from server.rounds import play_round\n    import client.app") == {
        "server",
        "client",
    }
