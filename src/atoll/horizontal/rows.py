"""Rows that everybody may see, on which models tell what they have learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, Field, model_validator

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.contract.wire import Json
from atoll.models.rows import Cells, Rows


class PublicParams(BaseModel):
    """public: rows that everybody may see, as columns with a list of values each. generated: instead, so many rows
    within the schema's ranges, numbers uniform and images noise. generated_seed: of these, with the plan's schema."""

    public: dict[str, list[Json]] | None = None
    generated: int | None = Field(default=None, ge=1, le=1_000_000)
    generated_seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_source(self) -> PublicParams:
        if (self.public is None) == (self.generated is None):
            raise ValueError("give either public or generated rows")
        if self.public is not None and (len({len(v) for v in self.public.values()}) != 1 or not self.num_rows):
            raise ValueError("public columns need one row at least, and equally many each")
        return self

    @property
    def num_rows(self) -> int:
        """How many rows everybody sees."""
        return self.generated or max((len(values) for values in (self.public or {}).values()), default=0)

    def rows(self, schema: TableSchema) -> Rows:
        """The rows: a function of the plan alone, so that no message has to carry them. Raises PlanError."""
        found: dict[str, Cells] = {}
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(self.generated_seed)))
        for name, column in schema.columns.items():
            if self.public is None:
                made = _drawn(column, self.num_rows, random)
            else:
                made = _given(name, column, self.public[name]) if name in self.public else _unlabelled(column, self)
            if made is not None:
                found[name] = made

        def look(name: str) -> Cells:
            if name not in found:
                raise PlanError(
                    "distil.no-column", "the rows that everybody sees lack a column of the model", field=name,
                    remedy="give its values in params.public: free text and times cannot be generated",
                )  # fmt: skip
            return found[name]

        return Rows(schema, self.num_rows, look)


def _drawn(column: Column, n: int, random: np.random.Generator) -> Cells | None:
    if column.shape is not None:
        return random.integers(0, 256, (n, *column.shape), np.uint8)
    if column.values is not None:
        codes: Cells = np.array(column.values, np.float64 if column.numeric else object)
        return codes[random.integers(len(codes), size=n)]
    if not (column.numeric and column.range):
        return None
    low, high = column.range
    if column.dtype == "integer":
        return random.integers(int(low), int(high) + 1, n).astype(np.float64)
    return random.uniform(low, high, n)


def _given(name: str, column: Column, values: list[Json]) -> Cells:
    kind: Any = {"image": np.uint8, "text": object, "date": "datetime64[D]", "datetime": "datetime64[us]"}
    try:
        made: Cells = np.array(values, kind.get(column.dtype, np.float64))
    except (ValueError, TypeError, OverflowError):
        made = np.empty(0)
    if made.shape != (len(values), *(column.shape or ())):
        raise PlanError("plan.bad-public", "a public column's values are not what the schema says", field=name)
    return made


def _unlabelled(column: Column, params: PublicParams) -> Cells | None:
    """Any label, where none is given: nobody looks at it."""
    if column.role != "label" or not (column.values or column.range):
        return None
    first = column.values[0] if column.values else column.bounds()[0]
    return np.full(params.num_rows, first, np.float64 if column.numeric else object)
