"""atoll export: a finished run's model for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from atoll.cli import show
from atoll.models import stored
from atoll.models.export import to_onnx


class Format(StrEnum):
    """What is written."""

    onnx = "onnx"


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The folder model/ of a run's results.")],
    kind: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.onnx,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to (default: MODEL_DIR/model.onnx).")] = None,
    allow: Annotated[list[str], typer.Option(help="package.nets:Net that may be imported for it (repeatable).")] = [],  # noqa: B006
) -> None:
    """Write a stored model for other languages and runtimes: from a row's own columns to its prediction."""
    fitted, schema, _ = stored.load(model, allow)
    path = out or model / f"model.{kind.value}"
    to_onnx(fitted, schema, path)
    show.out.print(f"written to [bold]{path}[/]: {show.size(path.stat().st_size)}")
