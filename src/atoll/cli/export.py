"""atoll export: a finished run's model for other programs. atoll import: another program's model as one of ours."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import typer

from atoll.cli import show
from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.schema import TableSchema
from atoll.contract.settings import read_yaml, validate
from atoll.data.recipe import Prepared
from atoll.models import stored
from atoll.models.export import to_onnx
from atoll.models.model import Predictor
from atoll.models.trees import Trees
from atoll.runtime.catalogue import load_installed
from atoll.runtime.results import described


@runtime_checkable
class Whole(Predictor, Protocol):
    """A model that may lean on installed weights."""

    def whole(self) -> Predictor:
        """One that does not."""


class Format(StrEnum):
    """What is written."""

    onnx = "onnx"
    xgboost = "xgboost"
    safetensors = "safetensors"


NAMED = {Format.onnx: "model.onnx", Format.xgboost: "model.xgboost.json", Format.safetensors: "whole"}


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The folder model/ of a run's results.")],
    kind: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="What to write: onnx, xgboost (of trees, and then the default), or safetensors (of a network on an"
            " installed base: a folder as MODEL_DIR that needs none, adapters merged).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where to (default: in MODEL_DIR, by the format's name)."),
    ] = None,
    allow: Annotated[list[str], typer.Option(help="package.nets:Net that may be imported for it (repeatable).")] = [],  # noqa: B006
) -> None:
    """Write a stored model for other languages and runtimes: from a row's own columns to its prediction."""
    fitted, schema, about = stored.load(model, allow)
    kind = kind or (Format.xgboost if isinstance(fitted, Trees) else Format.onnx)
    path = out or model / NAMED[kind]
    if kind is Format.onnx:
        to_onnx(fitted, schema, path)
    elif kind is Format.xgboost and isinstance(fitted, Trees):
        from atoll.models.xgboost_json import to_json

        path.write_bytes(to_json(fitted, schema, str(about["model"].get("objective") or "")))
    elif kind is Format.safetensors and isinstance(fitted, Whole):
        whole = fitted.whole()
        stored.save(path, {**about, "model": {**about["model"], **described(whole)}}, whole.arrays())
    else:
        raise PlanError(
            "export.format", f"a model of this kind is not written as {kind.value}", field="format",
            remedy="use --format onnx",
        )  # fmt: skip
    written = [path] if path.is_file() else [*path.iterdir()]
    show.out.print(f"written to [bold]{path}[/]: {show.size(sum(one.stat().st_size for one in written))}")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='XGBoost\'s: booster.save_model("model.json").')],
    target: Annotated[str, typer.Option(help="The column that the model tells.")],
    out: Annotated[Path, typer.Option(metavar="MODEL_DIR", help="The folder to write.")],
    schema: Annotated[Path | None, typer.Option(help="The schema (YAML) of the table that the model reads.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Instead of it a plan: the table as its recipe leaves it.")] = None,
) -> None:
    """Read a model of XGBoost's into a folder like a run's model/: to predict with, to explain, and to score by."""
    if (schema is None) == (plan is None):
        raise PlanError(
            "import.one-schema", "name either a schema or a plan", field="schema",
            remedy="atoll import FILE --target COLUMN --out MODEL_DIR --schema SCHEMA",
        )  # fmt: skip
    from atoll.models.xgboost_reading import MOST_BYTES, from_json, too_large

    if plan is not None:
        load_installed()
        asked = Plan.load(plan)
        contract = Prepared(asked.recipe).schema(asked.table)
    else:
        contract = validate(TableSchema, read_yaml(schema, "schema"), "schema")  # type: ignore[arg-type]
    if file.stat().st_size > MOST_BYTES:
        raise too_large()
    content = file.read_bytes()
    made, objective = from_json(content, contract, target)
    about = {
        "study": file.stem, "program": None, "model": {**described(made), "objective": objective}, "fitted": {},
        "schema": contract.model_dump(mode="json"),
        "imported": {"format": "xgboost", "sha256": hashlib.sha256(content).hexdigest()},
    }  # fmt: skip
    stored.save(out, about, made.arrays())
    settings = made.settings
    show.out.print(
        f"[bold]{out}[/]: {settings.num_trees} trees of depth {settings.max_depth} at most for each of {made.outputs} "
        f"output{'s' if made.outputs > 1 else ''}, of {len(settings.features)} features"
    )
