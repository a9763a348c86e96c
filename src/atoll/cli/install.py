"""atoll install: a trained model becomes one that this party holds, and that plans name by its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from atoll.cli import show
from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan
from atoll.contract.settings import read_plan, validate
from atoll.models import stored
from atoll.models.installed import Base, installed_at


def install(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The folder model/ of a run's results.")],
    name: Annotated[str, typer.Option("--name", help="What plans call it.")],
    models: Annotated[
        Path | None, typer.Option("--models", metavar="DIR", help="Where to (default: $ATOLL_MODELS, else ~/models).")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="PLAN", help="A plan that names it, to be filled in.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="PLAN", help="Where to write that plan, whole.")] = None,
    allow: Annotated[list[str], typer.Option(help="package.nets:Net that may be imported for it (repeatable).")] = [],  # noqa: B006
    machine: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Install a stored model at this party, and print how a plan names it. With --plan and --out: write that plan with
    the model's spec and hash wherever it says `base: {name: NAME}`, its schema and recipe embedded."""
    if (plan is None) != (out is None):
        raise PlanError("install.plan", "--plan and --out go together", field="plan", remedy="give both, or neither")
    fitted, _, about = stored.load(model, allow)
    content = (model / stored.NUMBERS).read_bytes()
    base = validate(Base, {"name": name, "sha256": hashlib.sha256(content).hexdigest()}, "base")
    spec = {**about["model"]["spec"], "base": {"name": base.name, "sha256": base.sha256}}
    filled = None if plan is None else _filled(plan, spec)
    place = installed_at(base.name, models)
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f"{place.name}.new")
    fresh.write_bytes(content)
    fresh.replace(place)  # a party that reads it meanwhile has the one or the other
    if out is not None:
        out.write_text(yaml.safe_dump(filled, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if machine:
        show.as_json({"file": str(place), **spec["base"], "task": fitted.task, "model": spec})
        return
    show.out.print(f"installed [bold]{place}[/]: {show.size(len(content))}, sha256 {base.sha256}")
    if filled is not None:
        show.out.print(f"written to [bold]{out}[/]: plan {Plan.from_json(filled).hash}")
    else:
        show.say(yaml.safe_dump({"model": spec}, sort_keys=False, allow_unicode=True).rstrip())


def _filled(plan: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """The content of a plan, whole, with *spec* for every model that has its base's name."""
    content = read_plan(plan)
    places = 0

    def fill(value: Any) -> Any:
        nonlocal places
        if isinstance(value, list):
            return [fill(one) for one in value]
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("base"), dict) and value["base"].get("name") == spec["base"]["name"]:
            places += 1
            return spec
        return {key: fill(one) for key, one in value.items()}

    content["params"] = fill(content.get("params", {}))
    if not places:
        raise PlanError(
            "install.no-place", f"{plan.name} names no model {spec['base']['name']!r}", field="params",
            remedy="write in its params: model: {base: {name: NAME}}, with the --name given here",
        )  # fmt: skip
    Plan.from_json(content)
    return content
