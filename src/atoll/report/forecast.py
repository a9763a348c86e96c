"""forecast.html: how a plan would go at a fleet of sites, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atoll.report import charts
from atoll.report.html import head_of
from atoll.report.markup import Child, Html, element, table
from atoll.report.plots import WIDTH, numbers
from atoll.report.section import figure, terms
from atoll.report.svg import DATA, LOCAL, distinct, plain_axes, render
from atoll.report.words import counted, duration, size, whole

DRAWN_ROUNDS = 2000
TABLE_ROUNDS = 100


def write_forecast(path: Path, found: Mapping[str, Any]) -> None:
    """Write the page of a forecast, as its ``to_json`` tells it, to *path*, as UTF-8."""
    path.write_bytes(page(found).encode())


def page(found: Mapping[str, Any]) -> str:
    """The whole page, as text."""
    head = head_of(f"{found['study']} – Atoll forecast")
    traffic = found["traffic"]
    tiles: list[tuple[Child, Child]] = [
        ("wall time", duration(found["seconds"])),
        ("sites", whole(found["sites"])),
        ("rounds", whole(found["rounds"])),
        ("traffic", size(traffic["to_sites_bytes"] + traffic["from_sites_bytes"])),
        ("of a site", size(traffic["site_median_bytes"])),
        ("dropouts", whole(found["num_dropouts"])),
    ]
    facts = (
        f"{found['program']} under {found['protection']}. A local step takes {duration(found['speed']['step_s'])}, "
        f"{found['speed']['how']}. Fleet seed {found['seed']}. Plan {found['plan_hash']}."
    )
    main = element(
        "main",
        element("h1", f"{found['study']}: {duration(found['seconds'])} at {counted(found['sites'], 'site')}"),
        element("p", _warning(found)) if _warning(found) else None,
        terms(tiles, "tiles"),
        element("p", facts),
        figure(timeline(found["timeline"]), "When each round ends", "the light part: the median site has answered"),
        figure(waiting(found["waiting"]), "Who is waited for", "seconds that all others waited for this site alone"),
        _rounds(found["timeline"]),
    )
    return f"<!doctype html>\n{element('html', head, distinct(element('body', main)), lang='en')}\n"


def _warning(found: Mapping[str, Any]) -> str:
    if found["failed"]:
        return f"The run would fail: {found['failed']}"
    return "" if found["complete"] else "How many rounds follow depends on the data: these are the ones that are known."


def timeline(rounds: Sequence[Mapping[str, Any]]) -> Html | None:
    """Each round as a bar from when it begins to when it ends, below the one before."""
    shown = [one for one in rounds if one["asked"]][:DRAWN_ROUNDS]
    if not shown:
        return None

    def paint(drawn: Figure) -> None:
        axes = plain_axes(drawn, grid="x")
        places = range(len(shown))
        begins = [one["began_s"] for one in shown]
        axes.barh(places, [one["seconds"] for one in shown], 0.8, begins, color=LOCAL, linewidth=0)
        typical = [min(one["typical_s"], one["seconds"]) for one in shown]
        axes.barh(places, typical, 0.8, begins, color=DATA, linewidth=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel("round")
        numbers(axes, "x", 5)
        numbers(axes, "y", 6, whole_only=True)
        axes.set_ylim(len(shown) - 0.4, -0.6)

    end = max(one["began_s"] + one["seconds"] for one in shown)
    return render(2 * WIDTH, min(120 + 6 * len(shown), 420), f"Timeline of {len(shown)} rounds, {end:.1f} s", paint)


def waiting(sites: Sequence[Mapping[str, Any]]) -> Html | None:
    """For whom, and how long."""
    rows = [(one["site"], one["others_waited_s"]) for one in sites if one["others_waited_s"] > 0][:12]
    return charts.bars(rows, "seconds waited for a site", form=duration) if rows else None


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Html:
    shown = rounds[:TABLE_ROUNDS]
    lines = [
        (str(one["number"] + 1), one["name"], one["last"], duration(one["began_s"]), duration(one["seconds"]),
         whole(one["asked"]), whole(one["answered"]), whole(one["late"]), whole(one["lost"]))
        for one in shown
    ]  # fmt: skip
    note = f"The first {len(shown)} of {len(rounds):,}; forecast.json has more." if len(rounds) > len(shown) else None
    columns = ("round", "asks", "waits for", "begins", "takes", "asked", "answered", "late", "lost")
    return table("Rounds", columns, lines, text_columns=3, note=note)
