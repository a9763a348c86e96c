"""atoll daily: the job that an operator schedules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import show
from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.runtime.catalogue import load_installed
from atoll.runtime.daily import Federation, Made, OnThisMachine, for_day, locked, make_day, of_day
from atoll.runtime.home import CoordinatorHome
from atoll.runtime.sandbox import read_sites
from atoll.runtime.serve import settle

PARTIAL = 3
"""Exit code for a day that was made without some of the sites."""


class Where(StrEnum):
    """Where the parties run."""

    local = "local"
    grpc = "grpc"


def daily(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan (YAML).")],
    day: Annotated[str | None, typer.Option("--day", metavar="DAY", help="An earlier day (2020-02-01).")] = None,
    sites: Annotated[Path | None, typer.Option("--sites", metavar="SITES.yaml", help="Site name → source.")] = None,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Folder that the sources' paths are relative to.")
    ] = Path(),
    transport: Annotated[Where, typer.Option("--transport", help="One process, or one per party.")] = Where.local,
    home: Annotated[
        Path | None, typer.Option("--home", metavar="DIR", help="A live coordinator's folder: ask its federation.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where days, history and ledgers are.")] = Path(
        "daily"
    ),
    again: Annotated[bool, typer.Option("--again", help="Make the day anew, though it was made before.")] = False,
    machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Make the newest day of a plan, once: a day that was made is told again, one that was broken off is finished.

    Exit codes: 0 made; 3 made without some of the sites (partial); 1 not made, with the reason."""
    load_installed()
    settle()
    plan = for_day(Plan.load(plan_file), None)
    with locked(out) as lock, contextlib.ExitStack() as open_:
        parties: OnThisMachine | Federation
        if home is not None:
            parties = Federation(CoordinatorHome(home))
        else:
            parties = OnThisMachine(plan, read_sites(_beside(plan_file, sites)), data, out, transport.value, (lock,))
        open_.callback(parties.close)
        with show.progress(plan.name, quiet=machine) as tell:
            made = make_day(plan, parties, out, day=day, again=again, page=show.report, tell=tell)
    if machine:
        show.as_json({**made.entry, "before": made.before, "output": made.result["output"]})
    else:
        _tell(made, out)
    if made.entry["partial"]:
        raise SystemExit(PARTIAL)


def _beside(plan_file: Path, sites: Path | None) -> Path:
    found = sites or plan_file.parent / "sites.yaml"
    if sites is None and not found.is_file():
        raise PlanError("sites.missing", "no SITES.yaml was given", field="sites", remedy="--sites SITES.yaml")
    return found


def _tell(made: Made, out: Path) -> None:
    entry, told = made.entry, of_day(made.result)
    joint = told.get("joint") or {}
    text = f"{entry['day']}: {made.result['study']}"
    if (risk := joint.get("risk")) is not None:
        text += f", joint risk {risk:.3g}"
    text += "".join(f", {joint[name]}" for name in ("level", "action") if joint.get(name))
    show.say(text, style="bold")
    _tell_regions(told.get("regions") or {})
    for site, why in entry["absent"].items():
        show.say(f"absent: {site}" + (f" ({why})" if why else ""), style="yellow")
    for site in entry["late"] or []:
        show.say(f"late: {site} has no rows of that day yet, or of fewer cities than lately", style="yellow")
    if entry["partial"]:
        show.say(
            "partial: of those that were there; --again makes it anew, where the sites' policies allow it",
            style="yellow",
        )
    if note := (told.get("forecast") or {}).get("note"):
        show.say(str(note), style="yellow")
    if made.before:
        show.say(f"made before, at {entry['made']}; nobody was asked", style="dim")
    show.out.print(f"see [bold]{out / entry['day']}[/]: report.html, result.json; all days: {out / 'history.json'}")
    show.out.print(f"verify the ledgers with: atoll ledger verify {out}/ledger/*.jsonl", style="dim")


def _tell_regions(regions: Mapping[str, Any]) -> None:
    lines = []
    for name, one in regions.items():
        if one is None:
            lines.append((name, "withheld", "–", "–"))
        else:
            risk = "–" if one.get("risk") is None else f"{one['risk']:.3g}"
            lines.append(
                (name, risk, one.get("level") or "–", one.get("alarm_since") or "yes" if one.get("alarm") else "–")
            )
    if lines:
        show.rows(("region", "risk", "level", "alarm since"), lines)
