"""A site's data for one plan: read, cleaned, checked against the contract, and prepared as far as it is fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.contract.plan import Plan
from atoll.contract.wire import canonical_json
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.frame import HELD, ROW, Frame
from atoll.data.recipe import Prepared
from atoll.data.sources import SourceSpec, known_columns, open_source
from atoll.data.table import Table, hold_out, hold_out_each, hold_out_latest


class SiteData:
    """Training and held-out rows at every stage of a plan's preparation.

    What does not wait for statistics is prepared once, and rows to hold out are drawn there:
    strata are the classes of the program's target, where that is a code list.
    """

    def __init__(
        self, base: Frame | Table, plan: Plan, prepared: Prepared, site: str, source: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        """The columns that were there before cleaning, and what the source calls each; None where none was opened."""
        self._base, self._prepared, self._noised = base, prepared, plan.privacy is not None
        self._views: dict[bytes, tuple[Table, Table]] = {}
        self._withheld: Mapping[str, str] = {}
        self._first = prepared.first_fitted
        self._table: Table | None = None
        if isinstance(base, Frame) and HELD not in base.table.columns and plan.run.holdout > 0:
            held = _held(base.to_table() if plan.privacy else base, plan, site)
            table = base.engine.beside(base.table, pa.table({HELD: held}))
            self._base = replace(base, table=table)
            base.engine.forget_all_but(table)
        elif isinstance(base, Table) and base.held_out is None:
            self._base = replace(base, held_out=_held(base, plan, site))

    @staticmethod
    def read(spec: SourceSpec, plan: Plan, base: Path, site: str, scratch: Path | None = None) -> SiteData:
        """From the site's own source. Raises SchemaError listing every way in which the table breaks the
        contract; messages name columns and count cells, and never show a cell."""
        prepared = Prepared(plan.recipe)
        opened = open_source(spec, plan.table, base, Engine(scratch), prepared.reads())
        source = {name: spec.columns.get(name, name) for name in opened.table.columns if name != ROW}
        frame = prepared.cleaned(opened)
        frame = prepared.prepare(checked(known_columns(frame, spec)), {}).keep()
        frame.engine.forget_all_but(frame.table)
        return SiteData(frame, plan, prepared, site, source)

    @staticmethod
    def of(table: Table, plan: Plan, site: str) -> SiteData:
        """From a checked table in memory."""
        prepared = Prepared(plan.recipe)
        first: Frame | Table = table
        if prepared.first_fitted:
            first = prepared.prepare(Frame.of(table, Engine()), {}).keep()
        return SiteData(first, plan, prepared, site)

    def base(self) -> Table:
        """What every view starts from, with the rows marked that are held out."""
        if self._table is None:
            self._table = self._base if isinstance(self._base, Table) else self._base.to_table()
        return self._table

    def __len__(self) -> int:
        return len(self.base())

    def withhold(self, columns: Mapping[str, str]) -> None:
        """From now on :meth:`parts` are without these *columns*; see :meth:`atoll.data.table.Table.without`."""
        self._withheld, self._views = columns, {}

    def parts(self, view: Mapping[str, Any]) -> tuple[Table, Table]:
        """(training rows, held-out rows) after the recipe as far as *view* fits it; the last two views are kept."""
        key = canonical_json(dict(view)) if view else b""
        if key not in self._views:
            table = self.base()
            if view and self._first < len(self._prepared.steps):
                frame = self._base if isinstance(self._base, Frame) else Frame.of(table, Engine())
                self._base = frame
                table = self._prepared.prepare(frame, view, self._first).to_table()
                table = table.within() if self._noised else table  # what was fitted comes from the coordinator
            if len(self._views) > 1:  # the last two are enough: a study goes on from one to the next
                del self._views[next(iter(self._views))]
            training, held = table.parts()
            self._views[key] = (training.without(self._withheld), held.without(self._withheld))
        return self._views[key]


def _held(base: Frame | Table, plan: Plan, site: str) -> NDArray[np.bool_]:
    """Which rows to hold out. Under differential privacy each row by itself: one more must not move the others."""
    if plan.run.holdout_by is not None:
        return hold_out_latest(_column(base, plan.run.holdout_by), plan.run.holdout)
    if plan.privacy is not None and isinstance(base, Table):
        return hold_out_each(base.ids, plan.run.holdout, plan.run.seed, site)
    rows = len(base) if isinstance(base, Table) else base.rows()
    return hold_out(_labels(base, plan), rows, plan.run.holdout, plan.run.seed, site)


def _labels(base: Frame | Table, plan: Plan) -> Any:
    """The classes that rows are held out by, [num_rows], or None."""
    target = str(plan.params.get("target", ""))
    column = base.schema.columns.get(target)
    if column is None or column.values is None or column.role == "ignore":
        return None
    return _column(base, target)


def _column(base: Frame | Table, name: str) -> Any:
    """One column of what a site's data begin with, [num_rows]; raises SchemaError where it is not there yet."""
    column = base.schema.columns.get(name)
    if isinstance(base, Table) or column is None or column.role == "ignore":
        return (base if isinstance(base, Table) else Table(base.schema, {}))[name]
    only = base.schema.model_copy(update={"columns": {name: column}})
    return base.replace({}, only).to_table()[name]
