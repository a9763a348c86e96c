"""Drawings that several statistics share: bars, heat maps, strips and curves.

What a chart cannot show because it was withheld has a cross in place of its mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from atoll.report import svg
from atoll.report.markup import Html, clean
from atoll.report.plots import WIDTH, numbers
from atoll.report.svg import DATA, INK, LOCAL, MUTED, NEGATIVE, POOLED, POSITIVE, plain_axes, render, shortened
from atoll.report.words import WITHHELD, compact, fixed, real, significant, whole

SMALL = 150.0
"""CSS pixels: of plots that stand two in a row on a phone."""
STRONGEST = 0.52
"""Opacity of a heat map's fullest cell: on any deeper colour its number would not stand out."""
CROSS = "×"
SERIES = (("data", DATA), ("local", LOCAL), ("positive", POSITIVE), ("pooled", POOLED))
Number = float | None
_CLEAR = {"facecolor": svg.CARD, "edgecolor": "none", "pad": 0.8}
"""Behind a number that a line would cross."""


def bars(
    rows: Sequence[tuple[object, object]], label: str, *, form: Callable[[object], str] = fixed,
    marks: Sequence[float] = (), ends: Sequence[tuple[Number, Number]] = (), colour: str = DATA,
) -> Html | None:  # fmt: skip
    """Horizontal bars from zero, a line for each (name, value), with its number beside it.

    marks: values that get a dashed line. ends: of each bar's confidence interval. A value of None is withheld.
    """
    values = [real(value) for _, value in rows]
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = (list(side) for side in zip(*ends, strict=True)) if ends else ([], [])
    reach = max(0.0, *known, *(x for x in high if x is not None))
    least = min(0.0, *known, *(x for x in low if x is not None))
    span = (reach - least) or 1.0
    shown = [mark for mark in marks if least < mark < reach * 1.4]

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        for place, value in enumerate(values):
            if value is None:
                axes.text(0.01 * span, place, WITHHELD, va="center_baseline", color=MUTED, style="italic")
                continue
            axes.barh(place, value, 0.66, color=colour if value >= 0 else NEGATIVE, linewidth=0)
            end = value
            if ends and low[place] is not None and high[place] is not None:
                axes.plot([low[place], high[place]], [place, place], color=INK, linewidth=1.5)
                end = max(value, high[place])
            axes.text(max(end, 0.0) + 0.02 * span, place, form(value), va="center_baseline", color=INK, bbox=_CLEAR)
        axes.axvline(0, color=MUTED, linewidth=1)
        for i, mark in enumerate(shown):
            axes.axvline(mark, color=MUTED, linewidth=1, dashes=(3, 3), zorder=0.5)
            if i + 1 == len(shown) or shown[i + 1] - mark > 0.12 * span:
                axes.text(mark, -0.75, f"{mark:g}", ha="center", va="bottom", color=MUTED, fontsize=svg.TEXT_SIZE - 1)
        axes.set_yticks(range(len(rows)), [shortened(name, 16) for name, _ in rows], color=INK)
        axes.set_xticks([])
        axes.set_xlim(least - (0.04 * span if least else 0), max(reach, *shown, 0.0) + 0.24 * span)
        axes.set_ylim(len(rows) - 0.4, -0.6)

    told = "; ".join(f"{name} {WITHHELD if v is None else form(v)}" for (name, _), v in zip(rows, values, strict=True))
    return render(WIDTH, 14 + 19 * len(rows) + (14 if shown else 0), f"Bars: {label}. {told}", paint)


def columns(values: Sequence[object], counts: Sequence[object], label: str) -> Html | None:
    """A small chart of upright bars: the *counts* of a few short codes."""
    heights = [real(count) for count in counts]
    most = max((height for height in heights if height), default=0.0)
    if not most:
        return None

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        axes.spines["bottom"].set(visible=True, color=MUTED)
        for place, height in enumerate(heights):
            if height is None:
                axes.text(place, 0.03 * most, CROSS, ha="center", color=MUTED)
            else:
                axes.bar(place, height, 0.74, color=DATA, linewidth=0)
        names = [clean(value).replace("-", "−") for value in values]
        axes.set_xticks(range(len(values)), names, fontsize=svg.TEXT_SIZE if len(names) <= 8 else 8)
        axes.set_yticks([])
        axes.set_ylim(0, most * 1.05)
        axes.set_xlim(-0.6, len(values) - 0.4)

    told = (f"{v} {WITHHELD if h is None else whole(h)}" for v, h in zip(values, heights, strict=False))
    return render(SMALL, 82, f"Bars: {label}: {'; '.join(told)}", paint)


