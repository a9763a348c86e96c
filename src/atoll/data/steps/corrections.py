"""Counts that were corrected later: nothing stays negative, no day stays empty, and totals stay as they are."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atoll.contract.schema import Column, TableSchema
from atoll.data.columns import to_array
from atoll.data.frame import Frame
from atoll.data.step import Fitted, free_name, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import between, coded
from atoll.data.steps.streams import Duration, OverStreams, in_order, microseconds

Floats = NDArray[np.float64]


@step("corrections")
class Corrections(OverStreams):
    """Mend counts that were corrected, in each stream (equal ``by``) in the order of ``on``.

    kind: "cumulative" counts, or "new" ones of each row's time. A correction downward (a cumulative count that falls, a
    negative new one) is taken back from the latest days before it, as far as it goes: later totals stay. Of new
    counts, what exceeds all counts before it is lost.
    slip: a cumulative count below one before it that is reached again at most so many rows later (a day's count typed
    in instead of the sum) is no correction: it counts as missing.
    gaps: missing between two known counts: "spread" what came meanwhile evenly over time (in whole numbers where the
    column is whole), "carry" the count before (the next one gets it all; a new count is 0), or "keep" it missing.
    longest: gaps longer than that stay missing. What is missing before the first count or after the last stays.
    indicator: also make a column ``COLUMN_corrected``, 1 where the cell is not as it was.

    A correction changes rows before it, which did not show it at their own time: to judge a forecast as of a day,
    prepare the rows up to that day only.
    """

    columns: Names = Field(min_length=1)
    kind: Literal["cumulative", "new"] = "cumulative"
    slip: int = Field(default=2, ge=0, le=1000)
    gaps: Literal["spread", "carry", "keep"] = "spread"
    longest: Duration | Literal[""] = ""
    indicator: bool = False

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.longest and self.gaps == "keep":
            raise ValueError("longest goes with spread and carry")
        return self

    def made(self, schema: TableSchema) -> TableSchema:
        mended, flags = {}, {}
        for name in self.columns:
            column = self._mended(numeric_of(schema, name))
            mended[name] = column
            if self.indicator:
                flag = coded(2, column).model_copy(update={"missing": "forbid"})
                flags[free_name(schema, f"{name}_corrected")] = flag
        return schema.with_columns({**mended, **flags})

    def _mended(self, column: Column) -> Column:
        low, high = column.bounds()
        if self.kind == "new":
            low, high = 0.0, max(high, 0.0)
        if column.values is not None or self.kind == "new":  # a spread count need not be one of the codes
            column = between(low, high, column, dtype="integer" if column.dtype == "integer" else "real",
                             unit=column.unit)  # fmt: skip
        whole = self.gaps != "keep" and not self.longest
        return column if whole else column.model_copy(update={"missing": "allow"})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        after = self.after(frame.schema)
        frame = frame.keep()
        rows, start, times = in_order(frame, self.on, self.by)
        ends = [*np.flatnonzero(start == np.arange(len(start))).tolist(), len(start)]
        changed: dict[str, Any] = {}
        for name in self.columns:
            cells, done = np.empty(frame.rows()), 0
            for batch in frame.engine.batches(frame.table.select(name)):
                part = slice(done, done := done + len(batch))
                cells[part] = to_array(batch.column(0), frame.schema.columns[name])
            mended = cells.copy()
            ordered = cells[rows]
            for first, end in itertools.pairwise(ends):
                part = slice(first, end)
                ordered[part] = self._stream(ordered[part], times[part], frame.schema.columns[name].dtype == "integer")
            mended[rows] = ordered
            mended = np.clip(mended, *after.columns[name].bounds())
            changed[name] = pa.array(mended, from_pandas=True)
            if self.indicator:
                changed[f"{name}_corrected"] = pa.array((mended != cells) & ~(np.isnan(mended) & np.isnan(cells)))
        beside = pa.table({f"__{name}": values.cast(pa.float64()) for name, values in changed.items()})
        table = frame.engine.beside(frame.table, beside)
        return dataclasses.replace(frame, table=table).replace({name: table[f"__{name}"] for name in changed}, after)

    def _stream(self, values: Floats, times: NDArray[np.int64], whole: bool) -> Floats:
        """One stream's counts, mended. values: NaN is missing; times: microseconds, in order."""
        known = ~np.isnan(values)
        if not known.any():
            return values
        if self.kind == "new":
            total = np.where(known, np.nancumsum(values), np.nan)
        else:
            total = np.where(self._slips(values), np.nan, values)
        here = np.flatnonzero(~np.isnan(total))
        held = np.minimum.accumulate(total[here][::-1])[::-1]  # no count is above a later one
        if self.kind == "new":
            held = np.maximum(held, 0)
        filled = np.full(len(values), np.nan)
        filled[here] = held
        if self.gaps != "keep":
            self._fill(filled, here, times, whole)
        if self.kind == "cumulative":
            return filled
        there = ~np.isnan(filled)
        filled[there] = np.diff(filled[there], prepend=0)
        return filled

    def _slips(self, values: Floats) -> NDArray[np.bool_]:
        """Runs of at most ``slip`` counts that are below one before them, which the count after them reaches again."""
        known = np.flatnonzero(~np.isnan(values))
        below = values[known] < np.maximum.accumulate(values[known])
        edges = np.flatnonzero(np.diff(below, prepend=False, append=False))
        slips = np.zeros(len(values), bool)
        for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            slips[known[first:end]] = end - first <= self.slip and end < len(known)
        return slips

    def _fill(self, total: Floats, here: NDArray[np.int64], times: NDArray[np.int64], whole: bool) -> None:
        """Fill gaps between the known totals at *here*, in place."""
        for before, behind in itertools.pairwise(here.tolist()):
            span = times[behind] - times[before]
            if behind == before + 1 or (self.longest and span - (times[behind] - times[behind - 1]) > self._longest_us):
                continue
            gap = slice(before + 1, behind)
            share = (times[gap] - times[before]) / max(span, 1) if self.gaps == "spread" else 0.0
            risen = (total[behind] - total[before]) * share
            total[gap] = total[before] + (np.floor(risen) if whole else risen)

    @property
    def _longest_us(self) -> int:
        return microseconds(self.longest)
