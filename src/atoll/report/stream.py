"""The report's section about online learning: what the model got wrong in each period, and where drift was seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from atoll.report import charts, svg
from atoll.report.markup import Child, Html, table
from atoll.report.plots import MOST_SITES, WIDTH, numbers
from atoll.report.section import Input, Section, beside, cards, figure, part, text
from atoll.report.svg import DATA, FEDERATED, INK, NEGATIVE, plain_axes, render
from atoll.report.words import counted, fixed, listed, real, told, whole

MOST_ROWS = 200
MOST_CELLS = 40
"""Periods in a map of sites; a longer run's are taken together."""
DETECTORS = {"adwin": "ADWIN", "page-hinkley": "Page-Hinkley"}
FOLLOWS = {
    "note": "It was noted, and nothing else followed.",
    "boost": "In the period after it the sites learned at a higher rate.",
    "reset": "After it the model began anew.",
}
Period = Mapping[str, Any]


def stream(result: Input, details: Input) -> Section | None:
    """Errors by period, the federation's alarms, and how many sites, and which, saw drift."""
    told_all, how = part(result, "output").get("periods"), part(result, "output", "stream")
    found = [one for one in told_all if isinstance(one, Mapping)] if isinstance(told_all, list) else []
    if not found or not how:
        return None
    errors = [real(one.get("error")) for one in found]
    known = [error for error in errors if error is not None]
    alarms = [i for i, one in enumerate(found) if one.get("drift")]
    sharing = len(part(result, "sites"))
    called = how.get("task") in ("binary", "classes")
    unit = "share called wrongly" if called else "absolute error, in halves of the target’s range"
    learned = counted(len(found), "period")
    words: list[Child] = [
        text(
            f"The model was tested on the new records of each of {learned} before it learned from them, so that no "
            f"error is of a record that it knew: on average {fixed(np.mean(known) if known else None)} ({unit})."
        ),
        text(_alarmed(found, alarms, how)),
    ]
    pictures = [
        figure(_course(found, errors, alarms, unit), "Error by period", "before learning from it; lines: drift"),
        figure(_seen(found, sharing), "Sites that saw drift", "each on its own records"),
    ]
    by_site = part(result, "output", "alarms")
    history = [one for one in details.get("history") or [] if isinstance(one, Mapping)]
    losses = {real(one.get("step")): one.get("loss") for one in history}
    lines = [
        [
            one.get("period"), one.get("begins"), told(one.get("rows")), told(one.get("error"), fixed),
            fixed(losses.get(real(one.get("period")))), "drift" if one.get("drift") else "",
            whole(one.get("sites_drifting")),
        ]
        for one in found[:MOST_ROWS]
    ]  # fmt: skip
    header = ["Period", "Begins", "Records", "Error", "Loss in training", "Alarm", "Sites that saw drift"]
    note = "A number is withheld where too few records came." if len(known) < len(found) else None
    if len(found) > MOST_ROWS:
        note = f"The first {MOST_ROWS} of {len(found):,} periods. {note or ''}".strip()
    content = [beside(pictures[0], *words), cards([pictures[1], _by_site(by_site, len(found))])]
    return Section("stream", "Stream", [*content, table("Period by period", header, lines, note=note)])


def _alarmed(found: Sequence[Period], alarms: Sequence[int], how: Mapping[str, Any]) -> str:
    detector = DETECTORS.get(str(how.get("detector")), str(how.get("detector")))
    if not alarms:
        return f"No drift was detected in the federation’s errors ({detector})."
    when = listed([f"{found[i].get('period')} ({found[i].get('begins')})" for i in alarms])
    number = "period" if len(alarms) == 1 else "periods"
    follows = FOLLOWS.get(str(how.get("on_drift")), "")
    return f"Errors rose by more than chance ({detector}) in {number} {when}. {follows} An alarm tells that, not why."


def _course(found: Sequence[Period], errors: Sequence[float | None], alarms: Sequence[int], unit: str) -> Html | None:
    """The error of each period; gaps are periods without enough records."""
    if sum(error is not None for error in errors) < 2:
        return None
    places = [real(one.get("period")) or 0.0 for one in found]
    values = np.array([np.nan if error is None else error for error in errors])

    def paint(drawn: Figure) -> None:
        axes = plain_axes(drawn, grid="y")
        axes.spines["bottom"].set(visible=True)
        for i in alarms:
            axes.axvline(places[i], color=NEGATIVE, linewidth=1.5, dashes=(3, 2), zorder=0.5)
        marker = "o" if len(places) <= 40 else None
        axes.plot(places, values, color=FEDERATED, marker=marker, markersize=4.5, markeredgewidth=0, clip_on=False)
        if alarms:
            axes.text(
                places[alarms[0]], 1.01, "drift", transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                color=INK, fontsize=svg.TEXT_SIZE - 1,
            )  # fmt: skip
        axes.set_xlabel("period")
        numbers(axes, "x", 6, whole_only=True)
        numbers(axes, "y")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.03, y=0.08)

    said = "; ".join(f"{p:g} {fixed(e)}" for p, e in zip(places, errors, strict=True) if e is not None)
    marked = f"; drift in {listed([f'{places[i]:g}' for i in alarms], 12)}" if alarms else ""
    return render(WIDTH, 230, f"Line: {unit}, by period: {said}{marked}", paint)


def _seen(found: Sequence[Period], sites: int) -> Html | None:
    """How many sites saw drift in each period."""
    seen = [real(one.get("sites_drifting")) or 0.0 for one in found]
    if not any(seen):
        return None
    places = [real(one.get("period")) or 0.0 for one in found]

    def paint(drawn: Figure) -> None:
        axes = plain_axes(drawn, grid="y")
        axes.spines["bottom"].set(visible=True)
        axes.bar(places, seen, 0.8, color=DATA, linewidth=0)
        axes.set_xlabel("period")
        numbers(axes, "x", 6, whole_only=True)
        numbers(axes, "y", 4, whole_only=True)
        axes.set_ylim(0, max(*seen, sites) * 1.04)
        axes.margins(x=0.02)

    said = "; ".join(f"{place:g}: {whole(count)}" for place, count in zip(places, seen, strict=True) if count)
    return render(WIDTH, 180, f"Bars: sites that saw drift, of {sites}, by period: {said}", paint)


def _by_site(alarms: Mapping[str, Any], periods: int) -> Html | None:
    """A map of the sites that tell their own alarms."""
    if not alarms:
        return None
    each = -(-periods // MOST_CELLS)
    own_of = {site: [int(at) for at in own if real(at) is not None] for site, own in alarms.items() if own}
    shown = [(site, own_of.get(site, [])) for site in list(alarms)[:MOST_SITES]]
    starts = range(0, periods, each)
    cells = [[float(any(first <= at < first + each for at in own)) for first in starts] for _, own in shown]
    said = "; ".join(f"{site}: {listed(own, 12) if own else 'none'}" for site, own in shown)
    names = [str(first) if i % max(1, len(starts) // 8) == 0 else "" for i, first in enumerate(starts)]
    drawn = charts.heat([site for site, _ in shown], names, cells, f"Map: periods in which a site saw drift: {said}")
    few = f"; the first {MOST_SITES} of {len(alarms)}" if len(alarms) > len(shown) else ""
    return figure(drawn, "Alarms by site", f"of the sites that share their own metrics{few}")