def strip(probabilities: Sequence[object], values: Sequence[object], label: str) -> Html | None:
    """A box plot without single values: thin lines between the outer quantiles, a box from 25 % to 75 %, the median."""
    known = {p: x for a, b in zip(probabilities, values, strict=False)
             if (p := real(a)) is not None and (x := real(b)) is not None}  # fmt: skip
    if len(known) < 2:
        return None
    ordered = sorted(known)

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        axes.plot([known[ordered[0]], known[ordered[-1]]], [0, 0], color=POOLED, linewidth=1.5)
        for low in ordered:
            high = next((p for p in ordered if abs(low + p - 1) < 1e-9 and p > low), None)
            if high is not None:
                thick = 0.9 if abs(low - 0.25) < 1e-9 else 1.2 * min(low, 0.25) + 0.1
                axes.barh(0, known[high] - known[low], thick, known[low], color=DATA, alpha=0.45, linewidth=0)
        ends = (known[ordered[0]], known[ordered[-1]])
        if 0.5 in known:
            axes.plot([known[0.5]] * 2, [-0.55, 0.55], color=INK, linewidth=2)
            share = (known[0.5] - ends[0]) / ((ends[1] - ends[0]) or 1.0)
            side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
            axes.text(known[0.5], 0.65, compact(known[0.5]), ha=side, va="bottom", color=INK)
        for end, side in zip(ends, ("left", "right"), strict=True):
            axes.text(end, -0.65, compact(end), ha=side, va="top", color=MUTED)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylim(-1.3, 1.25)
        axes.margins(x=0.01)

    told = "; ".join(f"{100 * p:g} % {significant(known[p])}" for p in ordered)
    return render(SMALL, 62, f"Quantiles of {label}: {told}", paint)


def heat(
    rows: Sequence[object], across: Sequence[object], cells: Sequence[Sequence[object]], label: str, *,
    reach: float = 1.0, form: Callable[[float], str] | None = None, blank: str = CROSS,
) -> Html | None:  # fmt: skip
    """A heat map: [rows, across], fully coloured at ± *reach*; *form* writes a cell's number, None none.

    A cell without a number has *blank*.
    """
    grid = [[real(value) for value in line] for line in cells]
    if not rows or not across or not any(value is not None for line in grid for value in line):
        return None
    name, head = 13, max(len(shortened(one, 13)) for one in across)
    side = (WIDTH - 6.0 * min(name, max(len(clean(one)) for one in rows)) - 12) / len(across)
    upright = head * 5.6 < side
    height = max(15.0, min(22.0, side))
    size = min(svg.TEXT_SIZE, 9.5 if len(across) > 6 else 11.0, height * 0.62)

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if value is not None:
                    share = min(abs(value) / (reach or 1.0), 1.0) * (STRONGEST if form is not None else 0.95)
                    _cell(axes, x, y, POSITIVE if value >= 0 else NEGATIVE, share)
                if value is None or form is not None:
                    told = blank if value is None or form is None else form(value)
                    axes.text(x, y, told, ha="center", va="center_baseline", fontsize=size, color=INK)
        axes.set_xticks(range(len(across)), [shortened(one, name) for one in across], rotation=0 if upright else 90)
        axes.set_yticks(range(len(rows)), [shortened(one, name) for one in rows])
        axes.tick_params(labelcolor=INK, labelsize=9.5 if len(across) > 6 else 11, pad=3)
        axes.xaxis.tick_top()
        axes.set_xlim(-0.5, len(across) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)

    top = 20.0 if upright else 8 + 6.0 * head
    return render(WIDTH, 8 + top + height * len(rows), label, paint)


