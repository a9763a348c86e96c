"""atoll ledger: verify and export ledgers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli import show
from atoll.contract.errors import AtollError, IntegrityError
from atoll.crypto.identity import fingerprint, verify
from atoll.ledger.contributions import credited, sums
from atoll.ledger.verify import verify_file, verify_together
from atoll.runtime.home import CoordinatorHome, SiteHome

app = typer.Typer(help="Verify and export ledgers.", no_args_is_help=True)


@app.command("verify")
def verify_ledgers(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Ledger files (JSON lines).")],
    machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Verify ledger files offline, each alone and all against each other. Exit 0 intact, 1 broken."""
    found, broken = [], []
    for path in files:
        try:
            found.append(verify_file(path, verify))
        except AtollError as error:
            broken.append(error)
        except OSError as error:
            broken.append(IntegrityError("ledger.unreadable", f"{path}: {error.strerror}", field="ledger"))
    if not broken:
        try:
            verify_together(found, verify)
        except AtollError as error:
            broken.append(error)
    if machine:
        show.as_json(
            {"intact": not broken, "broken": [problem.message for problem in broken],
             "ledgers": [{"file": str(led.path), "party": led.party, "key": fingerprint(led.public),
                          "entries": len(led.entries), "unacknowledged": led.unacknowledged} for led in found]}
        )  # fmt: skip
        raise SystemExit(1 if broken else 0)
    lines = [
        (led.party, led.path, len(led.entries), fingerprint(led.public), len(led.unacknowledged) or "none")
        for led in found
    ]
    show.rows(("party", "file", "entries", "key", "releases without receipt"), lines)
    for problem in broken:
        show.err.print(f"[bold red]broken[/] {problem.message}", soft_wrap=True)
    if broken:
        raise SystemExit(1)
    show.out.print("[green]intact[/]: every hash, signature and receipt holds")


@app.command("contributions")
def contributions(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A ledger file (JSON lines), coordinator's or site's.")],
    machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Verify a ledger file, and sum over its runs what each site contributed. Exit 0 intact, 1 broken."""
    try:
        found = credited(verify_file(file, verify).entries)
    except (AtollError, OSError) as error:
        why = error.message if isinstance(error, AtollError) else f"{file}: {error.strerror}"
        show.err.print(f"[bold red]broken[/] {why}", soft_wrap=True)
        raise SystemExit(1) from None
    totals = sums(found)
    if machine:
        show.as_json(
            {"runs": [asdict(credit) for credit in found],
             "sites": {site: {"runs": runs, "shares": total} for site, (runs, total) in totals.items()}}
        )  # fmt: skip
        return
    show.rows(
        ("site", "runs", "sum of shares", "mean share"),
        [(site, runs, f"{total:.6f}", f"{total / runs:.6f}") for site, (runs, total) in totals.items()],
    )


@app.command("export")
def export(
    home: Annotated[Path, typer.Argument(help="A site's or coordinator's folder.")],
    file: Annotated[Path, typer.Argument(help="Where to write the ledger (JSON lines).")],
) -> None:
    """Write the ledger of a site or coordinator to a file."""
    if (home / "site.yaml").exists():
        journal = SiteHome(home).journal()
        journal.export(file)
        journal.close()
    else:
        store = CoordinatorHome(home).store()
        store.export_ledger(file)
        store.close()
    show.out.print(f"written to {file}")
