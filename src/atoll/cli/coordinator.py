"""atoll coordinator: set up, run and operate the coordinator."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import show
from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.crypto.identity import fingerprint
from atoll.models.allowed import allow
from atoll.runtime.catalogue import load_installed
from atoll.runtime.checkup import check_of, findings
from atoll.runtime.home import CoordinatorConfig, CoordinatorHome
from atoll.runtime.results import details, write_json, write_model
from atoll.runtime.serve import CoordinatorServer, settle, until_ended
from atoll.runtime.study import check_plan, settled

app = typer.Typer(help="Set up, run and operate the coordinator.", no_args_is_help=True)
Home = Annotated[Path, typer.Option("--home", envvar="ATOLL_COORDINATOR", help="The coordinator's folder.")]
Machine = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of it.")]
DEFAULT = Path("atoll-coordinator")


@app.command()
def init(
    home: Home = DEFAULT,
    federation: Annotated[str, typer.Option(help="The federation's name.")] = "atoll",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    address: Annotated[str, typer.Option(help="Name or address by which sites reach it (default: --host).")] = "",
    port: Annotated[int, typer.Option(help="Port for sites (0: any free one).")] = 7443,
    enrol_port: Annotated[int, typer.Option(help="Port for enrolment (0: any free one).")] = 7444,
    store: Annotated[str, typer.Option(help="SQLAlchemy URL of the run store (default: SQLite in the folder).")] = "",
    certificate_days: Annotated[float, typer.Option(help="Lifetime of certificates; they renew themselves.")] = 7.0,
) -> None:
    """Make the federation's certificate authority and the coordinator's identity."""
    config = CoordinatorConfig(
        federation=federation, host=host, address=address, port=port, enrol_port=enrol_port, store=store,
        certificate_days=certificate_days,
    )  # fmt: skip
    made = CoordinatorHome.create(home, config)
    show.out.print(f"coordinator of [bold]{federation}[/] set up in {home}")
    show.out.print(f"identity {fingerprint(made.identity.public)}")
    show.out.print(f"next: atoll coordinator up --home {home}, then atoll coordinator invite SITE --home {home}")


@app.command()
def up(
    home: Home = DEFAULT,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Listen for sites and drive submitted runs until stopped; open runs are resumed."""
    show.log_to_terminal(verbose=verbose)
    settle()
    server = CoordinatorServer(CoordinatorHome(home), tell)
    asyncio.run(until_ended(server.serve(), parent))


def tell(event: dict[str, Any]) -> None:
    """Print what a coordinator does."""
    run = str(event.get("run", ""))[:8]
    if "listening" in event:
        text = f"listening for sites on {event['listening']}, for enrolment on {event['enrolment']}"
    elif "round" in event:
        text = f"run {run} round {event['round']} {event['name']}"
    elif "ended" in event:
        text = f"run {run} {event['ended']}"
    elif "waiting" in event:
        text = f"run {run} awaits approval at {', '.join(event['waiting'])}"
    elif "dropout" in event:
        text = f"run {run}: {event['dropout']} dropped out ({event['reason']})"
    else:
        return
    show.say(text)


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    home: Home = DEFAULT,
    hours: Annotated[float, typer.Option(help="How long the token is good.")] = 24.0,
    machine: Machine = False,
) -> None:
    """Print a one-time, expiring join token for a site. Hand it over by a trusted way: it is a secret."""
    coordinator = CoordinatorHome(home)
    store = coordinator.store()
    token = coordinator.invite(store, site, dt.timedelta(hours=hours))
    store.close()
    if machine:
        show.as_json({"site": site, "token": token.encode(), "ca_fingerprint": token.ca_fingerprint})
        return
    show.err.print(f"join token for {site}, good for {hours:g} h and one use; CA fingerprint {token.ca_fingerprint}")
    print(token.encode())  # noqa: T201 (alone on stdout, to be piped)


@app.command()
def submit(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan (YAML).")],
    home: Home = DEFAULT,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the run has ended.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="With --wait: where results go.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the sites' tables instead of running it.")] = False,
    machine: Machine = False,
) -> None:
    """Submit a plan; the running coordinator drives it as soon as the sites approve."""
    load_installed()
    plan, coordinator = Plan.load(plan_file), CoordinatorHome(home)
    if plan.cohort.above:
        raise PlanError("cohort.above", "a region sets what its sites' plan serves", field="cohort.above",
                        remedy="leave it out")  # fmt: skip
    allow(coordinator.config.models)
    check_plan(plan)
    plan = settled(check_of(plan) if check else plan)
    store = coordinator.store()
    sites = plan.cohort.sites or tuple(store.roster())
    if len(sites) < plan.cohort.min_sites:
        raise PlanError(
            "cohort.too-small", f"the plan demands {plan.cohort.min_sites} sites, and {len(sites)} are enrolled",
            field="cohort.min_sites", remedy="enrol more sites, or lower min_sites",
        )  # fmt: skip
    run = store.create_run(plan, sites)
    if machine:
        show.as_json({"run": run, "plan_hash": plan.hash})
    else:
        show.out.print(f"submitted run {run}")
    if wait:
        asyncio.run(_wait(store, run, quiet=machine))
        if check and not machine:
            show.findings(findings(store.result(run)[0]["output"]))
        if out is not None:
            _write(store, run, out)
    store.close()


