"""A site's table while it is prepared: an expression in the site's engine, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from atoll.contract.errors import PlanError
from atoll.contract.schema import TableSchema
from atoll.data.columns import collect, is_large
from atoll.data.engine import Engine
from atoll.data.table import Table

ROW = "__row"
"""The column that says in which order rows are delivered (int64)."""
ID = "__id"
"""The column that says who a row is (uint64): a hash of its entity, or of all its cells as the source had them."""
HELD = "__held"
"""The column that marks rows kept for evaluation; there once the hold-out is drawn."""


@dataclass(frozen=True)
class Frame:
    """*table* holds the columns of *schema* that are not ignored, and ROW (perhaps ID and HELD). In the engine,
    numbers are float64, text is string, dates are date, datetimes are timestamp (UTC), images are
    binary, and missing is NULL. dropped: rows left out so far, by reason. achieved: "k" and "l" of its
    anonymity. ordered: does the engine deliver rows by ROW without sorting? A step that groups, joins or
    sorts says no. units: those that the source declares for its columns.
    """

    engine: Engine
    table: ir.Table
    schema: TableSchema
    dropped: Mapping[str, int] = field(default_factory=dict)
    achieved: Mapping[str, int] = field(default_factory=dict)
    ordered: bool = True
    units: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """One column of the engine's table; raises PlanError if there is none of that name."""
        if name not in self.table.columns:
            raise PlanError(
                "recipe.no-column", f"the recipe names a column {name!r} that is not there", field=name,
                remedy="look at the table's column names; the recipe's step rename can map others",
            )  # fmt: skip
        return self.table[name]

    def replace(self, columns: Mapping[str, Any], schema: TableSchema | None = None, *, ordered: bool = True) -> Frame:
        """With *columns* computed anew (or added), and those that *schema* no longer has left out.

        schema: what the table is afterwards (default: as before).
        """
        table = self.table.mutate(**columns) if columns else self.table
        known = {name for name, column in (schema or self.schema).columns.items() if column.role != "ignore"}
        if schema is not None:
            table = table.select(*[name for name in table.columns if name in known or name in (ROW, ID, HELD)])
        return replace(self, table=table, schema=schema or self.schema, ordered=self.ordered and ordered)

    def where(self, kept: Any, reason: str, *, ordered: bool = True) -> Frame:
        """Only the rows where *kept* is true; the others are counted under *reason*."""
        kept = kept.fill_null(False)
        count = self.engine.row(self.table.aggregate(n=(~kept).sum()))["n"] or 0
        dropped = {**self.dropped, reason: self.dropped.get(reason, 0) + int(count)}
        return replace(self, table=self.table.filter(kept), dropped=dropped, ordered=self.ordered and ordered)

    def keep(self) -> Frame:
        """Computed once, sorted, and with rows numbered (anew) from 0."""
        table = self.table if self.ordered else self.table.order_by(ROW)
        table = self.engine.keep(table.drop(ROW) if ROW in table.columns else table, number=ROW)
        return replace(self, table=table, ordered=True)

    def rows(self) -> int:
        """How many."""
        return int(self.engine.row(self.table.aggregate(n=self.table.count()))["n"])

    def to_table(self) -> Table:
        """As arrays: in memory when they are small, else in files of the engine's folder."""
        rows = self.rows()
        if not self.ordered and is_large(rows, len(self.table.columns)):
            return self.keep().to_table()  # columns are fetched one by one, and would be sorted one by one
        table = self.table if self.ordered else self.table.order_by(ROW)
        names = [name for name, column in self.schema.columns.items() if column.role != "ignore"]
        marks = [name for name in (ID, HELD) if name in table.columns]
        columns = collect(self.engine, table.select(*names, *marks), rows, self.schema)
        held = np.asarray(columns[HELD], bool) if HELD in marks else None
        ids = np.asarray(columns[ID]).view(np.uint64) if ID in marks else None
        if isinstance(columns, dict):
            columns = {name: columns[name] for name in names}
        return Table(self.schema, columns, held, dict(self.dropped), ids, dict(self.achieved))

    @staticmethod
    def of(table: Table, engine: Engine) -> Frame:
        """A table in memory, copied into the engine."""
        data: dict[str, Any] = {name: _arrow(column) for name, column in table.columns.items()}
        data[ROW] = pa.array(np.arange(len(table)))
        data[ID] = pa.array(table.ids.view(np.int64))
        if table.held_out is not None:
            data[HELD] = pa.array(table.held_out)
        return Frame(engine, engine.load(pa.table(data)), table.schema, dict(table.dropped), dict(table.achieved))


def _arrow(column: Any) -> pa.Array:
    if column.ndim > 1:  # images: one buffer a row
        return pa.array([row.tobytes() for row in column], pa.binary())
    if column.dtype.kind == "M":
        unit = pa.date32() if column.dtype == "datetime64[D]" else pa.timestamp("us")
        return pa.array(column.astype("datetime64[D]" if pa.types.is_date(unit) else "datetime64[us]"), unit)
    if column.dtype == object:
        return pa.array(column, pa.string())
    return pa.array(column, from_pandas=True)  # NaN is missing


def null(dtype: str) -> Any:
    """A missing cell of an engine's type."""
    return ibis.null(dtype)
