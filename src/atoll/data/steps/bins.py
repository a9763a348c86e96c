"""Numbers as the codes of bins."""

from __future__ import annotations

import itertools
from typing import Any, Literal, Self

import ibis
from pydantic import Field, model_validator

from atoll.contract.schema import TableSchema
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Found, Need, Step, free_name, numeric_of, step
from atoll.data.steps.declare import coded, quantiles


@step("bins")
class Bins(Step):
    """Replace ``column`` by ``into``: the code 0, 1 … of the bin that its value is in.

    edges: inner edges, increasing; a value at an edge belongs to the bin above it. quantiles: instead, so many
    bins with equal shares of all sites' training rows (edges within 1e-6 of the schema's range); equal
    edges are one, so that some codes may not occur. missing: "keep", or a bin of its "own", the last code.
    """

    column: str
    into: str = ""
    edges: tuple[float, ...] = ()
    quantiles: int = Field(default=0, ge=0, le=1000)
    missing: Literal["keep", "own"] = "keep"

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if bool(self.edges) == bool(self.quantiles) or self.quantiles == 1:
            raise ValueError("write either edges, or quantiles (2 or more)")
        if any(a >= b for a, b in itertools.pairwise(self.edges)):
            raise ValueError("edges must increase")
        return self

    def needs(self) -> tuple[Need, ...]:
        if self.edges:
            return ()
        shares = tuple(i / self.quantiles for i in range(1, self.quantiles))
        return (Need("statistics.quantiles", (self.column,), (("probabilities", shares),)),)

    def fit(self, found: Found) -> Fitted:
        if self.edges:
            return {}
        result = found[self.needs()[0]]
        values = quantiles(result, (self.column,))[self.column]
        # the lower ends of their brackets: the quantile's own value, and all that tie with it, are above its edge
        errors = result["quantiles"]["columns"][self.column]["errors"]
        return {"edges": sorted({value - error for value, error in zip(values, errors, strict=True)})}

    def after(self, schema: TableSchema) -> TableSchema:
        source, into = numeric_of(schema, self.column), self.into or self.column
        free_name(schema, into, self.column)
        size = len(self.edges) + 1 if self.edges else self.quantiles
        made = coded(size + (self.missing == "own"), source)
        if self.missing == "own":
            made = made.model_copy(update={"missing": "forbid"})
        columns = {name: column for name, column in schema.columns.items() if name != self.column}
        return schema.model_copy(update={"columns": {**columns, into: made}})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        edges: Any = self.edges or [float(edge) for edge in fitted["edges"]]
        cell = frame[self.column]
        code: Any = ibis.literal(0.0)
        for edge in edges:
            code = code + (cell >= edge).cast("float64")
        last = float(len(self.edges) + 1 if self.edges else self.quantiles)
        gone = ibis.literal(last) if self.missing == "own" else null("float64")
        return frame.replace({self.into or self.column: cell.isnull().ifelse(gone, code)}, self.after(frame.schema))
