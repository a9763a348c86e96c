"""The Plan: one frozen, versioned description of a study.

    atoll: 1
    name: heart-disease
    dataset: heart
    schema: schema.yaml            # a file of its own, read relative to the plan
    recipe: recipe.yaml
    program: horizontal.glm
    params: {family: logistic, target: disease, features: [age, sex]}
    protection: secagg              # default where all rounds are Sum
    cohort: {min_sites: 3}
    run: {seed: 7, holdout: 0.3333333333, deadline_s: 60}

The hash of plan, schema and recipe together identifies the *study*. The same object
can be made in Python; unknown keys fail with their path and the nearest known name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from atoll.contract.privacy import Privacy
from atoll.contract.protection import Choice
from atoll.contract.schedule import Schedule
from atoll.contract.schema import TableSchema
from atoll.contract.settings import Options, read_plan, validate
from atoll.contract.wire import Json, canonical_json


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Recipe(_Part):
    """Preparation, the same at every site: ordered lists of ``{step: name, …options}``. clean: what makes a
    site's table keep the contract, before it is checked. steps: what is made of it afterwards."""

    version: str = "1"
    clean: tuple[Options, ...] = ()
    steps: tuple[Options, ...] = ()


class CohortRule(_Part):
    """Who takes part.

    sites: names (default: all that are enrolled). min_sites: fewer than this end the run.
    on_dropout: "continue" with at least min_sites survivors, or "fail". members: most sites that may stand behind one
    name: more than 1 where some are regions, which answer with the sum of their own sites. above: in what a region
    asks of its own sites, the hash of the plan that this serves.
    """

    sites: tuple[str, ...] = ()
    min_sites: int = Field(default=3, ge=1)
    on_dropout: Literal["continue", "fail"] = "continue"
    members: int = Field(default=1, ge=1, le=1_000_000)
    above: str = Field(default="", pattern="^([0-9a-f]{64})?$")

    @field_validator("sites")
    @classmethod
    def _each_once(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(sites)) != len(sites):
            raise ValueError("a site is named twice")
        return sites


class RunSettings(_Part):
    """seed: of splits and shuffles. holdout: fraction of each site's rows kept for evaluation, stratified by the
    program's target, or the latest by the column holdout_by (for forecasts). deadline_s: seconds without progress
    after which a site counts as dropped out. evaluate: score the model on the held-out rows. min_group_size: fewest
    people in any cell that is reported; a site refuses a plan that promises less than its policy."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    holdout_by: str | None = None
    deadline_s: float = Field(default=120.0, gt=0)
    evaluate: bool = True
    min_group_size: int = Field(default=5, ge=1)


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
    protection: Choice = Choice()
    privacy: Privacy | None = None
    cohort: CohortRule = CohortRule()
    schedule: Schedule = Schedule()
    run: RunSettings = RunSettings()

    @field_validator("protection", mode="before")
    @classmethod
    def _named(cls, value: Json) -> Json:
        return {"sum": value} if isinstance(value, str) else value

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
        return Plan.from_json(read_plan(Path(path)))
