"""atoll check, atoll run and atoll demo: plans tried on one machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from atoll.cli import demo_data, show, tables
from atoll.contract.errors import AtollError, PlanError, SchemaError, refuse_all
from atoll.contract.plan import Plan
from atoll.crypto.identity import verify
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.data.table import Table
from atoll.ledger.verify import verify_file, verify_together
from atoll.models.allowed import allow, asked_in
from atoll.privacy.dp.noise import delta_warning
from atoll.runtime.catalogue import load_installed
from atoll.runtime.checkup import compared
from atoll.runtime.estimate import LINK, costs, recommended
from atoll.runtime.noise import noise_of
from atoll.runtime.sandbox import read_sites, run_sandbox
from atoll.runtime.study import check_plan, settled


class TransportName(StrEnum):
    """Where the parties run."""

    local = "local"
    grpc = "grpc"
    ray = "ray"


PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="The plan (YAML).")]
SitesFile = Annotated[Path | None, typer.Option("--sites", metavar="SITES.yaml", help="Site name → source.")]
DataDir = Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder that the sources' paths are relative to.")]
OutDir = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results go.")]
Machine = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Transport = Annotated[TransportName, typer.Option("--transport", help="One process, one per party, or a Ray cluster.")]
Cluster = Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="A running cluster (default: one here).")]


def _load(plan_file: Path, sites_file: Path | None, data: Path) -> tuple[Plan, dict[str, SourceSpec], Path]:
    load_installed()
    plan = Plan.load(plan_file)
    if sites_file is None:
        beside = plan_file.parent / "sites.yaml"
        sites_file = beside if beside.is_file() else None
    sources = read_sites(sites_file) if sites_file is not None else {}
    return plan, sources, data


def check(plan_file: PlanFile, sites: SitesFile = None, data: DataDir = Path(), machine: Machine = False) -> None:
    """Check a plan, every site's table against its data contract, and the tables against each other: what
    blocks, what warns, how to mend it. All on this machine; nothing is sent anywhere."""
    plan, sources, base = _load(plan_file, sites, data)
    found: dict[str, Any] = {"plan": plan.name, "plan_hash": plan.hash, "problems": [], "sites": {}, "warnings": []}
    problems: list[AtollError] = []
    num_sites = len(sources) or len(plan.cohort.sites) or plan.cohort.min_sites
    allow(asked_in(plan.params))  # it is one's own
    try:
        check_plan(plan)
        plan = settled(plan)
        noise_of(plan, num_sites)
    except AtollError as error:
        problems.append(error)
    estimates = [] if problems else costs(plan, num_sites)
    found["protections"] = [asdict(cost) for cost in estimates]
    if sources and len(sources) < plan.cohort.min_sites:
        problems.append(_too_few(plan, len(sources)))
    sound, labels = not problems, dict[str, set[float]]()
    for name, spec in sources.items():
        try:
            table = SiteData.read(spec, plan, base, name).base()
            if sound:
                labels[name] = _labels(plan, table)
            found["sites"][name] = {"rows": len(table), "ok": True, "dropped": dict(table.dropped)}
        except AtollError as error:
            found["sites"][name] = {"ok": False}
            problems.append(error.at(site=name))
    if len(labels) == len(sources):
        problems += _check_labels(plan, labels)
    sane = {name: spec for name, spec in sources.items() if found["sites"][name]["ok"]}
    warnings = compared(plan, sane, base) if len(sane) > 1 else []
    found["warnings"] = [asdict(warning) for warning in warnings]
    rows = [int(seen["rows"]) for seen in found["sites"].values() if seen["ok"]]
    found["privacy_warnings"] = _privacy_warnings(plan, num_sites, sum(rows))
    found["data_classes"] = {}
    for name, column in plan.table.columns.items():
        for kind in sorted(column.data_classes):
            found["data_classes"].setdefault(kind, []).append(name)
    found["problems"] = [{**error.public(), "where": error.where} for error in problems]
    if machine:
        show.as_json(found)
        raise SystemExit(1 if problems else 0)
    under = f" under {plan.protection.sum}" if plan.protection.sum else ""  # of a plan that is refused none is chosen
    show.out.print(f"plan [bold]{plan.name}[/]  {plan.program}{under}")
    show.out.print(f"hash {plan.hash}", style="dim")
    if found["sites"]:
        words = {True: "keeps the contract", False: "blocked"}
        lines = [
            (name, seen.get("rows", "–"), show.left_out(seen.get("dropped", {})), words[seen["ok"]])
            for name, seen in found["sites"].items()
        ]
        show.rows(("site", "rows", "left out", "table"), lines)
    for kind, names in found["data_classes"].items():
        show.say(f"{kind} data: {', '.join(names)} (a site keeps it from programs by its policy's 'withhold')")
    show.findings(warnings)
    for warning in found["privacy_warnings"]:
        show.say(f"warning: {warning}", style="yellow")
    if estimates:
        show.protections(estimates, recommended(estimates), plan.protection.sum, num_sites, LINK)
    refuse_all(PlanError, "check.blocked", problems)
    show.out.print("[green]nothing blocks this plan[/]")


def _privacy_warnings(plan: Plan, num_sites: int, num_rows: int) -> list[str]:
    """What a promise of privacy is worth little for."""
    if plan.privacy is None:
        return []
    warning = delta_warning(plan.privacy.delta, num_sites if plan.privacy.unit == "site" else num_rows)
    return [warning] if warning else []


def _labels(plan: Plan, table: Table) -> set[float]:
    """The values of the program's target, as far as the recipe yields it without statistics."""
    target = str(plan.params.get("target", ""))
    if target not in table.columns or not table.schema.columns[target].numeric:
        return set()
    values = set(np.unique(table[target][~np.isnan(table[target])]).tolist())
    if not values:
        raise SchemaError(
            "schema.no-labels", f"column {target!r}: every label is missing", field=target,
            remedy="check the label column, or leave the site out",
        )  # fmt: skip
    return values


