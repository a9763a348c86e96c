"""Preparation recipes: declared steps, fitted on *federated* statistics, applied at every site.

A step says which columns' statistics it needs; the runtime fetches them (one describe
program for all that are needed at once), calls ``fit``, and sends what was fitted to
the sites, where ``apply`` uses it. ``fit`` and ``after`` run at both ends and see no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from atoll.contract.errors import PlanError
from atoll.contract.plan import Plan, Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.contract.settings import validate
from atoll.contract.wire import Json
from atoll.data.table import Table, hold_out

Statistics = Mapping[str, Mapping[str, float]]
Fitted = Mapping[str, Json]


class Step(Protocol):
    """One preparation step."""

    def needs(self) -> tuple[str, ...]:
        """Columns whose federated statistics ``fit`` wants (() for none)."""

    def fit(self, statistics: Statistics) -> Fitted:
        """Parameters from statistics (column → count, mean, variance …)."""

    def after(self, schema: TableSchema) -> TableSchema:
        """The table's schema after this step; raises PlanError if a column is not there."""

    def apply(self, table: Table, fitted: Fitted) -> Table:
        """The table after this step. May not look at anything but its arguments."""


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    step: str

    def needs(self) -> tuple[str, ...]:
        return ()

    def fit(self, statistics: Statistics) -> Fitted:
        return {}


def _column(schema: TableSchema, name: str) -> Column:
    """A numeric column that the table really holds; raises PlanError for any other."""
    if name not in schema.columns or schema.columns[name].role == "ignore":
        raise PlanError("recipe.no-column", f"the recipe names a column {name!r} that is not there", field=name)
    if not schema.columns[name].numeric:
        raise PlanError("recipe.not-numeric", f"{name!r} is not numeric", field=name, remedy="leave the column out")
    return schema.columns[name]


class Threshold(_Step):
    """``into`` = 1 where ``column`` > ``above``, else 0; missing stays missing. Replaces the column."""

    column: str
    above: float
    into: str

    def after(self, schema: TableSchema) -> TableSchema:
        source = _column(schema, self.column)
        if self.into != self.column and self.into in schema.columns:
            raise PlanError(
                "recipe.column-exists", f"there is a column {self.into!r} already", field=self.into,
                remedy="choose another name for into",
            )  # fmt: skip
        made = Column(dtype="integer", values=(0, 1), role=source.role, missing=source.missing)
        columns = {name: column for name, column in schema.columns.items() if name != self.column}
        return schema.model_copy(update={"columns": {**columns, self.into: made}})

    def apply(self, table: Table, fitted: Fitted) -> Table:
        values = table[self.column]
        made = np.where(np.isnan(values), np.nan, (values > self.above).astype(np.float64))
        columns = {name: column for name, column in table.columns.items() if name != self.column}
        return Table(self.after(table.schema), {**columns, self.into: made}, table.held_out)


class Impute(_Step):
    """Fill missing cells of numeric ``columns`` with the mean over all sites' training rows."""

    columns: tuple[str, ...] = Field(min_length=1)
    method: Literal["mean"] = Field(default="mean", alias="with")

    def needs(self) -> tuple[str, ...]:
        return self.columns

    def fit(self, statistics: Statistics) -> Fitted:
        empty = [name for name in self.columns if not statistics[name]["count"] > 0]
        if empty:
            raise PlanError(
                "recipe.nothing-to-impute",
                "no site has a single value in these columns",
                field=", ".join(empty),
                remedy="leave the columns out of the study",
            )
        return {name: float(statistics[name]["mean"]) for name in self.columns}

    def after(self, schema: TableSchema) -> TableSchema:
        filled = {name: _column(schema, name).model_copy(update={"missing": "forbid"}) for name in self.columns}
        for name, column in filled.items():
            if column.values is not None:  # a mean is not one of the codes, but lies between them
                low, high = column.bounds()
                filled[name] = column.model_copy(update={"values": None, "range": (low, high), "dtype": "real"})
        return schema.with_columns(filled)

    def apply(self, table: Table, fitted: Fitted) -> Table:
        columns = dict(table.columns)
        for name in self.columns:
            columns[name] = np.where(np.isnan(table[name]), float(fitted[name]), table[name])
        return Table(self.after(table.schema), columns, table.held_out)


STEPS: dict[str, type[Any]] = {"threshold": Threshold, "impute": Impute}


class Prepared:
    """A recipe made ready: its steps, grouped into stages that can be fitted together.

    A stage's statistics are those of the table before its first step that waits for any, so
    it ends before a step that needs columns which that step, or one after it, may change.
    """

    version: ClassVar[str] = "1"

    def __init__(self, recipe: Recipe) -> None:
        self.steps: list[Step] = []
        for number, declared in enumerate(recipe.steps):
            name = declared.get("step")
            if name not in STEPS:
                raise PlanError(
                    "recipe.unknown-step", f"the recipe's step {number + 1} is unknown", field=str(name),
                    remedy=f"known steps: {', '.join(sorted(STEPS))}",
                )  # fmt: skip
            self.steps.append(validate(STEPS[str(name)], dict(declared), f"recipe step {number + 1}"))

    def stages(self) -> list[list[int]]:
        """Step numbers by stage: all statistics of one stage are fetched in one go."""
        stages: list[list[int]] = [[]]
        waiting: set[str] = set()
        changed = False
        for number, step in enumerate(self.steps):
            if step.needs() and (changed or waiting & set(step.needs())):
                stages.append([])
                waiting, changed = set(), False
            stages[-1].append(number)
            changed |= bool(waiting) and not step.needs()
            waiting |= set(step.needs())
        return [stage for stage in stages if stage]

    def schema(self, schema: TableSchema, steps: Sequence[int] | None = None) -> TableSchema:
        """The schema after all (or the first) steps."""
        for number in range(len(self.steps)) if steps is None else steps:
            schema = self.steps[number].after(schema)
        return schema

    def apply(self, table: Table, view: Mapping[str, Fitted]) -> Table:
        """The table after every step up to the first that needs fitting and is not in *view*.

        view: fitted parameters by step number (as text, since they travel as JSON).
        """
        for number, step in enumerate(self.steps):
            if step.needs() and str(number) not in view:
                break
            table = step.apply(table, view.get(str(number), {}))
        return table


def with_hold_out(table: Table, plan: Plan, site: str) -> Table:
    """*table* with the rows marked that the plan keeps for evaluation (unless already marked).

    Strata are the classes of the program's target, where it is a code list that the recipe's
    steps before any fitting already yield.
    """
    if table.held_out is not None:
        return table
    ready = Prepared(plan.recipe).apply(table, {})
    target = str(plan.params.get("target", ""))
    column = ready.schema.columns.get(target)
    labels = ready[target] if column is not None and column.values is not None else None
    held = hold_out(labels, len(table), plan.run.holdout, plan.run.seed, site)
    return Table(table.schema, table.columns, held)
