"""What steps over time share: durations, time zones, and the order of each stream."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Any

import ibis
import ibis.expr.datatypes as dt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.data.frame import HELD, ROW, Frame
from atoll.data.step import Step, column_of
from atoll.data.steps.cells import Names

Places = NDArray[np.int64]
_SECONDS = {"d": 86_400, "h": 3600, "min": 60, "s": 1}


def _known_zone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("not an IANA time zone such as Asia/Shanghai") from None
    return name


Zone = Annotated[str, AfterValidator(_known_zone)]
Duration = Annotated[str, Field(pattern=r"^[1-9][0-9]*(d|h|min|s)$")]
"""As in the schema's grain: 1d, 1h, 15min, 30s."""


def microseconds(duration: str) -> int:
    """How long a duration is; "" is 0."""
    number = duration.rstrip("dhmins")
    return int(number or 0) * _SECONDS.get(duration[len(number) :], 0) * 1_000_000


# DuckDB's own functions that Ibis has no name for
_epoch_us: Any = ibis.udf.scalar.builtin(lambda time: time, name="epoch_us", signature=((dt.timestamp,), dt.int64))
_at: Any = ibis.udf.scalar.builtin(lambda time: time, name="make_timestamp", signature=((dt.int64,), dt.timestamp))
_INSTANT = dt.Timestamp("UTC")
_instant: Any = ibis.udf.scalar.builtin(
    lambda zone, local: (zone, local), name="timezone", signature=((dt.string, dt.timestamp), _INSTANT)
)
_local: Any = ibis.udf.scalar.builtin(
    lambda zone, instant: (zone, instant), name="timezone", signature=((dt.string, _INSTANT), dt.timestamp)
)


def latest(cell: Any, order: Any) -> Any:
    """The aggregate: of present cells, the one that is last in *order* (int64)."""
    function: Any = ibis.udf.agg.builtin(
        lambda cell, order: (cell, order), name="arg_max", signature=((cell.type(), dt.int64), cell.type())
    )
    return function(cell, order)


def to_utc(local: Any, zone: str) -> Any:
    """A zone's local time as UTC."""
    return _local("UTC", _instant(zone, local))


def in_zone(utc: Any, zone: str) -> Any:
    """UTC as a zone's local time."""
    return _local(zone, _instant("UTC", utc))


def clock(cell: Any) -> Any:
    """Microseconds since 1970 of a date or a time."""
    return _epoch_us(cell.cast("timestamp(6)"))


def at_clock(number: Any, dtype: str) -> Any:
    """The date or the time at so many microseconds since 1970."""
    time = _at(number)
    return time.date() if dtype == "date" else time


def check_streams(schema: TableSchema, on: str, by: tuple[str, ...]) -> None:
    """*on* must be a date or a time, and *by* columns; raises PlanError."""
    column_of(schema, on, "date", "datetime")
    for name in by:
        column_of(schema, name)


class OverStreams(Step):
    """A step over time: each stream of rows (equal ``by``) in the order of ``on``, a date or a time."""

    on: str
    by: Names = ()

    @property
    def by_row(self) -> bool:
        return False

    def after(self, schema: TableSchema) -> TableSchema:
        check_streams(schema, self.on, self.by)
        return self.made(schema)

    def made(self, schema: TableSchema) -> TableSchema:
        """:meth:`after` of a table that has such streams."""
        raise NotImplementedError


def stream_keys(frame: Frame, on: str, by: tuple[str, ...]) -> list[Any]:
    """What rows of one stream have in common; those without a time are streams of their own."""
    return [*(frame[name] for name in by), frame[on].isnull()]


def rows_before(frame: Frame, on: str, by: tuple[str, ...], first: int | None, last: int | None) -> Any:
    """The window from *first* to *last* rows before a row of its stream (None: all of them; < 0: after it)."""
    order = [frame[on], frame[ROW]]
    groups = stream_keys(frame, on, by)
    if first is None:
        return ibis.window(group_by=groups, order_by=order, preceding=(None, last))
    if last is not None and last < 0:
        return ibis.window(group_by=groups, order_by=order, preceding=first, following=-last)
    return ibis.window(group_by=groups, order_by=order, preceding=(first, last))


def time_before(frame: Frame, on: str, by: tuple[str, ...], first: int, last: int) -> Any:
    """The window from *first* to *last* microseconds before a row of its stream, both included."""
    return ibis.range_window(group_by=stream_keys(frame, on, by), order_by=clock(frame[on]), preceding=(first, last))


def in_order(frame: Frame, on: str, by: tuple[str, ...]) -> tuple[Places, Places, Places]:
    """The rows that have a time, stream by stream and each in order: (their place in the table, the first row
    of their stream, microseconds since the earliest), each [num_rows with a time]. *frame* must be kept."""
    size = frame.engine.row(frame.table.aggregate(n=frame[on].count()))["n"]
    kind = np.int32 if frame.rows() < 2**31 else np.int64
    rows, start, times = np.empty(size, kind), np.empty(size, kind), np.empty(size, np.int64)
    keys = {f"key{i}": frame[name] for i, name in enumerate(by)}
    asked = frame.table.filter(frame[on].notnull()).select(row=frame[ROW], time=clock(frame[on]), **keys)
    done, stream, last = 0, 0, None
    for batch in frame.engine.batches(asked.order_by(*keys, "time", "row")):
        part = slice(done, done := done + batch.num_rows)
        rows[part], times[part] = batch.column("row"), batch.column("time")
        whole = pa.Table.from_batches([batch] if last is None else [last, batch]).combine_chunks()
        new = np.zeros(batch.num_rows, bool)
        for name in keys:
            new[len(new) + 1 - len(whole) :] |= _changes(whole.column(name).chunk(0))
        begins = np.where(new, np.arange(part.start, done), stream)
        start[part] = np.maximum.accumulate(begins)
        stream, last = int(start[done - 1]), batch.slice(batch.num_rows - 1)
    times -= times.min(initial=np.iinfo(np.int64).max)
    return rows, start, times


def _changes(cells: pa.Array) -> NDArray[np.bool_]:
    """Where a cell is not that before it, from the second on; missing equals missing."""
    missing = np.asarray(cells.is_null().to_numpy(zero_copy_only=False))
    differs = pc.not_equal(cells[1:], cells[:-1]).fill_null(False).to_numpy(zero_copy_only=False)
    return np.asarray(differs | (missing[1:] != missing[:-1]))


def not_held(frame: Frame) -> None:
    """Rows cannot be merged once some are held out; raises PlanError."""
    if HELD in frame.table.columns:
        raise PlanError(
            "recipe.too-late", "the step merges rows, and rows to hold out are already drawn", field="steps",
            remedy="put it before every step that waits for statistics",
        )  # fmt: skip