def _check_labels(plan: Plan, labels: Mapping[str, set[float]]) -> list[AtollError]:
    """A target with one value in the whole cohort teaches nothing."""
    there = set[float]().union(*labels.values())
    if len(there) != 1:
        return []
    target = str(plan.params["target"])
    message = f"the target {target!r} has the same value in every row of the cohort"
    return [SchemaError("schema.constant-label", message, field=target, remedy="choose another target, or more sites")]


def _too_few(plan: Plan, there: int) -> PlanError:
    return PlanError(
        "cohort.too-small", f"the plan demands {plan.cohort.min_sites} sites, and {there} are there",
        field="cohort.min_sites", remedy="add sites, or lower min_sites",
    )  # fmt: skip


def run(
    plan_file: PlanFile,
    sites: SitesFile = None,
    data: DataDir = Path(),
    transport: Transport = TransportName.local,
    out: OutDir = Path("out"),
    seed: Annotated[int | None, typer.Option("--seed", help="Use another seed than the plan's.")] = None,
    cluster: Cluster = None,
    machine: Machine = False,
) -> None:
    """Run a plan in the sandbox: all sites on this machine, results and ledgers into --out."""
    plan, sources, base = _load(plan_file, sites, data)
    if not sources:
        raise PlanError("sites.missing", "no SITES.yaml was given", field="sites", remedy="--sites SITES.yaml")
    if seed is not None:
        plan = Plan.from_json({**plan.to_json(), "run": {**plan.to_json()["run"], "seed": seed}})
    if len(sources) < plan.cohort.min_sites:
        raise _too_few(plan, len(sources))
    out.mkdir(parents=True, exist_ok=True)
    with show.progress(plan.name, quiet=machine) as tell:
        result, details = run_sandbox(plan, sources, base, out, transport.value, tell, cluster)
    show.report(out / "report.html", result, details)
    if machine:
        show.as_json(result)
        return
    _tell_result(result, out)


SHOWN = ("auc", "accuracy", "balanced_accuracy", "log_loss", "f1", "macro_f1", "rmse", "mae", "r2")
"""Metrics in the terminal; result.json has all."""


