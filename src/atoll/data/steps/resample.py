"""Irregular streams on a grid of times that all sites share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

import ibis
from pydantic import Field, model_validator

from atoll.contract.errors import SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import ID, ROW, Frame
from atoll.data.step import Fitted, column_of, numeric_of, step
from atoll.data.steps.declare import between, blurred
from atoll.data.steps.streams import Duration, OverStreams, at_clock, clock, microseconds, not_held

How = Literal["mean", "sum", "min", "max", "first", "last", "count"]
WITHOUT = "without a time"
DAY = 86_400_000_000
_ALL = "__all"
"""One value for all rows: a table has at least one stream."""


@step("resample")
class Resample(OverStreams):
    """Merge the rows of each stream (equal ``by``) that fall between two points of a grid of the time ``on``.

    every: the grid's step, in UTC from 1970 on, moved by offset ("16h": days from midnight at UTC+8). A
        bin holds its left edge, not its right one.
    columns: COLUMN: mean, sum, min, max, first, last or count (of present values). All others but on and by are
        left out. Missing cells are passed over; of none, all but a count are missing.
    label: the time of the new row: its bin's "left" or "right" edge.
    fill: also make rows for empty bins between a stream's first and last, missing (counts: 0).
    most: rows that a bin may hold, needed for sums, whose bounds derive from it; more are refused.
    """

    every: Duration
    columns: Mapping[str, How] = Field(min_length=1)
    label: Literal["left", "right"] = "left"
    fill: bool = False
    offset: str = Field(default="", pattern=r"^([1-9][0-9]*(d|h|min|s))?$")
    most: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if {self.on, *self.by} & set(self.columns):
            raise ValueError("on and by are not aggregated")
        if "sum" in self.columns.values() and not self.most:
            raise ValueError("sums need most, the rows that a bin may hold")
        return self

    def chooses(self) -> tuple[str, ...]:
        return (self.on, *self.by)

    def drops(self) -> tuple[str, ...]:
        return (WITHOUT,)

    def made(self, schema: TableSchema) -> TableSchema:
        columns = {}
        for name, column in schema.columns.items():
            if name == self.on:
                kind = {"dtype": self._dtype(column), "missing": "forbid", "grain": self._grain()}
                columns[name] = column.model_copy(update=kind)
            elif name in self.by:
                columns[name] = column
            elif name in self.columns:
                columns[name] = self._aggregated(schema, name)
        for name in self.columns:
            column_of(schema, name)
        return schema.model_copy(update={"columns": columns})

    def _dtype(self, on: Column) -> Literal["date", "datetime"]:
        whole = not microseconds(self.every) % DAY and not microseconds(self.offset) % DAY
        return "date" if on.dtype == "date" and whole else "datetime"

    def _grain(self) -> str | None:
        return None if microseconds(self.offset) % microseconds(self.every) else self.every

    def _aggregated(self, schema: TableSchema, name: str) -> Column:
        how = self.columns[name]
        if how == "count":
            like = column_of(schema, name).model_copy(update={"missing": "forbid"})
            return between(0, self.most or schema.max_rows, like, dtype="integer")
        if how in ("first", "last"):
            column = column_of(schema, name, "real", "integer", "text", "date", "datetime")
        else:
            column = numeric_of(schema, name)
        if how == "mean":
            column = blurred(column)
        if how == "sum":
            low, high = column.bounds()
            column = between(min(low, low * self.most), max(high, high * self.most), column, unit=column.unit)
        return column.model_copy(update={"missing": "allow"}) if self.fill else column

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        not_held(frame)
        schema, after = frame.schema, self.after(frame.schema)
        frame = frame.where(frame[self.on].notnull(), WITHOUT)
        every, offset = microseconds(self.every), microseconds(self.offset) % microseconds(self.every)
        place = ((clock(frame[self.on]) - offset) // every).cast("int64")
        table = frame.table.mutate(__place=place, **{_ALL: 0})
        keys = [*self.by, _ALL, "__place"]
        binned = table.group_by(keys).aggregate(
            __rows=table.count(), __ids=table[ID].bit_xor(), **{name: self._value(table, name) for name in self.columns}
        )
        self._check(frame, binned, schema.max_rows)
        if self.fill:
            binned = self._filled(binned)
        moved = binned["__place"] + (1 if self.label == "right" else 0)
        time = at_clock(moved * every + offset, after.columns[self.on].dtype)
        counted = {n: binned[n].fill_null(0).cast("float64") for n, how in self.columns.items() if how == "count"}
        order = ibis.window(order_by=[binned[name] for name in keys])
        who = ibis.struct(
            {name: binned[name] for name in (*keys, "__ids")}
        ).hash()  # any change of a row is one of its bin
        binned = binned.mutate(**{self.on: time, ROW: ibis.row_number().over(order), ID: who, **counted})
        wanted = [name for name, column in after.columns.items() if column.role != "ignore"]
        return dataclasses.replace(frame, table=binned.select(*wanted, ROW, ID), schema=after, ordered=False)

    def _value(self, table: Any, name: str) -> Any:
        how, cell = self.columns[name], table[name]
        if how in ("first", "last"):
            order = [table[self.on], table[ROW]]
            return getattr(cell, how)(where=cell.notnull(), order_by=order)
        return getattr(cell, how)()

    def _check(self, frame: Frame, binned: Any, max_rows: int) -> None:
        """Rows in a bin, and rows to come; raises SchemaError for too many."""
        place = binned["__place"]
        rows = (place.max() - place.min() + 1) if self.fill else place.count()
        spans = binned.group_by([*self.by, _ALL]).aggregate(rows=rows, most=binned["__rows"].max())
        found = frame.engine.row(spans.aggregate(rows=spans["rows"].sum(), most=spans["most"].max()))
        if (found["rows"] or 0) > max_rows:
            raise SchemaError(
                "schema.too-many-rows", f"the grid would have more than {max_rows} rows", field="max_rows",
                remedy="take a wider grid, or raise max_rows in the schema, at every site",
            )  # fmt: skip
        if self.most and (found["most"] or 0) > self.most:
            raise SchemaError(
                "recipe.too-many-in-bin", f"a bin holds more than {self.most} rows", field=self.on,
                remedy="raise the step's most, at every site, or remove duplicate rows",
            )  # fmt: skip

    def _filled(self, binned: Any) -> Any:
        """With a row for every place between a stream's first and last."""
        spans = binned.group_by([*self.by, _ALL]).aggregate(
            __first=binned["__place"].min(), __end=binned["__place"].max() + 1
        )
        grid = spans.select(*self.by, _ALL, __place=ibis.range(spans["__first"], spans["__end"]).unnest())
        values = binned.drop(_ALL).rename({f"__{name}": name for name in (*self.by, "__place")})
        same = [grid[name].identical_to(values[f"__{name}"]) for name in (*self.by, "__place")]
        return grid.left_join(values, same).select(*self.by, _ALL, "__place", "__ids", *self.columns)
