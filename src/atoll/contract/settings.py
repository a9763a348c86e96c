"""Settings files: read as strict YAML, validated with every problem listed, unknown keys hinted at."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError

from atoll.contract.errors import AtollError, PlanError, refuse_all
from atoll.contract.wire import Json, parse_json, to_json

M = TypeVar("M", bound=BaseModel)


def _as_sent(value: Mapping[str, Json]) -> Mapping[str, Json]:
    """*value* as the sites will get it; refuses what JSON cannot say, such as NaN or a date."""
    try:
        return dict(parse_json(to_json(dict(value))))
    except (TypeError, ValueError, RecursionError):
        raise ValueError("only texts (quote dates), finite numbers, true, false, null, lists and keys") from None


Options = Annotated[Mapping[str, Json], AfterValidator(_as_sent)]


class _Loader(yaml.SafeLoader):
    """YAML whose only booleans are true and false, as in YAML 1.2: "on" is a key, and "NO" a country."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML mapping from a file. Raises PlanError when it is missing, too large or not a mapping."""
    try:
        if path.stat().st_size > 4 << 20:
            raise PlanError("plan.too-large", f"the {what} file exceeds 4 MiB", field=path.name)
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)  # noqa: S506  (a safe loader)
    except FileNotFoundError:
        raise PlanError(
            "plan.missing-file", f"there is no {what} file {path}", remedy="check the path", field=path.name
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: such as 2024-13-01
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise PlanError(
            "plan.not-yaml", f"the {what} file is not valid YAML{place}", remedy="mend the file", field=path.name
        ) from None
    if not isinstance(content, dict):
        raise PlanError("plan.not-a-mapping", f"the {what} file must hold keys and values", field=path.name)
    return content


def read_plan(path: Path) -> dict[str, Any]:
    """A plan file's content, with the files that it names put in: a schema, a recipe, or recipes one after another
    (files, or written out), whose steps are joined and of whose versions the last counts. Raises PlanError."""
    content = read_yaml(path, "plan")
    for key in ("schema", "recipe"):
        if isinstance(content.get(key), str):
            content[key] = read_yaml(path.parent / content[key], key)
    if isinstance(parts := content.get("recipe"), list):
        read = [read_yaml(path.parent / part, "recipe") if isinstance(part, str) else part for part in parts]
        content["recipe"] = _joined(read)
    return content


def _joined(parts: list[Json]) -> Json:
    """Recipes as one; what is none is left as it is, to be refused with the plan."""
    whole: dict[str, Json] = {}
    for part in parts:
        if not isinstance(part, dict):
            return part
        for key, value in part.items():
            before = whole.get(key)
            whole[key] = [*before, *value] if isinstance(before, list) and isinstance(value, list) else value
    return whole


def validate(model: type[M], value: Json, what: str) -> M:
    """*value* as a *model*; raises PlanError listing every problem with its path, and for an
    unknown key the nearest known one."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems: list[AtollError] = []
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(model, item["loc"][:-1]), 1)
                hint = f"did you mean {near[0]!r}?" if near else "remove it"
                problems.append(PlanError("plan.unknown-key", f"{what}: unknown key {path!r}", field=path, remedy=hint))
            else:
                problems.append(PlanError("plan.bad-value", f"{what}: {path or what}: {item['msg']}", field=path))
        refuse_all(PlanError, "plan.invalid", problems)
        raise AssertionError from error  # pydantic errors always list at least one problem


def _known_keys(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at *path* inside *model* (aliases as users write them)."""
    fields, inside = _fields(model), model
    for part in path:  # a field of a model; else a mapping's key or a list's index
        inside = fields.get(str(part)) if fields else next((a for a in get_args(inside)[::-1] if a is not ...), None)
        if isinstance(inside, UnionType):
            inside = get_args(inside)[0]
        fields = _fields(inside)
    return list(fields)


def _fields(kind: Any) -> dict[str, Any]:
    """The annotations of a model's fields, by the names users write; {} for anything else."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return {}
    return {f.alias or n: f.annotation for n, f in kind.model_fields.items()}
