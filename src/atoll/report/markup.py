"""HTML that is escaped by construction: text becomes markup only through :func:`element`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Invisible, and part of the spelling of names in some scripts."""
VOID = frozenset({"meta", "br", "hr"})


class Html(str):
    """Text that already is HTML. Everything that is not an Html is escaped when put into an element."""

    __slots__ = ()


Child = object
"""Html, None (nothing), a list or tuple of children, or anything else, whose text is escaped."""


def clean(value: object) -> str:
    """*value* as text without characters that HTML and XML cannot hold, or that reorder the line they are in."""
    text = str(value).encode("utf-8", "replace").decode()
    return "".join(
        c if c.isprintable() or c in JOINERS else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def join(*children: Child) -> Html:
    """Children one after the other, escaped where they are not Html."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, list | tuple):
            parts.append(join(*child))
        elif child is not None:
            parts.append(html.escape(clean(child)))
    return Html("".join(parts))


def element(name: str, /, *children: Child, **attributes: str | None) -> Html:
    """``<name attributes>children</name>``. ``class_`` is class, ``aria_label`` is aria-label; None leaves one out.

    Names of elements and attributes are the program's own and are not checked.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(clean(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(*children)}</{name}>")


def code(value: object) -> Html:
    """An identifier, in a fixed-width face, that may be broken anywhere."""
    return element("code", value)


def table(
    caption: Child,
    header: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    text_columns: int = 1,
    note: Child = None,
) -> Html:
    """A table in a box of its own that scrolls sideways, and a note below it.

    text_columns: so many columns on the left hold words; the others hold numbers. The first
    cell of each row is the row's header.
    """

    def line(cells: Sequence[Child], *, head: bool = False) -> Html:
        made = []
        for i, cell in enumerate(cells):
            scope = "col" if head else "row" if i == 0 else None
            kind = "number" if i >= text_columns else None
            inside = cell if i else element("span", cell)
            made.append(element("th" if scope else "td", inside, scope=scope, class_=kind))
        return element("tr", made)

    # The caption's words are in a box of their own, which stays in view when the table is scrolled.
    named = element("caption", element("span", caption))
    body = element("tbody", [line(row) for row in rows])
    whole = element("table", named, element("thead", line(header, head=True)), body)
    # A box that scrolls must be reachable by keyboard, and then needs a role and a name.
    kind = "scroll wordy" if text_columns > 1 else "scroll"
    box = element("div", whole, class_=kind, tabindex="0", role="region", aria_label=clean(caption))
    return join(box, element("p", note, class_="note") if note else None)
