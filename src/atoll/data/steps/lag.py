"""What was before, or comes: lags, differences, rolling statistics and values to forecast of each stream."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from atoll.contract.schema import Column, TableSchema
from atoll.data.columns import to_array
from atoll.data.frame import Frame
from atoll.data.step import Fitted, free_name, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import between, blurred
from atoll.data.steps.streams import Duration, OverStreams, Places, in_order, microseconds
from atoll.data.steps.windows import Floats, blocks, counted, rolled, since

Rows = Annotated[int, Field(ge=1, le=100_000)]
How = Literal["mean", "sum", "std", "min", "max"]


@step("lag")
class Lag(OverStreams):
    """New columns of what ``columns`` were before, in the stream of each row (equal ``by``, in the order of ``on``).

    lags: COLUMN_lagN, the value N rows before. differences: COLUMN_diffN, the value minus that; rising: of columns
        that only rise, such as cumulative counts: a difference below 0 counts as 0. ahead: labels COLUMN_aheadN, the
        value N rows after.
    windows: rows (7) or durations ("24h") that end with the row itself, or with current: false just before it:
        COLUMN_STATISTIC_WINDOW of the present values; statistics: mean, sum, std (n − 1), min, max. A window of
        7 rows holds 7; one of 24h those later than 24 h before (with current: false also that moment, but
        not the row's own).
    least: fewer present values than that give a missing cell (std: at least 2). most: rows that a duration may
        hold, needed for sums, whose bounds derive from it; sums of more are missing.
    """

    adds: ClassVar[bool] = True
    columns: Names = Field(min_length=1)
    lags: tuple[Rows, ...] = ()
    differences: tuple[Rows, ...] = ()
    rising: bool = False
    ahead: tuple[Rows, ...] = ()
    windows: tuple[Rows | Duration, ...] = ()
    statistics: tuple[How, ...] = ("mean",)
    current: bool = True
    least: int = Field(default=1, ge=1)
    most: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if not (self.lags or self.differences or self.ahead or self.windows):
            raise ValueError("write lags, differences, ahead or windows")
        if "sum" in self.statistics and not self.most and any(isinstance(w, str) for w in self.windows):
            raise ValueError("sums over durations need most, the rows that one may hold")
        return self

    def made(self, schema: TableSchema) -> TableSchema:
        made: dict[str, Column] = {}
        for name in self.columns:
            column = numeric_of(schema, name).model_copy(update={"missing": "allow"})
            low, high = column.bounds()
            whole: Any = column.dtype
            made |= {f"{name}_lag{n}": column for n in self.lags}
            made |= {f"{name}_ahead{n}": column.model_copy(update={"role": "label"}) for n in self.ahead}
            fall = 0 if self.rising else low - high
            difference = between(fall, high - low, column, dtype=whole, unit=column.unit)
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
        frame = frame.keep()
        after = self.after(frame.schema)
        with tempfile.TemporaryDirectory(dir=frame.engine.folder) as folder:
            files = _Files(Path(folder), frame.rows())
            self._compute(frame, after, files)
            table = frame.engine.load(files.beside(frame))
        return dataclasses.replace(frame, table=table).replace({}, after)

    def _compute(self, frame: Frame, after: TableSchema, files: _Files) -> None:
        """Every new column, into a file: one at a time is in memory."""
        rows, start, times = in_order(frame, self.on, self.by)

        def put(name: str, cells: Iterator[tuple[slice, Floats]]) -> None:
            column = np.full(files.rows, np.nan)  # a row without a time has no row before it
            for part, found in cells:
                column[rows[part]] = np.clip(found, *after.columns[name].bounds())
            files.write(name, column)

        for name in self.columns:
            values = _cells(frame, name)[rows]
            for n in self.lags:
                put(f"{name}_lag{n}", ((part, _before(values, start, part, n)) for part in blocks(len(rows))))
            for n in self.ahead:
                put(f"{name}_ahead{n}", ((part, _after(values, start, part, n)) for part in blocks(len(rows))))
            for n in self.differences:
                differences = ((part, values[part] - _before(values, start, part, n)) for part in blocks(len(rows)))
                put(f"{name}_diff{n}", differences)
        for window in self.windows:
            first, end = self._bounds(start, times, window)
            for name in self.columns:
                values = _cells(frame, name)[rows]
                for how in self.statistics:
                    put(f"{name}_{how}_{window}", self._rolled(values, first, end, how, isinstance(window, str)))

    def _bounds(self, start: Places, times: Places, window: int | str) -> tuple[Places, Places]:
        """What each row's window holds: the rows from the first to just before the second."""
        own = np.arange(len(start), dtype=start.dtype)
        if isinstance(window, int):
            return np.maximum(own + self.current - window, start), own + self.current
        new = np.ones(len(own), bool)
        new[1:] = (times[1:] != times[:-1]) | (start[1:] != start[:-1])
        moments = np.flatnonzero(new)  # the first row of each moment of a stream
        sizes = np.diff(moments, append=len(own))
        end = np.repeat(moments + sizes if self.current else moments, sizes).astype(start.dtype)
        length = min(microseconds(window), int(times.max(initial=0)) + 1)  # nothing is longer ago
        return since(times, start, length if self.current else length + 1), end

    def _rolled(
        self, values: Floats, first: Places, end: Places, how: How, timed: bool
    ) -> Iterator[tuple[slice, Floats]]:
        for part in blocks(len(first)):
            count = counted(values, first[part], end[part])
            found = rolled(values, first[part], end[part], "sum" if how == "mean" else how)
            if how == "mean":
                found /= np.maximum(count, 1)
            told = count >= max(self.least, 2 if how == "std" else 1)
            if how == "sum" and timed:
                told &= count <= self.most
            found[~told] = np.nan
            yield part, found


def _cells(frame: Frame, name: str) -> Floats:
    """A numeric column in the order of rows."""
    cells = np.empty(frame.rows())
    done = 0
    for batch in frame.engine.batches(frame.table.select(name)):
        cells[done : (done := done + len(batch))] = to_array(batch.column(0), frame.schema.columns[name])
    return cells


def _before(values: Floats, start: Places, part: slice, n: int) -> Floats:
    """The values n rows before those of *part*, in their streams."""
    place = np.arange(part.start, part.stop) - n
    return np.where(place >= start[part], values[place], np.nan)  # a negative place is never taken


def _after(values: Floats, start: Places, part: slice, n: int) -> Floats:
    """The values n rows after those of *part*, in their streams."""
    place = np.arange(part.start, part.stop) + n
    inside = np.minimum(place, len(values) - 1)
    return np.where((place == inside) & (start[inside] == start[part]), values[inside], np.nan)


class _Files:
    """Columns of *rows* numbers, a file each."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.rows, self._folder, self._names = rows, folder, list[str]()

    def write(self, name: str, column: Floats) -> None:
        """Add one."""
        column.tofile(self._folder / str(len(self._names)))
        self._names.append(name)

    def beside(self, frame: Frame) -> pa.RecordBatchReader:
        """The rows of *frame* with them; NaN is missing. Batches, as a POSITIONAL JOIN holds one side in memory."""
        cells = [(name, self._folder / str(i)) for i, name in enumerate(self._names)]
        layout = frame.table.schema().to_pyarrow()
        for name, _ in cells:
            layout = layout.append(pa.field(name, pa.float64()))

        def batches() -> Iterator[pa.RecordBatch]:
            done = 0
            for batch in frame.engine.batches(frame.table):
                size = len(batch)
                made = [np.fromfile(file, count=size, offset=8 * done) for _, file in cells]
                columns = [*batch.columns, *(pa.array(column, from_pandas=True) for column in made)]
                yield pa.record_batch([c.cast(f.type) for c, f in zip(columns, layout, strict=True)], layout)
                done += size

        return pa.RecordBatchReader.from_batches(layout, batches())
