"""One number by another, or the logarithm of that: how large a cell is beside what is usual."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, free_name, numeric_of, step
from atoll.data.steps.declare import between


@step("ratio")
class Ratio(Step):
    """New columns, ``columns: {INTO: [ABOVE, BELOW]}``: (above + plus) / (below + plus), missing where either is.

    plus: added to both, so that a small count does not make a large ratio; both ranges plus it must be above 0.
    log: the natural logarithm of the ratio. A new column has the role of the one above.
    """

    adds: ClassVar[bool] = True
    columns: dict[str, tuple[str, str]] = Field(min_length=1)
    plus: float = Field(default=0.0, ge=0)
    log: bool = False

    def after(self, schema: TableSchema) -> TableSchema:
        return schema.with_columns({free_name(schema, name): self._made(schema, name) for name in self.columns})

    def _made(self, schema: TableSchema, name: str) -> Column:
        above, below = (numeric_of(schema, one) for one in self.columns[name])
        (low, high), (least, most) = above.bounds(), below.bounds()
        if low + self.plus <= 0 or least + self.plus <= 0:
            raise PlanError(
                "recipe.ratio-range", "a ratio is of numbers above 0, and a range begins below that", field=name,
                remedy="set plus of the step above 0, or mend the range in the schema",
            )  # fmt: skip
        least, most = (low + self.plus) / (most + self.plus), (high + self.plus) / (least + self.plus)
        made = between(math.log(least), math.log(most), above) if self.log else between(least, most, above)
        missing = "allow" if "allow" in (above.missing, below.missing) else above.missing
        return made.model_copy(update={"missing": missing})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        after, made = self.after(frame.schema), {}
        for name, (above, below) in self.columns.items():
            ratio = (frame[above].cast("float64") + self.plus) / (frame[below].cast("float64") + self.plus)
            cell = ratio.ln() if self.log else ratio
            made[name] = cell.clip(*after.columns[name].bounds())  # rounding may not leave the range
        return frame.replace(made, after)