def _tell_result(result: Mapping[str, Any], out: Path) -> None:
    show.out.print(f"[bold]{result['study']}[/]: {result['program']} under {result['protection']}, "
                   f"{len(result['sites'])} sites, {result['rounds']} rounds, {result['seconds']:.2f} s")  # fmt: skip
    metrics = result["metrics"]
    if metrics["federated"]:
        told = metrics["federated"]
        names = [name for name in SHOWN if name in told] + [name for name in told if name.startswith("mae ")]
        own = ("personal",) if "personal" in metrics else ()
        lines: list[list[object]] = [
            ["all sites", which, *_cells(metrics.get(which, {}), names)] for which in ("federated", *own, "pooled")
        ]
        for site, found in metrics["per_site"].items():
            lines += [[site, which, *_cells(found.get(which, {}), names)] for which in ("federated", *own, "local")]
        show.rows(("held-out rows of", "model", *names), lines)
    if table := (result.get("model") or {}).get("table"):
        names = [n for n in ("coefficient", "std_error", "z", "p_value") if n in table[0]]
        show.rows(("coefficient of", *names), [[row["name"], *_cells(row, names)] for row in table])
    if not result.get("model"):
        tables.tell(result)
    show.suspects(result)
    privacy = result["privacy"]
    show.say(privacy["statement"])
    if privacy["noised"]:
        limits = f"ε = {privacy['epsilon']:g}, δ = {privacy['delta']:g} for each {privacy['unit']}"
        show.say(f"these numbers carry noise: {limits}", style="bold")
    for warning in privacy["warnings"]:
        show.say(f"warning: {warning}", style="yellow")
    wire = result["wire"]
    sent, received = show.size(wire["to_sites_bytes"]), show.size(wire["from_sites_bytes"])
    show.out.print(f"traffic: {sent} to the sites, {received} back")
    show.out.print(f"written to [bold]{out}[/]: report.html, result.json, model/, ledger/")
    show.out.print(f"verify the ledgers with: atoll ledger verify {out}/ledger/*.jsonl", style="dim")


def _cells(values: Mapping[str, Any], names: list[str]) -> list[str]:
    return ["–" if values.get(name) is None else f"{values[name]:.4g}" for name in names]


def demo(
    out: OutDir = Path("demo-result"), transport: Transport = TransportName.local, machine: Machine = False
) -> None:
    """Three hospitals, breast-cancer data: contract check, statistics, logistic regression, report, ledgers."""
    load_installed()
    plans, sources = demo_data.write(out)
    for name, spec in sources.items():
        table = SiteData.read(spec, plans["model"], out, name)
        if not machine:
            show.out.print(f"[green]✓[/] {name}: {len(table)} patients, its table keeps the data contract")
    with show.progress("statistics", quiet=machine) as tell:
        (out / "statistics").mkdir(exist_ok=True)
        statistics, _ = run_sandbox(plans["statistics"], sources, out, out / "statistics", transport.value, tell)
    with show.progress("model", quiet=machine) as tell:
        result, details = run_sandbox(plans["model"], sources, out, out, transport.value, tell)
    result["statistics"] = statistics["statistics"]
    show.report(out / "report.html", result, details)
    ledgers = [verify_file(path, verify) for path in sorted((out / "ledger").glob("*.jsonl"))]
    verify_together(ledgers, verify)
    if machine:
        show.as_json(result)
        return
    columns = statistics["statistics"]["columns"]
    names = ["count", "missing", "mean", "std", "low", "high"]
    show.rows(("statistics of", *names), [[column, *_cells(found, names)] for column, found in columns.items()])
    _tell_result(result, out)
    show.out.print("\n[bold]What left each hospital[/] (its ledger says so, signed; no patient's row ever left)")
    for site, released in details["releases"].items():
        show.out.print(f"  {site}")
        for one in released:
            times = f", {one['times']} times" if one["times"] > 1 else ""
            show.out.print(f"    {one['program']}: {one['what']}{times}, {show.size(one['bytes'])}", style="dim")
    show.out.print(f"[green]✓[/] {len(ledgers)} ledgers verified, alone and against each other")
