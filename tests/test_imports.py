"""No module imports itself by way of others. Read from the imports, those inside functions too."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent
ROOMS_AT_THE_TOP = ("strategies", "client", "server", "simulation")

FACE = "the library's face loads what it offers when it is first used"
ALLOWED = {
    ("meadow", f"meadow.{module}"): FACE for module in ("experiments.api", "experiments.models", "runtime.errors")
}
"""Imports for the type checker alone (`if TYPE_CHECKING:`), and why they are no others."""


def modules() -> dict[str, Path]:
    """Name -> file of every module of ours; a package is its `__init__.py`."""
    found = {}
    for folder, prefix in ((ROOT, "meadow"), *((ROOT, room) for room in ROOMS_AT_THE_TOP)):
        for path in (folder / prefix).rglob("*.py"):
            name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            found[name if prefix == "meadow" else f"meadow.{name}"] = path
    return found


def for_the_type_checker(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST, typing: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether only the type checker reads it."""
    typing = typing or for_the_type_checker(node)
    for child in ast.iter_child_nodes(node):
        yield child, typing
        yield from walk(child, typing)


def imports(source: str, typing: bool = False) -> Iterator[str]:
    """What a file imports; of `from a import b` both a.b and a, the nearer first. With `typing`: for the type checker."""
    for node, only_types in walk(ast.parse(source), False):
        if only_types != typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}|{node.module}" for alias in node.names)


def graph(sources: Mapping[str, str], typing: bool = False) -> dict[str, set[str]]:
    """Module -> the modules that it imports. That a package is loaded before what is in it counts for nothing."""
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        wanted = (next((c for c in found.split("|") if c in sources), None) for found in imports(source, typing))
        edges[name] = {other for other in wanted if other}
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules that all reach one another (Tarjan 1972), of two or more, and those that import themselves."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            component = set(stack[at:])
            del stack[at:]
            if len(component) > 1 or name in edges[name]:
                found.append(component)

    for name in edges:
        if name not in index:
            visit(name)
    return found


def sources() -> dict[str, str]:
    return {name: path.read_text() for name, path in modules().items()}


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(graph(sources())) == []


def test_only_known_imports_are_for_the_type_checker_alone() -> None:
    read = sources()
    edges = graph(read, typing=True)
    assert {(name, other) for name, others in edges.items() for other in others} == ALLOWED.keys()


PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
PRIVATE = {"meadow/arrays/flower.py", "deploy/control.py"}
"""The files that may use private parts of Flower."""


def test_only_two_files_use_private_parts_of_flower() -> None:
    rooms = (ROOT / room for room in ("meadow", "deploy", *ROOMS_AT_THE_TOP))
    found = {
        str(path.relative_to(ROOT))
        for path in (path for room in rooms for path in room.rglob("*.py"))
        for name in (found.split("|")[-1] for found in imports(path.read_text()))
        if name.split(".")[0] == "flwr" and not name.startswith(PUBLIC)
    }
    assert found == PRIVATE


def test_a_circle_is_seen_where_it_hides_in_a_function_and_not_where_only_types_need_it() -> None:
    hidden = dedent("""
        def f():
            from a.c import g
    """)
    assert circles(graph({"a.b": hidden, "a.c": "import a.d", "a.d": "from a import b"})) == [{"a.b", "a.c", "a.d"}]
    types = dedent("""
        if TYPE_CHECKING:
            from a.c import G
    """)
    both = {"a.b": types, "a.c": "import a.b"}
    assert circles(graph(both)) == [] and graph(both, typing=True)["a.b"] == {"a.c"}
    assert circles(graph({"a": "from a.b import x", "a.b": "from a.c import y", "a.c": ""})) == []
