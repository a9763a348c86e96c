"""The latest day in a site's table, looked up without preparing it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from atoll.contract.errors import SchemaError
from atoll.contract.plan import Plan
from atoll.data.engine import Engine
from atoll.data.recipe import Prepared
from atoll.data.sources import SourceSpec, open_source


def last_day(spec: SourceSpec, plan: Plan, base: Path) -> dt.date | None:
    """Of the schema's column of role "time", after cleaning; None where no cell is a date.

    The contract is not checked. Raises the SchemaError of a source that cannot be read, or has no rows.
    """
    times = [name for name, column in plan.table.columns.items() if column.role == "time"]
    prepared = Prepared(plan.recipe)
    frame = prepared.cleaned(open_source(spec, plan.table, base, Engine(), prepared.reads()))
    if not times or times[0] not in frame.table.columns:
        return None
    cell = frame[times[0]]
    cell = cell if cell.type().is_temporal() else cell.try_cast("timestamp(6)")
    told = frame.engine.row(frame.table.aggregate(last=cell.cast("date").max(), rows=frame.table.count()))
    if not told["rows"]:
        raise SchemaError("source.empty", "the table has no rows", field="source", remedy="check the site's source")
    found: dt.date | None = told["last"]
    return found
