"""Numbers in the contract's unit, whatever unit a site's table has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import ibis
from pydantic import Field

from atoll.contract.errors import PlanError, SchemaError
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import as_text, is_code

Factor = Annotated[float, Field(gt=0)]


@step("units", "clean")
class Units(Step):
    """Convert ``column`` to the contract's unit ``to`` where a site's source declares another one.

    from: unit → factor, or [factor, offset]: new = factor · old + offset. A site whose source declares
    no unit for the column (``units:``) has the contract's.
    """

    column: str
    to: str
    origin: Mapping[str, Factor | tuple[Factor, float]] = Field(alias="from", min_length=1)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        declared = frame.schema.columns.get(self.column)
        if declared is not None and declared.unit not in ("", self.to):
            raise PlanError(
                "recipe.wrong-unit", f"the schema has another unit for {self.column!r} than the recipe converts to",
                field=self.column, remedy="write one unit in both",
            )  # fmt: skip
        here = frame.units.get(self.column, self.to)
        cell = frame[self.column]
        if here == self.to:
            return frame
        if here not in self.origin:
            raise SchemaError(
                "schema.unit", f"the recipe cannot convert the unit that the source declares for {self.column!r}",
                field=self.column, remedy="correct the source's units, or add the unit and its factor to the recipe",
            )  # fmt: skip
        given = self.origin[here]
        factor, offset = given if isinstance(given, tuple) else (given, 0.0)
        number = cell.try_cast("float64")
        converted = (number * factor + offset).cast("string")
        text = as_text(cell)
        readable = number.notnull() & ~is_code(cell, declared)
        return frame.replace({self.column: ibis.ifelse(readable, converted, text)})