def _cell(axes: Axes, x: float, y: float, colour: str, share: float) -> None:
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, alpha=max(share, 0.03), edgecolor="none"))


def steps(
    curves: Mapping[str, Sequence[Mapping[str, Number]]], label: str, across: str, colours: Mapping[str, str]
) -> Html | None:
    """Survival curves as steps, with their confidence bands: name → [{"time", "survival", "low", "high"}, …]."""
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return None

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure, grid="y")
        axes.spines["bottom"].set(visible=True, color=MUTED)
        for name, points in drawn.items():
            times = np.array([0.0, *(p["time"] for p in points)], float)
            alive = np.array([1.0, *(p["survival"] for p in points)], float)
            low, high = (np.array([1.0, *(p[side] for p in points)], float) for side in ("low", "high"))
            axes.fill_between(times, low, high, step="post", color=colours[name], alpha=0.18, linewidth=0)
            axes.step(times, alive, where="post", color=colours[name])
        axes.set_ylim(-0.02, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], [f"{share} %" for share in (0, 25, 50, 75, 100)])
        axes.set_xlabel(across)
        numbers(axes, "x", 6)
        axes.margins(x=0.01)

    return render(WIDTH, 250, label, paint)


def evidence(bins: Sequence[tuple[str, object, str]], label: str) -> Html | None:
    """Bars of the weight of evidence to both sides of zero: (bin, weight or None where empty, words on the right)."""
    values = [real(value) for _, value, _ in bins]
    known = [value for value in values if value is not None]
    if not known:
        return None
    least, reach = min(0.0, *known), max(0.0, *known)
    # Room, in the drawing's units, for the numbers beside the bars and for the words, which do not scale with them.
    number, words = 36.0, 6.2 * max(len(said) for *_, said in bins) + 8
    room = WIDTH - 16 - 6.4 * max(len(name) for name, *_ in bins) - words - 2 * number
    unit = ((reach - least) or 1.0) / max(room, 40.0)

    def paint(figure: Figure) -> None:
        axes = plain_axes(figure)
        end = reach + (number + words) * unit
        for place, ((_, _, said), value) in enumerate(zip(bins, values, strict=True)):
            if value is not None:
                axes.barh(place, value, 0.68, color=POSITIVE if value >= 0 else NEGATIVE, linewidth=0)
                at, side = (value + 4 * unit, "left") if value >= 0 else (value - 4 * unit, "right")
                axes.text(at, place, fixed(value, 2), ha=side, va="center_baseline", color=INK)
            axes.text(end, place, said, ha="right", va="center_baseline", color=MUTED)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(bins)), [name for name, _, _ in bins], color=INK)
        axes.set_xticks([])
        axes.set_xlim(least - number * unit, end)
        axes.set_ylim(len(bins) - 0.4, -0.6)

    told = "; ".join(f"{name}: {fixed(value, 2)} ({said})" for (name, _, said), value in zip(bins, values, strict=True))
    return render(WIDTH, 12 + 19 * len(bins), f"Bars: {label}: {told}", paint)


def scree(shares: Sequence[float]) -> Html | None:
    """Bars of each component's share of the variance, and a line of their sum."""
    if not shares:
        return None

    def paint(figure: Figure) -> None:
        axes, places = plain_axes(figure, grid="y"), np.arange(1, len(shares) + 1)
        axes.spines["bottom"].set(visible=True, color=MUTED)
        axes.bar(places, shares, 0.7, color=DATA, linewidth=0)
        axes.plot(places, np.cumsum(shares), color=LOCAL, marker="o", markersize=4, markeredgewidth=0)
        axes.set_ylim(0, 1.04)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], [f"{share} %" for share in (0, 25, 50, 75, 100)])
        axes.set_xlabel("component")
        numbers(axes, "x", 8, whole_only=True)

    told = ", ".join(f"{100 * share:.1f} %" for share in shares)
    return render(
        WIDTH, 210, f"Bars: share of the variance that each component explains: {told}; line: their sum", paint
    )
