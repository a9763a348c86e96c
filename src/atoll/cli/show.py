"""How the command line talks to people: errors, tables, progress. Machines get --json."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from atoll.contract.errors import AtollError

if TYPE_CHECKING:  # showing an error should not wait for what runs studies
    from atoll.runtime.checkup import Finding
    from atoll.runtime.estimate import Cost

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def as_json(value: Any) -> None:
    """Print *value* for a machine."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def fail(error: AtollError, *, machine: bool) -> NoReturn:
    """Tell an error and exit with 1."""
    if machine:
        as_json({**error.public(), "message": error.message, "where": error.where})
    err.print(f"[bold red]error[/] {escape(error.code)}\n{escape(str(error))}", soft_wrap=True)
    raise SystemExit(1)


def changes(name: str) -> Callable[[str], None]:
    """Print a party's state whenever it is another than before: one away for a night is no news at every attempt."""
    told = ""

    def tell(state: str) -> None:
        nonlocal told
        if state != told:
            out.print(f"{name}: {state}")
        told = state

    return tell


def say(text: str, *, style: str = "") -> None:
    """Print another party's words: no markup of theirs, and nothing that steers the terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    out.print(shown, markup=False, style=style or None)


def rows(columns: Sequence[str], lines: Sequence[Sequence[object]], title: str = "") -> None:
    """A table."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")  # a fingerprint that is cut off cannot be compared
    for line in lines:
        table.add_row(*(escape(str(cell)) for cell in line))
    out.print(table)


def left_out(dropped: Mapping[str, int]) -> str:
    """Rows that preparation left out, by reason."""
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number) or "–"


def findings(found: Sequence[Finding]) -> None:
    """What a comparison of the sites' tables warns of."""
    if found:
        lines = [(one.column, one.where, one.what, one.remedy) for one in found]
        rows(("column", "where", "what warns", "how to mend it"), lines)


def suspects(result: Mapping[str, Any]) -> None:
    """Which sites stood out under a rule that withstands bad ones."""
    if found := (result.get("output") or {}).get("suspects"):
        names = ", ".join(str(one["site"]) for one in found[:12]) + (" …" if len(found) > 12 else "")
        say(f"these sites stood out, report.html tells by what: {names}", style="yellow")


def protections(found: Sequence[Cost], best: str, chosen: str, num_sites: int, link: str) -> None:
    """What each protection would cost one site of a plan."""
    lines = []
    for cost in found:
        mark = ", ".join(
            word for word, there in (("chosen", chosen), ("recommended", best)) if there == cost.protection
        )
        figures = ("–", "–") if cost.refused else (f"{cost.seconds:.2g} s", size(cost.bytes))
        lines.append((cost.protection, *figures, cost.refused or mark))
    rows(("protection", "about", "of one site", ""), lines, f"estimates for {num_sites} sites, {link}")


def log_to_terminal(*, verbose: bool = False) -> None:
    """Warnings (or everything) of Atoll's loggers on stderr."""
    handler = RichHandler(console=err, show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], format="%(message)s")


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A live line for a run's events; *quiet* shows nothing."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet) as bar:
        line = bar.add_task(title, total=None)

        def tell(event: Mapping[str, Any]) -> None:
            if "round" in event:
                bar.update(line, description=f"{title}: round {event['round'] + 1}, {event['name']}")
            elif "metrics" in event:
                shown = ", ".join(f"{name} {value:.4g}" for name, value in event["metrics"].items())
                bar.update(line, description=f"{title}: step {event['step'] + 1}, {shown}")
            elif "starting" in event:
                bar.update(line, description=f"{title}: starting {event['starting']}")
            elif "comparing" in event:
                bar.update(line, description=f"{title}: comparing with {event['comparing']} alone")
            elif "waiting" in event:
                bar.update(line, description=f"{title}: awaiting approval at {', '.join(event['waiting'])}")
            elif "dropout" in event:
                err.print(f"[yellow]{escape(event['dropout'])} dropped out:[/] {escape(event['reason'])}")

        yield tell


def report(path: Path, result: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write report.html. What draws is imported only now: no other command should wait for it."""
    from atoll.report.html import write_report

    write_report(path, result, details)


def size(number: int) -> str:
    """Bytes for people."""
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"
