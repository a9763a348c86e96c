"""atoll site: join a federation, run a site, decide what may happen to its data."""

from __future__ import annotations

import asyncio
import getpass
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import show
from atoll.contract.errors import IntegrityError, PlanError
from atoll.contract.plan import Plan
from atoll.contract.settings import read_yaml, validate
from atoll.crypto.identity import fingerprint
from atoll.crypto.pki import certificate_fingerprint
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.models.allowed import allow
from atoll.runtime.approval import stand, standing
from atoll.runtime.catalogue import load_installed
from atoll.runtime.checkup import compared
from atoll.runtime.home import SiteHome
from atoll.runtime.journal import OPEN, Journal
from atoll.runtime.personal import personal_model
from atoll.runtime.results import write_model
from atoll.runtime.serve import serve_site, settle, until_ended
from atoll.runtime.study import check_plan

app = typer.Typer(help="Join a federation, run a site, decide what may happen to its data.", no_args_is_help=True)
Home = Annotated[Path, typer.Option("--home", envvar="ATOLL_SITE", help="The site's folder.")]
Machine = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DEFAULT = Path("atoll-site")


@app.command()
def init(
    token: Annotated[str, typer.Option(help="The join token, or - to read it from standard input.")],
    home: Home = DEFAULT,
    dataset: Annotated[list[str], typer.Option(help="NAME=FILE of a table that plans may name (repeatable).")] = [],  # noqa: B006
) -> None:
    """Join a federation with a token: keys are made here, and only a signing request leaves."""
    sources = {}
    for item in dataset:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise PlanError(
                "site.bad-dataset", "a data set is given as NAME=FILE", field="dataset", remedy="--dataset NAME=FILE"
            )
        sources[name] = SourceSpec(path=str(Path(path).absolute()))
    text = typer.get_text_stream("stdin").read() if token == "-" else token  # noqa: S105
    made = asyncio.run(SiteHome.create(home, text, sources))
    show.out.print(f"site [bold]{made.config.name}[/] set up in {home}")
    show.out.print(f"identity {fingerprint(made.identity.public)}  (tell the other sites' operators, out of band)")
    show.out.print(f"CA fingerprint {certificate_fingerprint(made.ca_pem)}  (the coordinator's operator sees the same)")
    show.out.print(f"next: look at {home}/policy.yaml and {home}/site.yaml, then: atoll site up --home {home}")


