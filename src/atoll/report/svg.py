"""Matplotlib figures as inline SVG that takes its colours and typeface from the page.

Figures are painted in stand-in colours; :func:`render` replaces each with a CSS variable
of the page, so that one drawing serves light mode, dark mode and paper. Text stays text
(selectable, searchable) in the page's own typeface; matplotlib's DejaVu Sans, which is wider
than common typefaces, only reserves the room. One unit of the drawing is one CSS pixel.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from atoll.report.markup import Html, clean

Grid = Literal["x", "y", "both"]
INK, MUTED, LINE = "#010101", "#020202", "#030303"
FEDERATED, LOCAL, POOLED, DATA, CARD = "#040404", "#050505", "#060606", "#070707", "#080808"
POSITIVE, NEGATIVE, PERSONAL = "#090909", "#0a0a0a", "#0b0b0b"
_VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", CARD: "card",
    FEDERATED: "federated", LOCAL: "local", POOLED: "pooled", DATA: "data",
    POSITIVE: "positive", NEGATIVE: "negative", PERSONAL: "personal",
}  # fmt: skip
TEXT_SIZE = 11.0
"""Size of text, in the drawing's units (CSS pixels)."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "atoll",
    "font.family": "DejaVu Sans",
    "font.size": TEXT_SIZE,
    "text.usetex": False,
    "text.parse_math": False,  # a column may be called "$x"
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": TEXT_SIZE,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.pad": 5,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_TAG = re.compile(r"<[^<>]+>")  # matplotlib escapes < and > in text and in attributes
_DRAWING = re.compile(r'<svg class="plot".*?</svg>', re.DOTALL)
_ID = re.compile(r' id="(p[0-9a-f]{10})')
_REFERENCE = re.compile(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"')


def render(width: float, height: float, label: str, paint: Callable[[Figure], None]) -> Html:
    """The figure that *paint* draws, *width* × *height* CSS pixels, as one ``<svg>`` element.

    label: what the plot shows, in words, for people who cannot see it. The same drawing
    gives the same bytes; its ids begin with a hash of its content, so that those of
    different drawings in one page differ.
    """
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that DejaVu lacks may be in the reader's typeface
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        paint(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata=_NO_METADATA)
    drawing = written.getvalue()
    drawing = drawing[drawing.index(">", drawing.index("<svg")) + 1 : drawing.rindex("</svg>")]
    drawing = re.sub(r"<style.*?</style>|<metadata.*?</metadata>", "", drawing, flags=re.DOTALL)
    used = {a or b for a, b in _REFERENCE.findall(drawing)}
    prefix = "p" + hashlib.sha256((label + drawing).encode()).hexdigest()[:10]
    drawing = _TAG.sub(lambda tag: _retouched(tag[0], used, prefix), drawing)
    drawing = re.sub(r"\s*\n\s*", "\n", re.sub(r"<defs>\s*</defs>", "", drawing))
    head = (
        f'<svg class="plot" role="img" aria-label="{html.escape(clean(label))}" '
        f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        'stroke-linejoin="round" stroke-linecap="butt" font-family="inherit">'
    )
    return Html(f"{head}{drawing}</svg>")


def distinct(page: str) -> Html:
    """*page* with ids of its own for a drawing that is in it more than once."""
    seen: Counter[str] = Counter()

    def again(drawing: re.Match[str]) -> str:
        if (named := _ID.search(drawing[0])) is None:
            return drawing[0]
        seen[named[1]] += 1
        return drawing[0] if seen[named[1]] == 1 else drawing[0].replace(named[1], f"{named[1]}_{seen[named[1]]}_")

    return Html(_DRAWING.sub(again, page))


def _retouched(tag: str, used: set[str], prefix: str) -> str:
    """One tag with the page's colours, ids of its own, short numbers and no typeface."""
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", tag)
    tag = _REFERENCE.sub(lambda m: f"url(#{prefix}{m[1]})" if m[1] else f'href="#{prefix}{m[2]}"', tag)
    tag = re.sub(r"font: ((?:bold |\d+ )?)([\d.]+px) [^;\"]*", r"font-weight: \1; font-size: \2", tag)
    tag = tag.replace("font-weight: ; ", "")
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag)


def plain_axes(figure: Figure, place: SubplotSpec | None = None, *, grid: Grid | None = None) -> Axes:
    """Axes (all of the figure, or *place* in its grid) with light lines across *grid*, without a frame."""
    axes: Axes = figure.add_subplot(place) if place is not None else figure.add_subplot()
    if grid is not None:
        axes.grid(axis=grid)
    axes.spines[["left", "bottom"]].set_visible(False)
    return axes


def ticks(value: float, _: object = None) -> str:
    """A tick's label: no more digits than needed, and a real minus sign."""
    return f"{value:,.10g}".replace("-", "−") if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.2g}"


def shortened(name: object, most: int = 18) -> str:
    """A name that fits beside a plot; the whole name is in the table."""
    text = clean(name)
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
