"""Pages come from templates that escape: no markup is put together in Python, and no name becomes markup."""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from helpers.folders import make_run, round_line
from meadow.experiments.pictures.style import COLOURS
from meadow.experiments.report.write import render
from meadow.experiments.results import read_run
from meadow.runtime.identity import ROOT

TAGS = "a|b|body|code|dd|details|div|dl|dt|figcaption|figure|h[1-6]|head|html|li|p|pre|script|small|span|style|summary"
MARKUP = re.compile(rf"</?({TAGS}|table|tbody|td|th|thead|title|tr|ul)(\s[^<>]*)?>|<svg\s")
FOLDERS = ("meadow", "strategies", "client", "server", "simulation", "deploy", "benchmarks")


def markup(source: str) -> list[str]:
    """The strings of a file, and the fixed parts of its f-strings, that hold HTML; docstrings apart."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.value)
        for parent in ast.walk(tree)
        if isinstance(parent, documented)
        for node in parent.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    texts = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings
    ]
    return [str(text.value) for text in texts if MARKUP.search(str(text.value))]


def test_no_markup_stands_in_python() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert {str(path): found for path in paths if (found := markup(path.read_text()))} == {}


def test_markup_is_seen() -> None:
    source = '"""Like <td>."""\nx = f"<td class={y}>{z}</td>"\nw = "a < b > c" + "client-<n>"\n'
    assert markup(source) == ["</td>"]


class Tags(HTMLParser):
    """The tags of a page, and those that are open at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "path", "use", "image", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


HOSTILE = "<script>alert('&')</script> & \"q\""


def test_names_from_run_folders_stay_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b> & co", "fedavg", 0, [0.5, 0.7], status="stopped", reason=HOSTILE,
                      privacy={"unit": "none", "releases": [{"what": HOSTILE, "mechanism": "not protected"}]})  # fmt: skip
    split = json.loads((folder / "split.json").read_text()) | {"law": HOSTILE, "target": HOSTILE}
    (folder / "split.json").write_text(json.dumps(split))
    failed = [{"client": 1, "reason": f"{HOSTILE}\n{HOSTILE}"}]
    lines = [json.dumps(round_line(r, [0.5, 0.7], failed=failed)) for r in (1, 2)]
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    evaluated = {"digit": {"classes": [HOSTILE, "b"], "confusion": [[3, 1], [0, 4]]}}
    (folder / "evaluation.json").write_text(json.dumps({"clients": evaluated}))
    page, tags = render([read_run(folder)]), Tags()
    tags.feed(page)
    assert "script" not in tags.seen and tags.open == []
    assert page.count("&lt;script&gt;") >= 6


def test_the_page_has_every_colour_in_both_looks(tmp_path: Path) -> None:
    page = render([read_run(make_run(tmp_path / "run", "fedavg", 0, [0.5, 0.7]))])
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}: {light};" in page and f"--{name}: {dark};" in page
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", page))
    assert used <= COLOURS.keys()
