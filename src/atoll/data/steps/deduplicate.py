"""Rows that say the same again, and rows that a later one replaces."""

from __future__ import annotations

from typing import Any, Self

import ibis
from pydantic import Field, model_validator

from atoll.data.frame import ROW, Frame
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import Names, missing

SAME, REPLACED = "duplicate rows", "superseded rows"


@step("deduplicate", "clean")
class Deduplicate(Step):
    """Leave out rows that are equal to an earlier one in all columns; with ``key``, then all but the latest of a key.

    key: columns that name what a row is about; rows without a whole key all stay. latest: the column that says
    which row is latest, compared as the schema's type; of equal ones the last in the table.
    """

    key: Names = ()
    latest: str = Field(default="")

    @model_validator(mode="after")
    def _key_and_latest(self) -> Self:
        if bool(self.key) != bool(self.latest):
            raise ValueError("key and latest go together")
        return self

    @property
    def by_row(self) -> bool:
        return not self.key  # a later row of a key takes an earlier one away

    def drops(self) -> tuple[str, ...]:
        return (SAME, REPLACED) if self.key else (SAME,)

    def chooses(self) -> tuple[str, ...]:
        return (*self.key, self.latest) if self.key else ()

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        columns = [name for name in frame.table.columns if name != ROW]
        first = frame.table.group_by(columns).aggregate(first=frame.table[ROW].min())
        frame = _only(frame, first.select("first"), SAME)
        if not self.key:
            return frame
        without = ibis.or_(*[missing(frame, name) for name in self.key])
        cell = frame[self.latest]
        declared = frame.schema.columns.get(self.latest)
        kinds = {"real": "float64", "integer": "float64", "date": "date", "datetime": "timestamp(6)"}
        when = cell.try_cast(kinds[declared.dtype]) if declared is not None and declared.dtype in kinds else cell
        order = [when.desc(nulls_first=False), frame[ROW].desc()]
        window = ibis.window(group_by=[*(frame[name] for name in self.key), without], order_by=order)
        ranked = frame.table.select(row=frame[ROW], without=without, rank=ibis.row_number().over(window))
        return _only(frame, ranked.filter(ranked.without | (ranked["rank"] == 0)).select(first="row"), REPLACED)


def _only(frame: Frame, rows: Any, reason: str) -> Frame:
    """The rows whose numbers are in *rows*, which is computed once."""
    kept = frame.engine.keep(rows, "place")
    return frame.where(frame.table[ROW].isin(kept["first"]), reason, ordered=False)
