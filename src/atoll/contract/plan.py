"""The Plan: one frozen, versioned description of a study.

    atoll: 1
    name: heart-disease
    dataset: heart
    schema: schema.yaml            # a file of its own, read relative to the plan
    recipe: recipe.yaml
    program: horizontal.glm
    params: {family: logistic, target: disease, features: [age, sex]}
    protection: plain
    cohort: {min_sites: 3}
    run: {seed: 7, holdout: 0.3333333333, deadline_s: 60}

The hash of plan, schema and recipe together identifies the *study*. The same object
can be made in Python; unknown keys fail with their path and the nearest known name.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from atoll.contract.errors import AtollError, PlanError, refuse_all
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Json, canonical_json, parse_json, to_json

M = TypeVar("M", bound=BaseModel)


def _as_sent(value: Mapping[str, Json]) -> Mapping[str, Json]:
    """*value* as the sites will get it; refuses what JSON cannot say, such as NaN or a date."""
    try:
        return dict(parse_json(to_json(dict(value))))
    except (TypeError, ValueError, RecursionError):
        raise ValueError("only texts (quote dates), finite numbers, true, false, null, lists and keys") from None


Options = Annotated[Mapping[str, Json], AfterValidator(_as_sent)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Recipe(_Part):
    """Preparation, the same at every site: an ordered list of ``{step: name, …options}``."""

    version: str = "1"
    steps: tuple[Options, ...] = ()


class CohortRule(_Part):
    """Who takes part.

    sites: names (default: all that are enrolled). min_sites: fewer than this end the run.
    on_dropout: "continue" with at least min_sites survivors, or "fail".
    """

    sites: tuple[str, ...] = ()
    min_sites: int = Field(default=3, ge=1)
    on_dropout: Literal["continue", "fail"] = "continue"


class RunSettings(_Part):
    """seed: of splits and shuffles. holdout: fraction of each site's rows kept for evaluation,
    stratified by the program's target. deadline_s: seconds without progress after which a
    site counts as dropped out. evaluate: score the model on the held-out rows."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    deadline_s: float = Field(default=120.0, gt=0)
    evaluate: bool = True


class Plan(_Part):
    """A study. ``atoll`` is the version of this format; *dataset* names the data set at each
    site (and its privacy budget); *purpose* is what sites' policies are asked to allow."""

    atoll: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    purpose: str = "research"
    dataset: str = "default"
    table: TableSchema = Field(alias="schema")
    recipe: Recipe = Recipe()
    program: str
    params: Options = Field(default_factory=dict)
    protection: str = ""
    cohort: CohortRule = CohortRule()
    run: RunSettings = RunSettings()

    def to_json(self) -> dict[str, Json]:
        """The plan with schema and recipe embedded, as it is hashed, stored and sent."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def hash(self) -> str:
        """SHA-256 of plan, schema (with its columns' order) and recipe, hex: the study's identity."""
        content = canonical_json([self.to_json(), list(self.table.columns)])
        return hashlib.sha256(b"atoll plan 1\0" + content).hexdigest()

    @staticmethod
    def from_json(value: Json) -> Plan:
        """Validate a plan that has its schema and recipe embedded; raises PlanError listing every problem."""
        return validate(Plan, value, "plan")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file and the schema and recipe files it names.

        Raises PlanError for a missing or malformed file, unknown keys and wrong values.
        """
        path = Path(path)
        content = read_yaml(path, "plan")
        for key in ("schema", "recipe"):
            if isinstance(content.get(key), str):
                content[key] = read_yaml(path.parent / content[key], key)
        return Plan.from_json(content)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML mapping from a file. Raises PlanError when it is missing, too large or not a mapping."""
    try:
        if path.stat().st_size > 4 << 20:
            raise PlanError("plan.too-large", f"the {what} file exceeds 4 MiB", field=path.name)
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
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
