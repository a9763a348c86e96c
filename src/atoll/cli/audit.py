"""atoll audit, and atoll site audit: a plan is attacked before anybody trains by it."""

from __future__ import annotations

import getpass
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from atoll.cli import audit_page, show
from atoll.cli.sandbox import DataDir, Machine, OutDir, PlanFile, SitesFile, _load, _too_few
from atoll.contract.errors import PlanError, PolicyError
from atoll.contract.plan import Plan
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.table import Table
from atoll.models.allowed import allow, asked_in
from atoll.runtime.home import SiteHome
from atoll.runtime.policy import audited
from atoll.runtime.sandbox import read_sites
from atoll.runtime.serve import settle

if TYPE_CHECKING:
    from atoll.cli.audit_plan import Audited, Options

Batches = Annotated[list[int], typer.Option("--batch", min=1, help="Rows of a site's step (repeatable).")]
Samples = Annotated[int, typer.Option(min=1, help="About how many rows to attack for each batch size.")]
LocalSteps = Annotated[int, typer.Option(min=0, help="Local steps before a reply (0: as many as the plan says).")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of each attack that searches.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the rows chosen and of the attacks.")]
Most = Annotated[float | None, typer.Option("--max-leak-rate", min=0, max=1, help="Exit with 1 above it.")]
Members = Annotated[bool, typer.Option("--membership/--no-membership", help="Run the whole plan, and test membership.")]
Public = Annotated[Path | None, typer.Option(metavar="NPZ|SITES.yaml", help="The attacker's own inputs.")]
BATCHES = [1, 8]


def audit(
    plan_file: PlanFile, sites: SitesFile = None, data: DataDir = Path(), out: OutDir = Path("out"),
    batch: Batches = BATCHES, samples: Samples = 60, local_steps: LocalSteps = 1, steps: Steps = 300,
    seed: Seed = 0, max_leak_rate: Most = None, membership: Members = True, public: Public = None,
    machine: Machine = False,
) -> None:  # fmt: skip
    """Attack a plan's exact protection in the sandbox: how many of the sites' rows can the coordinator reconstruct?"""
    plan, sources, base = _load(plan_file, sites, data)
    if not sources:
        raise PlanError("sites.missing", "no SITES.yaml was given", field="sites", remedy="--sites SITES.yaml")
    if len(sources) < plan.cohort.min_sites:
        raise _too_few(plan, len(sources))
    allow(asked_in(plan.params))  # it is one's own
    settle()
    options = _options(batch, samples, local_steps, seed, steps, membership=membership)
    tables = {name: SiteData.read(spec, plan, base, name) for name, spec in sources.items()}
    made = _audited(plan, tables, options, _public(public, plan, base), quiet=machine)
    _write(made, out)
    _tell(made.found, out, machine=machine)
    _check(made.found, max_leak_rate)


def site_audit(
    plan_file: PlanFile, home: Annotated[Path, typer.Option("--home", envvar="ATOLL_SITE")] = Path("atoll-site"),
    out: OutDir = Path("out"), batch: Batches = BATCHES, samples: Samples = 60, local_steps: LocalSteps = 1,
    steps: Steps = 300, seed: Seed = 0, membership: Members = True, public: Public = None, machine: Machine = False,
) -> None:  # fmt: skip
    """Attack a plan over this site's own rows, dealt to a cohort of the plan's size, and record what came of it: a
    policy with ``audit`` lets no training begin without. Nothing leaves the site."""
    plan, _, _ = _load(plan_file, None, Path())
    site = SiteHome(home)
    allow(site.policy.models)
    settle()
    options = _options(batch, samples, local_steps, seed, steps, membership=membership)
    made = _audited(plan, _dealt(plan, site.data(plan), seed), options, _public(public, plan, Path()), quiet=machine)
    _write(made, out)
    found, journal = made.found, site.journal()
    body = {name: found[name] for name in ("leak_rate", "attacked", "reconstructed", "criterion", "seed")}
    body |= {"batches": [one["batch"] for one in found["batches"]]}
    journal.record("audited", {"plan": found["plan_hash"], **body, "operator": getpass.getuser()})
    journal.set_setting(audited(str(found["plan_hash"])), json.dumps(body))
    journal.close()
    _tell(found, out, machine=machine)
    _check(found, site.policy.audit.max_leak_rate if site.policy.audit else None)


def _options(
    batch: list[int], samples: int, local_steps: int, seed: int, steps: int, *, membership: bool
) -> Options:  # fmt: skip
    try:
        from atoll.cli.audit_plan import Options
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise PlanError(
            "audit.no-torch", "an audit needs PyTorch, which is not installed here", remedy='pip install "atoll[torch]"'
        ) from None
    return Options(tuple(sorted(set(batch))), samples, local_steps, seed, steps, membership)


def _audited(
    plan: Plan, tables: Mapping[str, SiteData], options: Options, public: NDArray[Any] | None, *, quiet: bool
) -> Audited:
    from atoll.cli.audit_plan import audit_plan

    with show.progress(plan.name, quiet=quiet) as tell:
        return audit_plan(plan, tables, options, tell, public)


def _dealt(plan: Plan, data: SiteData, seed: int) -> dict[str, SiteData]:
    """A site's rows, held-out ones too, in as many parts as the plan demands sites."""
    table, number = data.base(), plan.cohort.min_sites
    names = (*plan.cohort.sites, *(f"part-{i + 1}" for i in range(number)))[:number]
    dealt = np.random.default_rng(seed).permutation(len(table)) % number
    parts = {name: table.rows(dealt == i) for i, name in enumerate(names)}
    return {name: SiteData(part, plan, Prepared(plan.recipe), name) for name, part in parts.items()}


def _public(path: Path | None, plan: Plan, base: Path) -> NDArray[Any] | None:
    """The attacker's own inputs: the first array of an NPZ, or the rows of other sites' tables."""
    if path is None:
        return None
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return np.asarray(arrays[arrays.files[0]])
    from atoll.cli.audit_plan import public_inputs

    tables: list[Table] = [SiteData.read(spec, plan, base, name).base() for name, spec in read_sites(path).items()]
    return public_inputs(plan, tables)


def _write(made: Audited, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "audit.json").write_text(json.dumps(made.found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    (out / "audit.html").write_text(audit_page.page(made.found, made.sheets), encoding="utf-8")


def _tell(found: Mapping[str, Any], out: Path, *, machine: bool) -> None:
    if machine:
        show.as_json(found)
        return
    show.out.print(f"[bold]{found['study']}[/]: {found['program']} under {found['protection']}, "
                   f"{len(found['sites'])} sites, seed {found['seed']}")  # fmt: skip
    show.rows(audit_page.COLUMNS, audit_page.lines(found), f"reconstructed: {found['criterion']}")
    membership = found["membership"] or {}
    if "skipped" in membership:
        show.out.print(f"membership was not tested: {membership['skipped']}", style="dim")
    elif membership:
        title = f"membership: {membership['members']} members, {membership['others']} others; AUC 0.5 is chance"
        show.rows(("attack", "AUC", "found at 1 % false alarms"), audit_page.membership_lines(membership), title)
    if found["dp"]:
        show.say(audit_page.dp_sentence(found["dp"]))
    for note in found["notes"]:
        show.say(note, style="dim")
    show.out.print(f"leak rate [bold]{found['leak_rate']:.1%}[/]; written to {out}: audit.json, audit.html")


def _check(found: Mapping[str, Any], most: float | None) -> None:
    if most is not None and found["leak_rate"] > most:
        raise PolicyError(
            "audit.leaks", f"{found['leak_rate']:.1%} of the attacked rows were reconstructed", field="max_leak_rate",
            remedy="choose a protection that hides single replies, differential privacy, larger batches or more sites",
        )  # fmt: skip
