"""atoll forecast: how long a plan would take at a fleet of sites, and what would travel, before anyone joins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from atoll.cli import show
from atoll.contract.plan import Plan
from atoll.models.allowed import allow, asked_in
from atoll.runtime.catalogue import load_installed
from atoll.runtime.fleet import Fleet
from atoll.runtime.forecast import forecast as forecast_of
from atoll.runtime.forecast import measured, told
from atoll.runtime.results import to_plain, write_json
from atoll.runtime.serve import settle
from atoll.runtime.study import check_plan, settled

SHOWN = 12


def forecast(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan (YAML).")],
    fleet: Annotated[Path, typer.Option("--fleet", metavar="FLEET", help="What the sites are like (YAML or CSV).")],
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Draw so many sites, kinds in the same shares.")
    ] = None,
    step_s: Annotated[
        float | None, typer.Option("--step-s", help="Seconds of a local step (default: measured).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write forecast.json and forecast.html.")
    ] = None,
    machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Predict a plan's time and traffic at a fleet of sites, by running it without data in virtual time: who is waited
    for, who drops out, what travels. Nobody is asked, and nothing is read."""
    load_installed()
    plan = Plan.load(plan_file)
    allow(asked_in(plan.params))  # it is one's own
    settle()
    check_plan(plan)
    plan, sites = settled(plan), Fleet.load(fleet, count)
    speed = told(plan, step_s) if step_s is not None else measured(plan, float(np.median(sites["rows"])))
    found: dict[str, Any] = to_plain(forecast_of(plan, sites, speed).to_json())
    if out is not None:
        from atoll.report.forecast import write_forecast

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "forecast.json", found)
        write_forecast(out / "forecast.html", found)
    if machine:
        show.as_json(found)
        return
    _tell(found)
    if out is not None:
        show.out.print(f"written to [bold]{out}[/]: forecast.html, forecast.json")


def _tell(found: Mapping[str, Any]) -> None:
    traffic, speed = found["traffic"], found["speed"]
    show.out.print(f"[bold]{found['study']}[/]: {found['program']} under {found['protection']}, {found['sites']} sites")
    total = show.size(traffic["to_sites_bytes"] + traffic["from_sites_bytes"])
    lines = [
        ("wall time", _time(found["seconds"])),
        ("rounds", f"{found['rounds']:,}"),
        ("traffic of all sites", total),
        ("of a site", f"{show.size(traffic['site_median_bytes'])} (most {show.size(traffic['site_most_bytes'])})"),
        ("dropouts", f"{found['num_dropouts']:,}"),
        ("answers left out as late", f"{found['late']:,}"),
        ("a local step", f"{speed['step_s'] * 1e3:.3g} ms, {speed['how']}"),
    ]
    show.rows(("forecast", ""), lines)
    waiting = [one for one in found["waiting"] if one["others_waited_s"] > 0][:SHOWN]
    if waiting:
        told_ = [(one["site"], one["last_in_rounds"], _time(one["others_waited_s"]), _time(one["computing_s"]),
                  show.size(one["bytes"])) for one in waiting]  # fmt: skip
        show.rows(("waited for", "last in rounds", "others waited", "computing", "traffic"), told_)
    if found["failed"]:
        show.say(f"the run would fail: {found['failed']}", style="bold red")
    elif not found["complete"]:
        show.say("how many rounds follow depends on the data: these are the ones that can be told", style="yellow")


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
