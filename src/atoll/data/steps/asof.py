"""The latest value known at each row's time: streams of a long table joined as of then."""

from __future__ import annotations

from typing import Any, Self

import ibis
from pydantic import Field, model_validator

from atoll.contract.schema import TableSchema
from atoll.data.frame import ROW, Frame, null
from atoll.data.step import Fitted, column_of, free_name, step
from atoll.data.steps.cells import Names
from atoll.data.steps.streams import Duration, OverStreams, clock, latest, microseconds, time_before


@step("asof")
class AsOf(OverStreams):
    """In every row, the latest value of each column in ``value`` among the rows of its stream (equal ``by``)
    that is known at the row's time ``on`` and not older than ``tolerance``.

    For tables whose rows each hold a value of one stream and lack those of the others. delay: a value becomes
    known so long after its row's time. Of values at the same time, the last in the table counts. suffix: of
    new columns; "" replaces those there are. Rows without a time get no value.
    """

    value: Names = Field(min_length=1)
    tolerance: Duration
    delay: str = Field(default="", pattern=r"^([1-9][0-9]*(d|h|min|s))?$")
    suffix: str = ""

    @model_validator(mode="after")
    def _can_be_known(self) -> Self:
        if microseconds(self.delay) > microseconds(self.tolerance):
            raise ValueError("no value is known within the tolerance: delay is longer")
        if {self.on, *self.by} & set(self.value):
            raise ValueError("on and by are not joined")
        return self

    def made(self, schema: TableSchema) -> TableSchema:
        made = {}
        for name in self.value:
            column = column_of(schema, name, "real", "integer", "text", "date", "datetime")
            new = free_name(schema, name + self.suffix, *(() if self.suffix else (name,)))
            made[new] = column.model_copy(update={"missing": "allow"})
        return schema.with_columns(made)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        at_once = ibis.window(group_by=[frame[name] for name in (*self.by, self.on)])
        made: dict[str, Any] = {}
        for name in self.value:  # rows of one time have one value first, so that no row's place decides
            made[f"__{name}"] = latest(frame[name], frame[ROW]).over(at_once)
        table = frame.replace(made, ordered=False)
        window = time_before(table, self.on, self.by, microseconds(self.tolerance), microseconds(self.delay))
        found = {}
        for name in self.value:
            known = latest(table[f"__{name}"], clock(table[self.on])).over(window)
            found[name + self.suffix] = table[self.on].isnull().ifelse(null(str(known.type())), known)
        return table.replace(found, self.after(frame.schema), ordered=False)
