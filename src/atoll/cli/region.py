"""atoll region: a site towards the level above, and the coordinator of its own sites."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli import coordinator, show, site
from atoll.contract.settings import validate
from atoll.runtime.region import RegionConfig, RegionHome
from atoll.runtime.serve import serve_region, settle, until_ended

app = typer.Typer(
    help="Run a region: a site towards the level above, the coordinator of its own sites.", no_args_is_help=True
)
Home = Annotated[Path, typer.Option("--home", envvar="ATOLL_REGION", help="The region's folder.")]
DEFAULT = Path("atoll-region")


@app.command()
def init(
    site_home: Annotated[Path, typer.Option("--site", help="Its folder as a site of the level above.")],
    coordinator_home: Annotated[Path, typer.Option("--coordinator", help="Its folder as its sites' coordinator.")],
    home: Home = DEFAULT,
    protection: Annotated[str, typer.Option(help="How its own sites' sums are made.")] = "secagg",
    min_sites: Annotated[int, typer.Option(help="With fewer of its sites left, it drops out above.")] = 3,
    on_dropout: Annotated[str, typer.Option(help="continue without a lost site, or fail.")] = "continue",
    members: Annotated[int, typer.Option(help="Most sites behind one of its own, where some are regions.")] = 1,
) -> None:
    """Put together the two sides that `atoll site init` and `atoll coordinator init` have made."""
    content: dict[str, Any] = {
        "site": os.path.relpath(site_home, home), "coordinator": os.path.relpath(coordinator_home, home),
        "protection": protection,
        "cohort": {"min_sites": min_sites, "on_dropout": on_dropout, "members": members},
    }  # fmt: skip
    made = RegionHome.create(home, validate(RegionConfig, content, "config"))
    show.out.print(f"region [bold]{made.site.config.name}[/] set up in {home}")
    show.out.print(f"next: look at {home}/region.yaml and {site_home}/policy.yaml, then: atoll region up --home {home}")


@app.command()
def up(
    home: Home = DEFAULT,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Stay connected to the level above, listen for its own sites, and answer with their sums, until stopped."""
    show.log_to_terminal(verbose=verbose)
    settle()
    region = RegionHome(home)
    serving = serve_region(region, show.changes(region.site.config.name), coordinator.tell)
    asyncio.run(until_ended(serving, parent))


@app.command()
def status(
    home: Home = DEFAULT, machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False
) -> None:
    """Its studies towards the level above, its own sites, and its runs among them."""
    region = RegionHome(home)
    if machine:
        show.as_json({"above": site.studies(region.site), "below": coordinator.state(region.coordinator)})
        return
    site.status(region.site.folder)
    coordinator.status(region.coordinator.folder)
