"""Values that cannot be."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from atoll.contract.errors import PlanError
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import Names, is_code


@step("range_rule", "clean")
class RangeRule(Step):
    """What becomes of numbers in ``columns`` outside ``range`` (default: the schema's), before it is checked.

    outside: "missing" makes the cell missing, "drop" leaves out the row. Codes for missing are not outside.
    """

    columns: Names = Field(min_length=1)
    range: tuple[float, float] | None = None
    outside: Literal["missing", "drop"]

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError("range must be [lowest, highest]")
        return self

    def drops(self) -> tuple[str, ...]:
        return tuple(f"{name} outside its range" for name in self.columns) if self.outside == "drop" else ()

    def chooses(self) -> tuple[str, ...]:
        return self.columns if self.outside == "drop" else ()

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        for name in self.columns:
            declared = frame.schema.columns.get(name)
            limits = self.range or (declared.range if declared is not None else None)
            if limits is None:
                raise PlanError(
                    "recipe.no-range", f"{name!r} has no range", field=name, remedy="write the step's range"
                )
            cell = frame[name]
            number = cell.try_cast("float64")
            outside = (~number.between(*limits) & ~is_code(cell, declared)).fill_null(False)
            if self.outside == "drop":
                frame = frame.where(~outside, f"{name} outside its range")
            else:
                frame = frame.replace({name: outside.ifelse(null(str(cell.type())), cell)})
        return frame
