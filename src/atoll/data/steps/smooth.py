"""Noise filters."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, Self

import ibis
import ibis.expr.datatypes as dt
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atoll.contract.schema import Column, TableSchema
from atoll.data.columns import to_array
from atoll.data.frame import ROW, Frame
from atoll.data.step import Fitted, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import blurred
from atoll.data.steps.streams import OverStreams, clock, rows_before, stream_keys

Floats = NDArray[np.float64]
REAL = Column(range=(0, 1))
# DuckDB's own: the median of absolute deviations from the median
_mad: Any = ibis.udf.agg.builtin(lambda cell: cell, name="mad", signature=((dt.float64,), dt.float64))


@step("smooth")
class Smooth(OverStreams):
    """Filter noise out of ``columns``, in each stream (equal ``by``) in the order of ``on``. Missing stays missing.

    median: the median of ``window`` rows around each. hampel: that median where a value is further from it than
    sigmas · 1.4826 · the median absolute deviation in the window (Pearson et al. 2016). At a stream's ends
    windows are shorter. lowpass: a Butterworth filter of ``order``, run forwards and backwards (no phase
    shift), ``cutoff`` as a share of half the sampling rate; for evenly spaced rows; streams of too few
    values (about 6 · order) stay as they are. exponential: s = alpha · x + (1 − alpha) · previous s.
    The last two pass over missing cells, and what overshoots the schema's range is moved to its end.
    """

    columns: Names = Field(min_length=1)
    method: Literal["median", "hampel", "lowpass", "exponential"]
    window: int = Field(default=5, ge=3, le=10_001)
    sigmas: float = Field(default=3.0, ge=0)
    order: int = Field(default=4, ge=1, le=12)
    cutoff: float = Field(default=0.25, gt=0, lt=1)
    alpha: float = Field(default=0.3, gt=0, le=1)

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.window % 2 == 0:
            raise ValueError("window must be odd: as many rows before as after")
        return self

    def made(self, schema: TableSchema) -> TableSchema:
        return schema.with_columns({name: blurred(numeric_of(schema, name)) for name in self.columns})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        after = self.after(frame.schema)
        if self.method in ("lowpass", "exponential"):
            return self._recursive(frame).replace({}, after)
        window = rows_before(frame, self.on, self.by, self.window // 2, -(self.window // 2))
        changed = {}
        for name in self.columns:
            cell = frame[name]
            median = cell.median().over(window)
            if self.method == "hampel":
                spread = _mad(cell).over(window) * (1.4826 * self.sigmas)
                median = ((cell - median).abs() > spread).ifelse(median, cell)
            changed[name] = cell.isnull().ifelse(cell, median)
        return frame.replace(changed, after, ordered=False)

    def _recursive(self, frame: Frame) -> Frame:
        """What SQL cannot say: column by column as arrays, in the order of streams, and back beside the rows."""
        frame = frame.keep()
        keys = ibis.window(order_by=stream_keys(frame, self.on, self.by))
        size = frame.rows()
        for name in self.columns:
            asked = frame.table.select(
                stream=ibis.dense_rank().over(keys), time=clock(frame[self.on]), row=frame[ROW], value=frame[name]
            )
            streams, rows, cells = np.empty(size, np.int32), np.empty(size, np.int64), np.empty(size)
            done = 0
            for batch in frame.engine.batches(asked.order_by("stream", "time", "row").drop("time")):
                part = slice(done, done := done + batch.num_rows)
                streams[part], rows[part] = batch.column("stream"), batch.column("row")
                cells[part] = to_array(batch.column("value"), REAL)
            self._filter(cells, streams)
            np.clip(cells, *frame.schema.columns[name].bounds(), out=cells)
            values = np.empty(size)
            values[rows] = cells
            table = frame.engine.beside(frame.table, pa.table({f"__{name}": pa.array(values, from_pandas=True)}))
            frame = dataclasses.replace(frame, table=table).replace({name: table[f"__{name}"]})
        return frame

    def _filter(self, cells: Floats, streams: NDArray[np.int32]) -> None:
        """Filter each stream's present cells in place; rows of a stream are together and in order, [num_rows]."""
        ends = [*(np.flatnonzero(np.diff(streams)) + 1).tolist(), len(cells)]
        for start, end in itertools.pairwise([0, *ends]):
            stream = cells[start:end]
            present = ~np.isnan(stream)
            if present.any():
                stream[present] = self._filtered(stream[present])

    def _filtered(self, values: Floats) -> Floats:
        from scipy import signal  # half a second that no other command should wait for

        if self.method == "exponential":
            start = np.array([(1 - self.alpha) * values[0]])
            return np.asarray(signal.lfilter([self.alpha], [1, self.alpha - 1], values, zi=start)[0])
        sections = signal.butter(self.order, self.cutoff, output="sos")
        padding = 3 * (2 * len(sections) + 1 - min((sections[:, 2] == 0).sum(), (sections[:, 5] == 0).sum()))
        return np.asarray(signal.sosfiltfilt(sections, values)) if len(values) > padding else values
