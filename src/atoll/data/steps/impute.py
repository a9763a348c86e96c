"""Missing cells filled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, Self

import ibis
from pydantic import Field, model_validator

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Found, Need, Step, column_of, free_name, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import blurred, coded
from atoll.data.steps.one_hot import values_of
from atoll.data.steps.streams import check_streams, latest, rows_before

PLACE = "__place"
"""Column of a row's place in its stream."""
_NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "mean": ("statistics.describe", (("bins", 1),)),
    "median": ("statistics.quantiles", (("probabilities", (0.5,)),)),
    "most_frequent": ("statistics.frequency", ()),
}


@step("impute")
class Impute(Step):
    """Fill missing cells of ``columns`` with a statistic over all sites' training rows, a constant, or what was before.

    with: "mean" or "median" of numeric columns (the median within 1e-6 of the schema's range); "most_frequent"
    of columns with a code list (of equal ones, the first in the list); "constant": ``value``; "forward_fill":
    the last value of the row's stream (rows with the same ``by``, in the order of the time ``on``), at most
    ``limit`` rows back (0: any). indicator: also make a column ``COLUMN_missing``, 1 where it was missing.
    """

    columns: Names = Field(min_length=1)
    method: Literal["mean", "median", "most_frequent", "constant", "forward_fill"] = Field(default="mean", alias="with")
    value: float | int | str | None = None
    on: str = ""
    by: Names = ()
    limit: int = Field(default=0, ge=0)
    indicator: bool = False

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if (self.method == "constant") != (self.value is not None):
            raise ValueError("value goes with constant")
        if (self.method == "forward_fill") != bool(self.on):
            raise ValueError("on (a time) goes with forward_fill")
        if self.method != "forward_fill" and (self.by or self.limit):
            raise ValueError("by and limit go with forward_fill")
        return self

    def needs(self) -> tuple[Need, ...]:
        if self.method not in _NEEDS:
            return ()
        program, options = _NEEDS[self.method]
        return (Need(program, self.columns, options),)

    def fit(self, found: Found) -> Fitted:
        if self.method not in _NEEDS:
            return {}
        result = found[self.needs()[0]]
        filling = {name: self._filling(result, name) for name in self.columns}
        empty = [name for name, value in filling.items() if value is None]
        if empty:
            raise PlanError(
                "recipe.nothing-to-impute",
                "the sites together have no or too few values in these columns",
                field=", ".join(empty),
                remedy="leave the columns out of the study",
            )
        return filling

    def _filling(self, result: Any, name: str) -> Any:
        if self.method == "mean":
            described = result["columns"][name]
            mean = described["mean"]
            return None if mean is None or math.isnan(mean) else float(mean)
        if self.method == "median":
            return result["quantiles"]["columns"][name]["values"][0]
        codes = result["frequency"]["columns"][name]
        counts = [count or 0 for count in codes["counts"]]
        return codes["values"][counts.index(max(counts))] if max(counts) > 0 else None

    @property
    def by_row(self) -> bool:
        return self.method != "forward_fill"

    def after(self, schema: TableSchema) -> TableSchema:
        filled, flags = {}, {}
        for name in self.columns:
            column = self._column(schema, name)
            if self.indicator:
                flag = coded(2, column).model_copy(update={"missing": "forbid"})
                flags[free_name(schema, f"{name}_missing")] = flag
            allowed = column.missing if self.method == "forward_fill" else "forbid"
            filled[name] = column.model_copy(update={"missing": allowed})
        if self.on:
            check_streams(schema, self.on, self.by)
        return schema.with_columns({**filled, **flags})

    def _column(self, schema: TableSchema, name: str) -> Column:
        """What *name* is once it is filled; raises PlanError where it cannot be."""
        if self.method in ("mean", "median"):  # neither need be one of the codes, but lies between them
            return blurred(numeric_of(schema, name))
        if self.method == "most_frequent":
            return values_of(schema, name)[0]
        column = column_of(schema, name, "real", "integer", "text", "date", "datetime")
        if self.method == "constant":
            known = column.values is None or self.value in column.values
            if column.numeric:
                right = isinstance(self.value, int | float) and known
                right = right and column.bounds()[0] <= float(self.value or 0) <= column.bounds()[1]
                right = right and (column.dtype == "real" or float(self.value or 0).is_integer())
            else:
                right = column.dtype == "text" and isinstance(self.value, str) and known
            if not right:
                raise PlanError(
                    "recipe.wrong-value", f"the value to fill is not one of {name!r}", field=name,
                    remedy="choose one within the schema's range or code list",
                )  # fmt: skip
        return column

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        changed: dict[str, Any] = {}
        if self.method == "forward_fill":
            place = ibis.row_number().over(rows_before(frame, self.on, self.by, None, 0))
            frame = replace(frame, table=frame.table.mutate(**{PLACE: place}))
        for name in self.columns:
            cell = frame[name]
            if self.indicator:
                changed[f"{name}_missing"] = cell.isnull().cast("float64")
            if self.method == "forward_fill":
                window = rows_before(frame, self.on, self.by, self.limit or None, 0)
                before = latest(cell, frame[PLACE]).over(window)
                changed[name] = (cell.isnull() & frame[self.on].notnull()).ifelse(before, cell)
            else:
                value = self.value if self.method == "constant" else fitted[name]
                changed[name] = cell.fill_null(float(value) if frame.schema.columns[name].numeric else str(value))  # type: ignore[arg-type]
        return frame.replace(changed, self.after(frame.schema), ordered=self.method != "forward_fill")