async def _wait(store: Any, run: str, *, quiet: bool) -> None:
    """Show a run's progress until it has ended; raises SystemExit(1) unless it finished."""
    with show.progress(run[:8], quiet=quiet) as tell:
        seen = 0
        while (row := store.run(run))["status"] in ("submitted", "running"):
            for finished in store.rounds(run)[seen:]:
                seen += 1
                tell({"round": finished["number"], "name": finished["name"]})
            await asyncio.sleep(0.1)
    if row["status"] != "finished":
        show.err.print(f"[bold red]{row['status']}[/] {row['note']}", soft_wrap=True)
        raise SystemExit(1)


@app.command()
def status(home: Home = DEFAULT, machine: Machine = False) -> None:
    """Sites and runs."""
    found = state(CoordinatorHome(home))
    if machine:
        show.as_json(found)
        return
    sites, runs = found["sites"], found["runs"]
    show.rows(
        ("site", "identity", "state", "last connected"),
        [
            (
                name,
                row["fingerprint"] or "–",
                "revoked" if row["revoked"] else "enrolled" if row["fingerprint"] else "invited",
                row["seen"] or "never",
            )
            for name, row in sites.items()
        ],
    )
    show.rows(
        ("run", "study", "status", "rounds", "created", "note"),
        [(r["run"][:8], r["name"], r["status"], r["rounds"], r["created"], r["note"]) for r in runs],
    )


def state(home: CoordinatorHome) -> dict[str, Any]:
    """{"sites", "runs"} as the store has them now."""
    store = home.store()
    sites, runs = store.sites(), store.runs()
    for row in runs:
        row["rounds"] = len(store.rounds(row["run"]))
    store.close()
    for name, row in sites.items():
        row["fingerprint"] = fingerprint(bytes.fromhex(row["public_key"])) if row["public_key"] else ""
        sites[name] = {k: row[k] for k in ("fingerprint", "revoked", "seen")}
    return {"sites": sites, "runs": runs}


def _find(store: Any, prefix: str) -> str:
    found = [row["run"] for row in store.runs() if row["run"].startswith(prefix)]
    if len(found) != 1:
        raise PlanError(
            "run.unknown", f"{len(found)} runs begin with {prefix!r}", field="run", remedy="atoll coordinator status"
        )
    return str(found[0])


@app.command()
def result(
    run: Run,
    home: Home = DEFAULT,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results go.")] = Path("out"),
) -> None:
    """Write a finished run's result.json, report.html, model/ and the coordinator's ledger."""
    store = CoordinatorHome(home).store()
    _write(store, _find(store, run), out)
    store.close()


def _write(store: Any, run: str, out: Path) -> None:
    found, arrays = store.result(run)
    (out / "ledger").mkdir(parents=True, exist_ok=True)
    store.export_ledger(out / "ledger" / "coordinator.jsonl")
    plan = store.run(run)["plan"]
    shown = details(plan, store.metrics(run), store.rounds(run), {})
    shown["curves"] = found.pop("curves", {})
    write_json(out / "result.json", found)
    write_model(out / "model", plan, found, arrays)
    show.report(out / "report.html", found, shown)
    show.out.print(f"written to [bold]{out}[/]: report.html, result.json, model/, ledger/")


@app.command()
def cancel(run: Run, home: Home = DEFAULT) -> None:
    """Cancel a run; its sites are told and stop."""
    store = CoordinatorHome(home).store()
    found = _find(store, run)
    if store.run(found)["plan"].cohort.above:
        raise PlanError("run.from-above", "the run is asked from above", field="run",
                        remedy="withdraw the region from it: atoll site deny RUN")  # fmt: skip
    store.request_cancel(found)
    store.close()
    show.out.print(f"cancelling run {found}")


@app.command()
def revoke(site: Annotated[str, typer.Argument(help="The site's name.")], home: Home = DEFAULT) -> None:
    """Shut a site out at once: its connection is closed and its certificate is good no longer."""
    store = CoordinatorHome(home).store()
    store.revoke(site)
    store.close()
    show.out.print(f"{site} is revoked; invite it anew to let it come back")
