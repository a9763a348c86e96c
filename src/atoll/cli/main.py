"""The command line: the composition root."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from atoll import __version__
from atoll.cli import (
    audit,
    coordinator,
    daily,
    export,
    forecast,
    install,
    ledger,
    profile,
    region,
    sandbox,
    show,
    simulate,
    site,
)
from atoll.contract.errors import AtollError, PlanError
from atoll.contract.program import REGISTRY, summary
from atoll.runtime.catalogue import load_installed

app = typer.Typer(
    name="atoll", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Federated statistics and learning: data stays at its site, protected sums travel.",
)  # fmt: skip
app.command()(sandbox.demo)
app.command()(sandbox.check)
app.command()(sandbox.run)
app.command()(daily.daily)
app.command()(simulate.simulate)
app.command()(forecast.forecast)
app.command()(profile.profile)
app.command()(audit.audit)
app.command()(export.export)
app.command()(install.install)
app.command("import")(export.import_)
site.app.command("audit")(audit.site_audit)
app.add_typer(ledger.app, name="ledger")
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(site.app, name="site")
app.add_typer(region.app, name="region")


@app.command()
def programs(machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False) -> None:
    """What is registered, one line each."""
    load_installed()
    found = {name: {"version": cls.version, "summary": summary(cls)} for name, cls in sorted(REGISTRY.items())}
    if machine:
        show.as_json(found)
        return
    for name, row in found.items():
        show.out.print(f"[bold]{name}[/]@{row['version']}  {row['summary']}")


@app.command()
def version() -> None:
    """The installed version."""
    show.out.print(f"atoll {__version__}")


def main() -> None:
    """Entry point: errors of Atoll are told in plain words, with exit code 1."""
    try:
        app()
    except AtollError as error:
        show.fail(error, machine="--json" in sys.argv)
    except OSError as error:
        text = f"{error.strerror or type(error).__name__}: {error.filename or ''}"
        failure = PlanError("system.file", text, remedy="check the path, its permissions and the disk")
        show.fail(failure, machine="--json" in sys.argv)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
