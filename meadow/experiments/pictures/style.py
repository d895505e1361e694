"""The style of all figures, and how to write them to a file or, as inline SVG, to a page.

Every colour is one of COLOURS. A Figure has the light value; `to_svg` replaces it with a CSS variable, so that the same
figure works on a light and on a dark page.
"""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from meadow.arrays.files import writing
from meadow.runtime.errors import UserError

COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1c2128", "#e4e7eb"),
    "muted": ("#5f6772", "#a0a8b3"),
    "rule": ("#dfe3e8", "#363c45"),
    "paper": ("#fffffe", "#15181d"),
    "dot": ("#7d93ab", "#7f97b2"),
    "loser": ("#d1500a", "#ff9350"),
    # Methods, after Okabe and Ito: darkened on white and lightened on black until a label in that colour is legible.
    "m0": ("#0069aa", "#5cb0ef"),
    "m1": ("#c44e00", "#ff9a55"),
    "m2": ("#007a58", "#43cfa3"),
    "m3": ("#a8437f", "#ea95c8"),
    "m4": ("#94700a", "#e3bd55"),
    "m5": ("#3b8fc4", "#a5dcff"),
    "m6": ("#6a2c8a", "#c69ae6"),
    "m7": ("#6d7300", "#c6cc52"),
}
"""Name -> (on a light page, on a dark page)."""

SHADES = LinearSegmentedColormap.from_list("shades", [(0, 0.41, 0.67, 0), (0, 0.41, 0.67, 1)])
"""From transparent to blue."""

WIDTH = 10.4
"""Width of every figure in inches, that of the page's column."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": COLOURS["ink"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.edgecolor": COLOURS["rule"][0],
    "axes.titlecolor": COLOURS["ink"][0],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"][0],
    "grid.linewidth": 0.7,
    "xtick.color": COLOURS["rule"][0],
    "ytick.color": COLOURS["rule"][0],
    "xtick.labelcolor": COLOURS["muted"][0],
    "ytick.labelcolor": COLOURS["muted"][0],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
}


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters, with an ellipsis where the rest was."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def to_file(figure: Figure, path: Path) -> None:
    """Write a figure on white, in the format of the file's suffix. Raises UserError for other suffixes or no folder."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {path}: this suffix is no figure format; write .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist; make it first, or name another")
    with matplotlib.rc_context(STYLE), writing(path):
        figure.savefig(path, dpi=150, facecolor="white")


def to_svg(figure: Figure, name: str) -> str:
    """A figure as one inline `<svg>` element without URLs, coloured by CSS variables named as in COLOURS.

    `name` makes the element ids unique on a page.
    """
    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None}, dpi=150)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows both name spaces
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif", text)
    for colour, (light, _) in COLOURS.items():
        text = re.sub(light, f"var(--{colour})", text, flags=re.IGNORECASE)
    return text
