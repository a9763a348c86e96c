"""Drawings of the epidemic sections: a schematic map, risk by day, forecasts, R_t, and interventions compared.

The map's shapes are schematic: straight lines drawn by hand about each province's place, for finding it, not for
measuring. A region without a shape of its own becomes a tile.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.dates import DayLocator, num2date
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import FuncFormatter

from atoll.report import svg
from atoll.report.charts import CROSS, STRONGEST
from atoll.report.epidemic_found import Day, Interval
from atoll.report.markup import Html, clean
from atoll.report.plots import WIDTH, numbers
from atoll.report.svg import CARD, DATA, FEDERATED, INK, LINE, LOCAL, MUTED, NEGATIVE, plain_axes, render, shortened
from atoll.report.words import NOTHING, WITHHELD, compact, fixed, whole

CLEAR = {"facecolor": CARD, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
"""Behind a number that a line would cross."""
MOST_DAYS = 28
"""Days in the map of risk by region and day: the latest."""
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "anhui": (
        (116.0, 34.6), (117.2, 34.1), (118.1, 33.5), (118.4, 32.7), (119.2, 32.6), (118.6, 31.6), (119.4, 31.1),
        (119.5, 30.5), (118.8, 29.9), (118.1, 29.5), (117.1, 29.7), (116.2, 30.1), (115.9, 31.0), (115.0, 32.3),
        (115.8, 33.1), (115.4, 33.7),
    ),
    "jiangsu": (
        (116.4, 34.7), (117.9, 34.7), (119.2, 35.1), (119.8, 34.4), (120.4, 33.9), (120.9, 32.8), (121.9, 31.9),
        (120.9, 31.55), (120.9, 31.0), (120.5, 30.9), (119.5, 31.2), (118.7, 31.65), (119.3, 32.6), (118.5, 32.8),
        (118.2, 33.6), (117.3, 34.2),
    ),
    "shanghai": ((121.0, 31.4), (121.4, 31.75), (121.95, 31.6), (122.0, 30.95), (121.3, 30.75), (121.0, 30.95)),
    "zhejiang": (
        (119.6, 31.1), (120.5, 30.8), (121.2, 30.6), (120.8, 30.25), (121.8, 30.0), (122.2, 29.6), (121.7, 28.8),
        (121.5, 28.2), (120.9, 27.8), (120.5, 27.2), (119.7, 27.5), (118.9, 28.2), (118.2, 28.9), (118.2, 29.5),
        (118.9, 29.9), (119.6, 30.5),
    ),
}  # fmt: skip
"""Degrees east and north, about."""
NAMES = {"上海": "shanghai", "江苏": "jiangsu", "浙江": "zhejiang", "安徽": "anhui"}
PLACES = {"shanghai": (122.25, 31.45, "left"), "anhui": (117.05, 31.9, "center"), "jiangsu": (119.5, 33.2, "center"),
          "zhejiang": (120.1, 29.2, "center")}  # fmt: skip
"""Where a shape's words stand; Shanghai's beside it, on the sea."""


def shape_of(region: object) -> str:
    """The name of the region's shape; "" if it has none."""
    name = clean(region).strip().lower().removesuffix("市").removesuffix("省")
    name = NAMES.get(name, name)
    return name if name in SHAPES else ""


