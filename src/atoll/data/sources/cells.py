"""Values as the text that a CSV would hold: what sources without column types deliver."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

BATCH_ROWS = 16_384


def as_text(value: Any) -> str | None:
    """A number so that it reads back to the same bits (whole ones without ".0"), dates and times by ISO 8601,
    truth as 1 and 0, durations in seconds; None is missing."""
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, dt.datetime):
        if value.tzinfo is not None:
            value = value.astimezone(dt.UTC).replace(tzinfo=None)
        return str(value.isoformat(" "))
    if isinstance(value, dt.timedelta):
        return as_text(value.total_seconds())
    return str(value.isoformat() if isinstance(value, dt.date | dt.time) else value)


def reader(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> pa.RecordBatchReader:
    """Rows of values as Arrow batches of text."""
    schema = pa.schema([(name, pa.string()) for name in names])

    def batches() -> Iterator[pa.RecordBatch]:
        left = iter(rows)
        while block := list(islice(left, BATCH_ROWS)):
            columns = [pa.array([as_text(row[place]) for row in block], pa.string()) for place in range(len(names))]
            yield pa.record_batch(columns, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())
