"""Rows that lack what a study cannot do without."""

from __future__ import annotations

from pydantic import Field

from atoll.contract.schema import TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, column_of, step
from atoll.data.steps.cells import Names, missing


@step("drop_missing", "clean")
class DropMissing(Step):
    """Leave out rows where one of ``columns`` is missing, before the contract is checked."""

    columns: Names = Field(min_length=1)

    def drops(self) -> tuple[str, ...]:
        return tuple(f"without {name}" for name in self.columns)

    def chooses(self) -> tuple[str, ...]:
        return self.columns

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        for name, reason in zip(self.columns, self.drops(), strict=True):
            frame = frame.where(~missing(frame, name), reason)
        return frame


@step("complete_rows")
class CompleteRows(DropMissing):
    """Leave out rows where one of ``columns`` is missing, as prepared up to here."""

    def after(self, schema: TableSchema) -> TableSchema:
        return schema.with_columns(
            {name: column_of(schema, name).model_copy(update={"missing": "forbid"}) for name in self.columns}
        )

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        for name, reason in zip(self.columns, self.drops(), strict=True):
            cell = frame[name]
            frame = frame.where(
                cell.notnull() if not cell.type().is_floating() else cell.notnull() & ~cell.isnan(), reason
            )
        return frame.replace({}, self.after(frame.schema))
