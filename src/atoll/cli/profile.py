"""atoll profile: draft a schema from a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from atoll.contract.errors import PlanError
from atoll.contract.settings import read_yaml, validate
from atoll.data.engine import Engine
from atoll.data.profile import draft
from atoll.data.sources import SourceSpec, open_cells


def profile(
    table: Annotated[Path | None, typer.Argument(metavar="TABLE", help="A file of any format that is known.")] = None,
    source: Annotated[Path | None, typer.Option(help="A YAML file with one source, instead of TABLE.")] = None,
    name: Annotated[str, typer.Option(help="The schema's name.")] = "",
    header: Annotated[bool, typer.Option(help="Does the first line name the columns?")] = True,
    separator: Annotated[str, typer.Option(help="Between a CSV's cells.")] = "",
    encoding: Annotated[str, typer.Option(help="Of text.")] = "utf-8",
    format: Annotated[str, typer.Option(help="Where the file's ending does not tell.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the draft there, not to standard output.")] = None,
) -> None:
    """Draft a schema from a table, at its site; the draft is the operator's to look over and to share."""
    if (table is None) == (source is None):
        raise PlanError(
            "profile.one-table", "name either a table or a source", field="TABLE",
            remedy="atoll profile TABLE, or atoll profile --source FILE",
        )  # fmt: skip
    if source is not None:
        spec, base = validate(SourceSpec, read_yaml(source, "source"), "source"), source.parent
    else:
        options = {"header": header, "separator": separator, "encoding": encoding, "format": format}
        spec, base = validate(SourceSpec, {"path": str(table), **options}, "options"), Path()
    engine = Engine()
    called = name or Path(spec.path or spec.table or "table").name.partition(".")[0] or "table"
    text = draft(open_cells(spec, None, base, engine), engine, called)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
