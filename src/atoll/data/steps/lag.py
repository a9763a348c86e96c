"""What was before: lags, differences and rolling statistics of each stream."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Step, free_name, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import between, blurred
from atoll.data.steps.streams import Duration, check_streams, microseconds, rows_before, time_before

Rows = Annotated[int, Field(ge=1, le=100_000)]
How = Literal["mean", "sum", "std", "min", "max"]


@step("lag")
class Lag(Step):
    """New columns of what ``columns`` were before, in the stream of each row (equal ``by``, in the order of ``on``).

    lags: COLUMN_lagN, the value N rows before. differences: COLUMN_diffN, the value minus that.
    windows: rows (7) or durations ("24h") that end with the row itself, or with current: false just before it:
        COLUMN_STATISTIC_WINDOW of the present values; statistics: mean, sum, std (n − 1), min, max. A window of
        7 rows holds 7; one of 24h those later than 24 h before (with current: false also that moment, but
        not the row's own).
    least: fewer present values than that give a missing cell (std: at least 2). most: rows that a duration may
        hold, needed for sums, whose bounds derive from it; sums of more are missing.
    """

    columns: Names = Field(min_length=1)
    on: str
    by: Names = ()
    lags: tuple[Rows, ...] = ()
    differences: tuple[Rows, ...] = ()
    windows: tuple[Rows | Duration, ...] = ()
    statistics: tuple[How, ...] = ("mean",)
    current: bool = True
    least: int = Field(default=1, ge=1)
    most: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not (self.lags or self.differences or self.windows):
            raise ValueError("write lags, differences or windows")
        if "sum" in self.statistics and not self.most and any(isinstance(w, str) for w in self.windows):
            raise ValueError("sums over durations need most, the rows that one may hold")
        return self

    def after(self, schema: TableSchema) -> TableSchema:
        check_streams(schema, self.on, self.by)
        made: dict[str, Column] = {}
        for name in self.columns:
            column = numeric_of(schema, name).model_copy(update={"missing": "allow"})
            low, high = column.bounds()
            whole: Any = column.dtype
            made |= {f"{name}_lag{n}": column for n in self.lags}
            difference = between(low - high, high - low, column, dtype=whole, unit=column.unit)
            made |= {f"{name}_diff{n}": difference for n in self.differences}
            for window in self.windows:
                rows = window if isinstance(window, int) else self.most
                of = {
                    "mean": blurred(column),
                    "sum": between(min(low, low * rows), max(high, high * rows), column, dtype=whole, unit=column.unit),
                    "std": between(0, (high - low) / math.sqrt(2), column, unit=column.unit),
                    "min": column,
                    "max": column,
                }
                made |= {f"{name}_{how}_{window}": of[how] for how in self.statistics}
        for new in made:
            free_name(schema, new)
        return schema.with_columns(made)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        made: dict[str, Any] = {}
        for name in self.columns:
            cell = frame[name]
            for n in sorted({*self.lags, *self.differences}):
                before = cell.first().over(rows_before(frame, self.on, self.by, n, n))
                made |= {f"{name}_lag{n}": before} if n in self.lags else {}
                made |= {f"{name}_diff{n}": cell - before} if n in self.differences else {}
            for window in self.windows:
                over, count = self._over(frame, window), cell.count().over(self._over(frame, window))
                for how in self.statistics:
                    value = getattr(cell, how)().over(over)
                    told = count >= max(self.least, 2 if how == "std" else 1)
                    if how == "sum" and isinstance(window, str):
                        told = told & (count <= self.most)
                    made[f"{name}_{how}_{window}"] = told.ifelse(value, null("float64"))
        timed = frame[self.on].notnull()  # a row without a time has no row before it
        made = {name: timed.ifelse(value, null("float64")) for name, value in made.items()}
        return frame.replace(made, self.after(frame.schema), ordered=False)

    def _over(self, frame: Frame, window: int | str) -> Any:
        if isinstance(window, int):
            first, last = (window - 1, 0) if self.current else (window, 1)
            return rows_before(frame, self.on, self.by, first, last)
        length = microseconds(window)
        first, last = (length - 1, 0) if self.current else (length, 1)
        return time_before(frame, self.on, self.by, first, last)