def risk_map(risks: Mapping[str, tuple[float | None, str, bool]], label: str) -> Html | None:
    """Regions coloured by risk: name → (risk in 0–1 or None, its words where there is none, alarm).

    The schematic map if every region has a shape, otherwise tiles.
    """
    if not risks:
        return None
    shapes = {region: shape_of(region) for region in risks}
    mapped = all(shapes.values()) and len(set(shapes.values())) == len(shapes)
    across = min(len(risks), 4)

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure)
        for i, (region, (risk, missing, alarm)) in enumerate(risks.items()):
            colour: dict[str, Any] = {"facecolor": NEGATIVE if risk is not None else LINE, "edgecolor": "none"}
            alpha = opacity(risk) if risk is not None else 0.35
            said = missing if risk is None else fixed(risk, 2)
            said += " ▲" if alarm else ""
            if mapped:
                corners = SHAPES[shapes[region]]
                axes.add_patch(Polygon(corners, closed=True, alpha=alpha, **colour))
                axes.add_patch(Polygon(corners, closed=True, fill=False, edgecolor=MUTED, linewidth=1.2))
                x, y, side = PLACES[shapes[region]]
                _named(axes, x, y, side, region, said, 0.36, risk is not None)
            else:
                x, y = float(i % across), -float(i // across)
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, alpha=alpha, **colour))
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor=MUTED, linewidth=1))
                _named(axes, x, y, "center", shortened(region, 11), said, 0.26, risk is not None)
        axes.set_xticks([])
        axes.set_yticks([])
        if mapped:
            axes.set_xlim(114.7, 124.4)
            axes.set_ylim(26.9, 35.3)
            axes.set_aspect(1 / math.cos(math.radians(31)))
        else:
            axes.set_xlim(-0.52, across - 0.48)
            axes.set_ylim(-((len(risks) - 1) // across) - 0.5, 0.5)

    height = 330.0 if mapped else 74.0 * ((len(risks) - 1) // across + 1) + 8
    return render(WIDTH, height, label, paint)


def _named(axes: Any, x: float, y: float, side: str, name: object, said: str, gap: float, known: bool) -> None:
    axes.text(x, y + gap / 2, clean(name), ha=side, va="bottom", color=INK)
    axes.text(x, y, said, ha=side, va="top", color=INK, fontsize=13 if known else svg.TEXT_SIZE,
              fontweight="bold" if known else "normal", style="normal" if known else "italic")  # fmt: skip


def risk_by_day(rows: Mapping[str, Mapping[Day, float] | None], label: str) -> Html | None:
    """A heat map, a row for each region and a column for each of the latest days; the newest risk on the right.

    A row of None is withheld; a day that a region has no value of has a cross.
    """
    days = sorted({day for line in rows.values() for day in line or ()})[-MOST_DAYS:]
    if not days:
        return None
    span = [days[0] + dt.timedelta(n) for n in range((days[-1] - days[0]).days + 1)][-MOST_DAYS:]

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure)
        for y, line in enumerate(rows.values()):
            if line is None:
                axes.text((len(span) - 1) / 2, y, WITHHELD, ha="center", va="center_baseline", color=MUTED)
                continue
            for x, day in enumerate(span):
                if (risk := line.get(day)) is None:
                    axes.text(x, y, CROSS, ha="center", va="center_baseline", color=MUTED, fontsize=8)
                else:
                    share = opacity(risk)
                    axes.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, facecolor=NEGATIVE, alpha=share,
                                             edgecolor="none"))  # fmt: skip
            newest = line.get(span[-1])
            axes.text(len(span) - 0.2, y, NOTHING if newest is None else fixed(newest, 2), va="center_baseline",
                      color=INK)  # fmt: skip
        every = 7 if len(span) > 8 else 1 if len(span) < 5 else 2
        shown = list(range(len(span) - 1, -1, -every))[::-1]
        axes.set_xticks(shown, [short(span[x]) for x in shown])
        axes.set_yticks(range(len(rows)), [shortened(name, 14) for name in rows], color=INK)
        axes.set_xlim(-0.6, len(span) - 0.4 + 0.11 * len(span))
        axes.set_ylim(len(rows) - 0.4, -0.6)

    return render(WIDTH, 34 + 26 * len(rows), label, paint)


