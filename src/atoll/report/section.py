"""What a section of the report is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atoll.report.markup import Child, Html, element

Input = Mapping[str, Any]
"""``result.json``, or the details beside it. Any part may be missing."""


@dataclass(frozen=True, slots=True)
class Section:
    """One section: its anchor in the page, its title, and its content."""

    anchor: str
    title: str
    content: Sequence[Child]

    def html(self) -> Html:
        """The ``<section>``."""
        return element("section", element("h2", self.title), *self.content, id=self.anchor)


Maker = Callable[[Input, Input], Section | None]
"""(result, details) → the section; None when there is nothing to show in it."""


def part(source: object, *path: str) -> Mapping[str, Any]:
    """The mapping at *path* inside *source*; an empty one when it, or anything on the way, is not there."""
    for key in path:
        source = source.get(key) if isinstance(source, Mapping) else None
    return source if isinstance(source, Mapping) else {}


def output(result: Input, kind: str) -> Mapping[str, Any]:
    """What the statistics program *kind* returned."""
    return part(result, "output", kind)


def unit_of(details: Input, column: object) -> str:
    """The column's unit; "" when it has none."""
    return str(part(details, "units").get(str(column)) or "")


def text(*children: Child) -> Html:
    """A paragraph."""
    return element("p", *children)


def figure(plot: Html | None, title: str, note: Child = None) -> Html | None:
    """A plot with its title and a note, in one card."""
    if plot is None:
        return None
    return element("figure", element("figcaption", element("strong", title), *([" ", note] if note else [])), plot)


def cards(figures: Sequence[Html | None], kind: str = "") -> Html | None:
    """Figures side by side where there is room. kind: "" (two in a row), "three" or "small"."""
    shown = [one for one in figures if one is not None]
    return element("div", shown, class_=f"cards {kind}".strip()) if shown else None


def beside(picture: Html | None, *words: Child, top: bool = False) -> Html:
    """A figure, and words to its right where there is room; *top*: both begin at the same height."""
    told = element("div", *words, class_="words")
    return told if picture is None else element("div", picture, told, class_="beside top" if top else "beside")


def folded(title: str, *content: Child) -> Html:
    """Content that opens by a click on its title, and on paper is left closed or open as the reader left it."""
    return element("details", element("summary", title), *content)


def terms(pairs: Sequence[tuple[Child, Child]], kind: str) -> Html:
    """Terms and what they are: a list of definitions, without those that are empty."""
    return element("dl", [element("div", element("dt", t), element("dd", d)) for t, d in pairs if d], class_=kind)
