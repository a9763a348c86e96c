"""A number turned into yes or no."""

from __future__ import annotations

import ibis

from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Step, free_name, numeric_of, step


@step("threshold")
class Threshold(Step):
    """``into`` = 1 where ``column`` > ``above``, else 0; missing stays missing. Replaces the column."""

    column: str
    above: float
    into: str

    def after(self, schema: TableSchema) -> TableSchema:
        source = numeric_of(schema, self.column)
        free_name(schema, self.into, self.column)
        made = Column(dtype="integer", values=(0, 1), role=source.role, missing=source.missing)
        columns = {name: column for name, column in schema.columns.items() if name != self.column}
        return schema.model_copy(update={"columns": {**columns, self.into: made}})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        cell = frame[self.column]
        above = ibis.ifelse(cell.isnull(), null("float64"), (cell > self.above).cast("float64"))
        return frame.replace({self.into: above}, self.after(frame.schema))
