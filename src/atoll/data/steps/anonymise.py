"""k-anonymity and l-diversity of quasi-identifiers, by Mondrian (LeFevre, DeWitt & Ramakrishnan 2006, strict).

Rows are parted again and again at the median of the quasi-identifier that varies most in them (as a share of the
schema's bounds, or of its code list), as long as both parts keep k rows, and l values of the sensitive
column. Then a part's rows are given the same values. Where rows miss a quasi-identifier, those that miss the same
ones are parted among themselves.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atoll.contract.schema import Column, TableSchema
from atoll.data.disclosure import achieved_k, achieved_l, classes
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, numeric_of, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import blurred
from atoll.data.steps.one_hot import values_of

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
REASON = "cannot be hidden among enough others"


@step("anonymise")
class Anonymise(Step):
    """Generalise ``columns`` until every row is equal in all of them to at least k − 1 others of its site, and
    each such class has at least l different values of ``sensitive``.

    numbers: a class gets its "mean", or the "midpoint" of its extremes. codes: a class of several codes gets none
    of them ("suppress": missing), or all, joined by "|" ("set": the column is free text then). Rows that
    cannot be hidden are left out, and counted.
    """

    columns: Names = Field(min_length=1)
    k: int = Field(ge=2)
    l: int = Field(default=1, ge=1)  # noqa: E741
    sensitive: str = ""
    numbers: Literal["mean", "midpoint"] = "mean"
    codes: Literal["suppress", "set"] = "suppress"

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if (self.l > 1) != bool(self.sensitive):
            raise ValueError("l (2 or more) and sensitive go together")
        if self.sensitive in self.columns:
            raise ValueError("the sensitive column is not generalised")
        return self

    def drops(self) -> tuple[str, ...]:
        return (REASON,)

    def chooses(self) -> tuple[str, ...]:
        return (*self.columns, self.sensitive) if self.sensitive else self.columns

    @property
    def by_row(self) -> bool:
        return False

    def after(self, schema: TableSchema) -> TableSchema:
        if self.sensitive:
            values_of(schema, self.sensitive)
        return schema.with_columns({name: self._generalised(schema, name) for name in self.columns})

    def _generalised(self, schema: TableSchema, name: str) -> Column:
        column = schema.columns.get(name)
        if column is None or column.values is None:
            return blurred(numeric_of(schema, name))
        column, _ = values_of(schema, name)
        if self.codes == "suppress":
            return column.model_copy(update={"missing": "allow"})
        return Column(dtype="text", role=column.role, missing=column.missing)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        frame = frame.keep()
        places, widths = {}, []
        for name in self.columns:
            places[name], width = self._places(frame, name)
            widths.append(width)
        matrix = np.column_stack(list(places.values()))
        secret = self._places(frame, self.sensitive)[0] if self.sensitive else None
        kept = np.zeros(frame.rows(), bool)
        made: dict[str, Any] = {name: np.full(len(kept), None, object) for name in self.columns}
        for part in self._parts(matrix, np.array(widths), secret):
            kept[part] = True
            for i, name in enumerate(self.columns):
                made[name][part] = self._value(frame.schema.columns[name], matrix[part, i])
        after = self.after(frame.schema)
        kinds = {n: pa.float64() if after.columns[n].numeric else pa.string() for n in self.columns}
        data = {f"__{name}": pa.array(made[name], kinds[name]) for name in self.columns}
        table = frame.engine.beside(frame.table, pa.table({**data, "__kept": pa.array(kept)}))
        achieved = {"k": achieved_k({name: column[kept] for name, column in made.items()})}
        if secret is not None:
            achieved["l"] = achieved_l({name: column[kept] for name, column in made.items()}, secret[kept])
        frame = dataclasses.replace(frame, table=table, achieved=achieved).where(table["__kept"], REASON)
        return frame.replace({name: frame[f"__{name}"] for name in self.columns}, after)

    def _places(self, frame: Frame, name: str) -> tuple[Floats, float]:
        """(a column as numbers, NaN where missing, [num_rows]; how wide it can be). A code is its place in the list."""
        column = frame.schema.columns[name]
        only = frame.schema.model_copy(update={"columns": {name: column}})
        table = frame.replace({}, only).to_table()
        if column.values is None:
            low, high = column.bounds()
            return np.array(table[name]), high - low
        codes = table.codes(name).astype(np.float64)
        codes[codes < 0] = np.nan
        return codes, max(len(column.values) - 1.0, 1.0)

    def _value(self, column: Column, places: Floats) -> Any:
        """What a class gets; *places*: its rows' own, all or none missing."""
        if np.isnan(places[0]):
            return None
        low, high = float(places.min()), float(places.max())
        if column.values is None:
            if low == high:
                return low
            return min(max(float(places.mean()), low), high) if self.numbers == "mean" else low + (high - low) / 2
        codes = [column.values[int(place)] for place in np.unique(places)]
        if self.codes == "set":
            return "|".join(str(code) for code in codes)
        return None if len(codes) > 1 else float(codes[0]) if column.numeric else codes[0]

    def _parts(self, matrix: Floats, widths: Floats, secret: Floats | None) -> list[Rows]:
        """The rows of each class; rows that are in none cannot be hidden."""
        missing = np.isnan(matrix)
        pattern = classes({str(i): missing[:, i] for i in range(missing.shape[1])})
        waiting = [np.flatnonzero(pattern == one) for one in range(pattern.max(initial=-1) + 1)]
        waiting = [rows for rows in waiting if self._hides(rows, secret)]
        done: list[Rows] = []
        while waiting:
            rows = waiting.pop()
            halves = self._halves(rows, matrix, widths, secret)
            if halves:
                waiting += halves
            else:
                done.append(rows)
        return done

    def _halves(self, rows: Rows, matrix: Floats, widths: Floats, secret: Floats | None) -> list[Rows]:
        if len(rows) < 2 * self.k:
            return []
        spread = np.nan_to_num(np.ptp(matrix[rows], axis=0)) / widths
        for i in np.argsort(-spread, kind="stable"):
            if spread[i] <= 0:
                break
            places = matrix[rows, i]
            middle = np.partition(places, (len(places) - 1) // 2)[(len(places) - 1) // 2]
            most = middle == places.max()  # more than half have the largest value: they are the upper part
            lower = places < middle if most else places <= middle
            halves = [rows[lower], rows[~lower]]
            if all(self._hides(half, secret) for half in halves):
                return halves
        return []

    def _hides(self, rows: Rows, secret: Floats | None) -> bool:
        if len(rows) < self.k:
            return False
        if secret is None:
            return True
        values = secret[rows]
        return len(np.unique(values[~np.isnan(values)])) >= self.l