def risk_scale(risk: float, marks: Sequence[tuple[str, float]], label: str) -> Html:
    """A scale from 0 to 1 with the risk on it; *marks*: levels and where each begins."""

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure)
        parts = 40
        for i in range(parts):
            share = opacity((i + 0.5) / parts)
            axes.add_patch(Rectangle((i / parts, 0), 1 / parts, 1, facecolor=NEGATIVE, alpha=share, edgecolor="none"))
        ends = [*(begin for _, begin in marks[1:]), 1.0]
        for (name, begin), end in zip(marks, ends, strict=False):
            if begin > 0:
                axes.plot([begin, begin], [-0.12, 1.12], color=INK, linewidth=1)
            if end - begin >= 0.0195 * len(name):
                axes.text(begin, -1.05, shortened(name, 12), va="top", color=INK, fontsize=svg.TEXT_SIZE - 1)
        place = min(max(risk, 0.0), 1.0)
        axes.plot([place], [1.22], "v", color=INK, markersize=9, clip_on=False)
        side = "left" if place < 0.12 else "right" if place > 0.88 else "center"
        axes.text(place, 1.55, fixed(risk, 2), ha=side, va="bottom", color=INK, fontsize=14, fontweight="bold")
        for tick in sorted({0.0, 1.0, *(begin for _, begin in marks)}):
            ha = "right" if tick == 1 else "left"
            axes.text(tick, -0.2, svg.ticks(tick), ha=ha, va="top", color=MUTED)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-1.9 if marks else -1.0, 2.6)

    return render(WIDTH, 116 if marks else 96, label, paint)


def line_by_day(
    points: Mapping[Day, Interval], label: str, *, colour: str = FEDERATED, mark: float | None = None,
    top: float | None = None,
) -> Html | None:  # fmt: skip
    """A line with its band; *mark*: a value with a dashed line; *top*: the axis reaches from 0 to it."""
    if len(points) < 2:
        return None
    days = sorted(points)

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure, grid="y")
        axes.spines["bottom"].set(visible=True, color=MUTED)
        _band(axes, points, colour)
        if mark is not None:
            axes.axhline(mark, color=INK, linewidth=1, dashes=(3, 3))
        _newest(axes, days[-1], points[days[-1]][0])
        if top is not None:
            axes.set_ylim(0, top)
        else:
            axes.set_ylim(bottom=0)
        numbers(axes, "y")
        _dates(axes, days[0], days[-1])

    return render(WIDTH, 190, label, paint)


def outlook(
    past: Mapping[Day, float],
    seir: Mapping[Day, Interval],
    learned: Sequence[tuple[int, Interval]],
    today: Day | None,
    label: str,
) -> Html | None:
    """New cases a day: what was reported, the SEIR projection, and the learned forecasts as means a day.

    learned: [(days ahead, sum over them)], from *today* on. Each is drawn as a bar over the days that the one before it
    does not cover, at the mean a day of what it adds, so that the bars' areas are the forecast sums.
    """
    if today is None or not (past or seir):
        return None
    first = min([*past, today])
    last = max([*seir, *(today + dt.timedelta(days) for days, _ in learned), today])

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure, grid="y")
        axes.spines["bottom"].set(visible=True, color=MUTED)
        axes.bar(list(past), list(past.values()), 0.86, color=DATA, linewidth=0)
        if seir:
            _band(axes, seir, LOCAL)
        before, summed = 0, 0.0
        for days, (mean, _, _) in learned:
            width = days - before
            if width > 0:
                begin = today + dt.timedelta(before + 1)
                height = max(mean - summed, 0.0) / width
                axes.bar(begin, height, width - 0.14, align="edge", color=FEDERATED, alpha=0.55, linewidth=0)
                before, summed = days, mean
        axes.axvline(today + dt.timedelta(hours=12), color=INK, linewidth=1, dashes=(3, 3))
        axes.set_ylim(bottom=0)
        numbers(axes, "y")
        _dates(axes, first, last)

    return render(WIDTH, 230, label, paint)


