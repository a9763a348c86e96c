"""atoll simulate: a plan on many simulated sites in this process, or in a few."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import show
from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.runtime.catalogue import load_installed
from atoll.runtime.fleet import Fleet
from atoll.runtime.forecast import told
from atoll.runtime.sandbox import read_sites
from atoll.runtime.simulated_run import dealt, run_simulated
from atoll.runtime.workers import Data

MOST = 20
"""Sites in the terminal; result.json has all."""


def simulate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan (YAML).")],
    sites: Annotated[Path | None, typer.Option("--sites", metavar="SITES.yaml", help="Site name → source.")] = None,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="What the sources' paths are relative to.")
    ] = Path(),
    split: Annotated[int, typer.Option("--split", help="Deal the rows of the one source to so many sites.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that share the sites.")] = 1,
    batch: Annotated[bool, typer.Option(help="Compute sites of one model together where that is possible.")] = True,
    fleet: Annotated[Path | None, typer.Option("--fleet", metavar="FLEET", help="Learn in its virtual time.")] = None,
    step_s: Annotated[
        float | None, typer.Option("--step-s", help="Seconds of a local step (default: measured).")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results go.")] = Path("out"),
    machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Run a plan on simulated sites: the same results as atoll run, without wire, signatures and ledgers; thousands
    of sites at a time. With --fleet in virtual time: as if sites were as fast, and as well connected, as it says."""
    load_installed()
    plan = Plan.load(plan_file)
    beside = plan_file.parent / "sites.yaml"
    where = sites or (beside if beside.is_file() else None)
    if where is None:
        raise PlanError("sites.missing", "no SITES.yaml was given", field="sites", remedy="--sites SITES.yaml")
    sources = read_sites(where)
    these: Data = dealt(sources, split) if split else sources
    speed = None if step_s is None else told(plan, step_s)
    known = Fleet.load(fleet) if fleet is not None else None
    with show.progress(plan.name, quiet=machine) as tell:
        result, details = run_simulated(plan, these, data, out, fleet=known, speed=speed, workers=workers, batch=batch,
                                        on_event=tell)  # fmt: skip
    show.report(out / "report.html", result, details)
    if machine:
        show.as_json(result)
        return
    _tell(result, out)


def _tell(result: Mapping[str, Any], out: Path) -> None:
    virtual = " of virtual time" if "virtual_time" in result else ""
    show.out.print(f"[bold]{result['study']}[/]: {result['program']} under {result['protection']}, "
                   f"{len(result['sites'])} simulated sites, {result['rounds']} rounds, "
                   f"{result['seconds']:.2f} s{virtual}")  # fmt: skip
    found = result["metrics"]
    names = list(found["federated"])[:6]
    if names:
        lines = [["all sites", *_cells(found["federated"], names)]]
        lines += [[site, *_cells(own["federated"], names)] for site, own in list(found["per_site"].items())[:MOST]]
        show.rows(("held-out rows of", *names), lines)
        if len(result["sites"]) > MOST:
            show.out.print(f"and {len(result['sites']) - MOST} more sites: see result.json", style="dim")
    if "virtual_time" in result:
        told = result["virtual_time"]
        show.out.print(f"{told['dropouts']} dropouts, {told['late']} answers left out as too late")
    show.suspects(result)
    wire = result["wire"]
    sent, received = show.size(wire["to_sites_bytes"]), show.size(wire["from_sites_bytes"])
    show.out.print(f"traffic, were it real: {sent} to the sites, {received} back")
    show.out.print(f"written to [bold]{out}[/]: report.html, result.json, model/")


def _cells(values: Mapping[str, Any], names: list[str]) -> list[str]:
    return ["–" if not isinstance(values.get(name), int | float) else f"{values[name]:.4g}" for name in names]