@app.command()
def up(
    home: Home = DEFAULT,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Stay connected to the coordinator and answer its requests, by policy, until stopped."""
    show.log_to_terminal(verbose=verbose)
    settle()
    site = SiteHome(home)
    asyncio.run(until_ended(serve_site(site, show.changes(site.config.name)), parent))


@app.command()
def check(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan (YAML).")],
    home: Home = DEFAULT,
    source: Annotated[Path | None, typer.Option(help="A YAML file with one source, instead of the site's own.")] = None,
    machine: Machine = False,
) -> None:
    """Check the site's own table and policy against a plan, offline: what blocks, what warns, how to mend it."""
    load_installed()
    plan = Plan.load(plan_file)
    if source is not None:
        spec = validate(SourceSpec, read_yaml(source, "source"), "source")
        data, base = SiteData.read(spec, plan, source.parent, source.stem), source.parent
    else:
        site = SiteHome(home)
        allow(site.policy.models)
        site.policy.check_plan(plan, plan.cohort.min_sites, check_plan(plan).version)
        data, base, spec = site.data(plan), site.folder, site.config.datasets[plan.dataset]
        site.policy.check_withheld(plan, data.source)
    table, warnings = data.base(), compared(plan, {"this-site": spec}, base)
    if machine:
        told = {"plan": plan.name, "plan_hash": plan.hash, "rows": len(table), "ok": True}
        show.as_json({**told, "dropped": dict(table.dropped), "warnings": [asdict(one) for one in warnings]})
        return
    show.out.print(f"[green]✓[/] {len(table)} rows keep the contract of {plan.name} ({plan.table.name})")
    if table.dropped:
        show.out.print(f"left out: {show.left_out(table.dropped)}")
    show.findings(warnings)


def _pending(journal: Journal) -> list[tuple[str, dict[str, Any]]]:
    return [(run, opened) for run, status, opened, _ in journal.runs() if status == "pending"]


@app.command()
def pending(home: Home = DEFAULT, machine: Machine = False) -> None:
    """Studies that wait for this site's approval."""
    journal = SiteHome(home).journal()
    waiting = _pending(journal)
    journal.close()
    if machine:
        show.as_json([{"run": run, **opened} for run, opened in waiting])
        return
    if not waiting:
        show.out.print("nothing waits for approval")
    for run, opened in waiting:
        plan = Plan.from_json(opened["plan"])
        show.say(f"{plan.name}  run {run}", style="bold")
        show.say(f"  program {plan.program}, purpose {plan.purpose}, protection {plan.protection.sum}")
        if plan.privacy is not None:
            show.say(f"  privacy of one {plan.privacy.unit}: ε {plan.privacy.epsilon:g}, δ {plan.privacy.delta:g}")
        show.say(f"  data set {plan.dataset}, columns {', '.join(plan.table.columns)}")
        show.say(f"  sites {', '.join(opened['roster'])}")
        if plan.cohort.above:
            show.say(f"  asked by a region, for the plan with hash {plan.cohort.above}")
        show.say(f"  plan hash {opened['hash']}", style="dim")
        show.say(f"  the whole plan: atoll site pending --json; then: atoll site approve {run[:8]}", style="dim")


def _decide(home: Path, prefix: str, decision: str, *, always: bool = False) -> None:
    journal = SiteHome(home).journal()
    found = [run for run, status, _, _ in journal.runs() if run.startswith(prefix) and status in OPEN]
    if len(found) != 1:
        raise PlanError(
            "run.unknown", f"{len(found)} open runs begin with {prefix!r}", field="run", remedy="atoll site pending"
        )
    opened = (journal.run(found[0]) or ("", {}, ""))[1]
    ends = decision == "denied" and opened["hash"] in standing(journal)
    kept = {"standing": always} if always or ends else {}
    journal.record(decision, {"run": found[0], "plan": opened["hash"], "operator": getpass.getuser(), **kept})
    if kept:
        stand(journal, opened["hash"], str(opened["plan"]["name"]) if always else None)
    if decision == "approved":
        journal.set_setting(f"approved {found[0]}", "yes")
    else:
        journal.set_status(found[0], "denied")
    journal.close()
    show.out.print(f"{decision} run {found[0]}")


@app.command()
def approve(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    home: Home = DEFAULT,
    always: Annotated[bool, typer.Option("--standing", help="And every later run of the very same plan.")] = False,
) -> None:
    """Approve a study that waits; it is written in the ledger with the operator's name."""
    _decide(home, run, "approved", always=always)


@app.command()
def deny(run: Annotated[str, typer.Argument(metavar="RUN")], home: Home = DEFAULT) -> None:
    """Refuse a study, or withdraw from one that runs; a standing approval of its plan ends, too."""
    _decide(home, run, "denied")


@app.command("standing")
def list_standing(
    home: Home = DEFAULT,
    withdraw: Annotated[str, typer.Option(metavar="HASH", help="A plan's hash, or its beginning.")] = "",
    machine: Machine = False,
) -> None:
    """Plans of which every run is approved, as `approve --standing` said; and end that for one."""
    journal = SiteHome(home).journal()
    if withdraw:
        found = [plan_hash for plan_hash in standing(journal) if plan_hash.startswith(withdraw)]
        if len(found) != 1:
            raise PlanError("plan.unknown", f"{len(found)} standing plans begin with {withdraw!r}", field="withdraw",
                            remedy="atoll site standing")  # fmt: skip
        journal.record("withdrawn", {"plan": found[0], "operator": getpass.getuser()})
        stand(journal, found[0], None)
    left = standing(journal)
    journal.close()
    if machine:
        show.as_json([{"plan": name, "plan_hash": plan_hash} for plan_hash, name in left.items()])
        return
    show.rows(("plan", "hash"), [(name, plan_hash) for plan_hash, name in left.items()])


@app.command()
def roster(
    home: Home = DEFAULT,
    approve: Annotated[list[str], typer.Option(help="SITE=FINGERPRINT, as its operator told you (repeatable).")] = [],  # noqa: B006
    approve_all: Annotated[bool, typer.Option("--approve-all", help="Approve every identity shown.")] = False,
    machine: Machine = False,
) -> None:
    """The identities in this site's studies: which are approved, new or changed; and approve them.

    The coordinator runs the certificate authority, so a certificate alone would let it invent
    sites: compare fingerprints with the other operators by another way.
    """
    site = SiteHome(home)
    journal = site.journal()
    approved: dict[str, str] = json.loads(journal.setting("roster") or "{}")
    seen: dict[str, str] = {site.config.name: site.identity.public.hex()}
    for _, _, opened, _ in journal.runs():
        seen |= opened["roster"]
    wanted = dict(seen) if approve_all else {}
    for item in approve:
        name, _, told = item.partition("=")
        if name not in seen or fingerprint(bytes.fromhex(seen[name])) != told.strip().lower():
            raise IntegrityError(
                "roster.mismatch", f"the identity announced for {name!r} has another fingerprint", field=name,
                remedy="do not approve: ask the site's operator and the coordinator's",
            )  # fmt: skip
        wanted[name] = seen[name]
    if wanted:
        approved |= wanted
        shown = {name: fingerprint(bytes.fromhex(key)) for name, key in wanted.items()}
        journal.record("roster", {"approved": shown, "operator": getpass.getuser()})
        journal.set_setting("roster", json.dumps(approved))
    journal.close()
    lines = [
        (name, fingerprint(bytes.fromhex(key)), _state(approved.get(name), key)) for name, key in sorted(seen.items())
    ]
    if machine:
        show.as_json([dict(zip(("site", "fingerprint", "state"), line, strict=True)) for line in lines])
    else:
        show.rows(("site", "identity", "state"), lines)


def _state(approved: str | None, key: str) -> str:
    return "new" if approved is None else "approved" if approved == key else "CHANGED"


@app.command()
def budget(home: Home = DEFAULT, machine: Machine = False) -> None:
    """What each data set's privacy budget was spent on, and what is left of it."""
    site = SiteHome(home)
    journal = site.journal()
    lines = []
    for dataset in site.config.datasets:
        allowed = site.policy.budget(dataset)
        had = journal.spent(dataset, allowed)
        lines.append({"dataset": dataset, "unit": allowed.unit, "per": allowed.per, "epsilon": had.epsilon,
                      "epsilon_limit": allowed.epsilon, "delta": had.delta, "delta_limit": allowed.delta,
                      "exact": had.exact, "exact_limit": allowed.exact_releases})  # fmt: skip
    journal.close()
    if machine:
        show.as_json(lines)
        return

    def of(line: dict[str, Any], name: str) -> str:
        limit = line[f"{name}_limit"]
        return f"{line[name]:.3g} of {'no limit' if limit is None else format(limit, 'g')}"

    show.rows(
        ("data set", "of one", "in a", "ε spent or reserved", "δ", "exact releases"),
        [(x["dataset"], x["unit"], x["per"], of(x, "epsilon"), of(x, "delta"), of(x, "exact")) for x in lines],
    )


@app.command()
def model(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write it to.")],
    home: Home = DEFAULT,
) -> None:
    """Write the model that this site has for itself after a personalised run; it never left the site."""
    load_installed()
    site = SiteHome(home)
    allow(site.policy.models)
    journal = site.journal()
    plan, result, arrays = personal_model(journal, run)
    journal.close()
    write_model(out, plan, result, arrays)
    show.say(f"{site.config.name}'s own model of {plan.name}, run {result['run']}, written to {out}")


@app.command()
def status(home: Home = DEFAULT, machine: Machine = False) -> None:
    """The site's studies: status, failures, and releases the coordinator has not acknowledged."""
    lines = studies(SiteHome(home))
    if machine:
        show.as_json(lines)
        return
    show.rows(
        ("run", "study", "status", "without receipt", "note"),
        [(line["run"][:8], line["study"], line["status"], line["unacknowledged"], line["note"]) for line in lines],
    )


def studies(home: SiteHome) -> list[dict[str, Any]]:
    """The site's studies as its journal has them now."""
    journal = home.journal()
    found = [
        {"run": run, "study": opened["plan"]["name"], "status": state, "note": note,
         "unacknowledged": len(journal.unacknowledged(run))}
        for run, state, opened, note in journal.runs()
    ]  # fmt: skip
    journal.close()
    return found