def horizons(rows: Sequence[tuple[int, Interval | None, Interval | None]], label: str) -> Html | None:
    """Of each horizon in days the learned forecast of the sum and SEIR's beside it, with their intervals."""
    shown = [row for row in rows if row[1] is not None or row[2] is not None]
    if not shown:
        return None
    ends = [end for _, *pair in shown for one in pair if one is not None for end in one if end is not None]
    reach = max([*ends, 1e-9])

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure, grid="x")
        for place, (_, *pair) in enumerate(shown):
            for one, colour, off in zip(pair, (FEDERATED, LOCAL), (-0.19, 0.19), strict=True):
                if one is None:
                    continue
                mean, low, high = one
                if low is not None and high is not None:
                    axes.plot([low, high], [place + off] * 2, color=colour, linewidth=3, alpha=0.6)
                axes.plot([mean], [place + off], "o", color=colour, markersize=7)
                end = max(mean, high or mean)
                axes.text(
                    end + 0.025 * reach,
                    place + off,
                    whole(mean) if mean < 1e5 else compact(round(mean)),
                    va="center_baseline",
                    color=INK,
                )
        axes.set_yticks(range(len(shown)), [f"{days} d" for days, *_ in shown], color=INK)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, reach * 1.16)
        numbers(axes, "x", 5)

    return render(WIDTH, 34 + 42 * len(shown), label, paint)


def compared(rows: Sequence[tuple[str, Interval]], label: str) -> Html | None:
    """Cases under each intervention as dots with intervals; the first is drawn as what the others are held against."""
    if not rows:
        return None
    reach = max(end for _, one in rows for end in one if end is not None) or 1.0

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure, grid="x")
        for place, (_, (mean, low, high)) in enumerate(rows):
            colour = MUTED if place == 0 else LOCAL
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.6)
            axes.plot([mean], [place], "o", color=colour, markersize=7)
            axes.text(mean, place - 0.2, whole(mean), ha="center", va="bottom", color=INK, bbox=CLEAR)
        axes.axvline(rows[0][1][0], color=MUTED, linewidth=1, dashes=(3, 3), zorder=0.5)
        axes.set_yticks(range(len(rows)), [shortened(name, 18) for name, _ in rows], color=INK)
        axes.set_ylim(len(rows) - 0.5, -0.75)
        axes.set_xlim(0, reach * 1.08)
        numbers(axes, "x", 4)

    return render(WIDTH, 40 + 36 * len(rows), label, paint)


def opacity(risk: float) -> float:
    """Of a risk's colour, the same in every drawing: the scale is their legend."""
    return 0.05 + (STRONGEST - 0.05) * min(max(risk, 0.0), 1.0)


def ranked(rows: Sequence[tuple[str, float]], label: str) -> Html | None:
    """Shares of a whole as bars, each below its name, which may be long."""
    if not rows:
        return None
    reach = max(share for _, share in rows) or 1.0

    def paint(figure: Figure) -> None:
        axes: Any = plain_axes(figure)
        for place, (name, share) in enumerate(rows):
            axes.text(0, place - 0.17, shortened(name, 28), va="bottom", color=INK)
            axes.barh(place, share, 0.3, color=DATA, linewidth=0)
            axes.text(share + 0.02 * reach, place, f"{100 * share:.0f} %", va="center_baseline", color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlim(0, 1.16 * reach)
        axes.set_ylim(len(rows) - 0.7, -0.85)

    told = "; ".join(f"{name} {100 * share:.0f} %" for name, share in rows)
    return render(WIDTH, 14 + 36 * len(rows), f"Bars: {label}: {told}", paint)


def short(day: Day) -> str:
    """ "Feb 1"."""
    return f"{day:%b} {day.day}"


def _band(axes: Any, points: Mapping[Day, Interval], colour: str) -> None:
    days = sorted(points)
    sides = [[points[day][side] for day in days] for side in (1, 2)]
    if all(end is not None for side in sides for end in side):
        low, high = (np.array(side, float) for side in sides)
        axes.fill_between(days, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(days, [points[day][0] for day in days], color=colour)


def _newest(axes: Any, day: Day, value: float) -> None:
    axes.plot([day], [value], "o", color=INK, markersize=5, clip_on=False)
    axes.annotate(fixed(value, 2), (day, value), (-2, 8), textcoords="offset points", ha="right", color=INK, bbox=CLEAR)


def _dates(axes: Any, first: Day, last: Day) -> None:
    span = (last - first).days
    every: Any = DayLocator
    axes.xaxis.set_major_locator(every(interval=max(1, round(span / 4))))
    day_of: Any = num2date
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(day_of(value))))
    axes.margins(x=0.06)
