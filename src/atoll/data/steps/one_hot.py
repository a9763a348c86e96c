"""A code list as one 0/1 column for each code."""

from __future__ import annotations

from typing import Literal

import ibis
from pydantic import Field

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Step, column_of, free_name, step
from atoll.data.steps.cells import Names
from atoll.data.steps.declare import coded


def values_of(schema: TableSchema, name: str) -> tuple[Column, tuple[int | float | str, ...]]:
    """A column with a code list, and its codes; raises PlanError for others."""
    column = column_of(schema, name)
    if column.values is None:
        raise PlanError(
            "recipe.no-values", f"{name!r} has no list of values", field=name,
            remedy="list its values in the schema, or bin it first",
        )  # fmt: skip
    return column, column.values


@step("one_hot")
class OneHot(Step):
    """Replace ``columns`` with code lists by 0/1 columns ``COLUMN_CODE``, one for each code in the schema.

    drop_first: none for the first code (it is where all others are 0). missing: where the code is missing, all
    of them are missing ("keep"), or 0 ("zero"), or there is one more column ``COLUMN_missing`` ("own").
    """

    columns: Names = Field(min_length=1)
    drop_first: bool = False
    missing: Literal["keep", "zero", "own"] = "keep"

    def _made(self, schema: TableSchema, name: str) -> dict[str, int | float | str | None]:
        """The new columns' names, and the code that each is 1 for (None: missing)."""
        _, values = values_of(schema, name)
        codes: list[int | float | str | None] = list(values[1:] if self.drop_first else values)
        named = {f"{name}_{int(c) if isinstance(c, float) and c.is_integer() else c}": c for c in codes}
        return {**named, f"{name}_missing": None} if self.missing == "own" else named

    def after(self, schema: TableSchema) -> TableSchema:
        columns = {name: column for name, column in schema.columns.items() if name not in self.columns}
        for name in self.columns:
            made = coded(2, schema.columns[name]) if name in schema.columns else None
            for new in self._made(schema, name):
                free_name(schema.model_copy(update={"columns": columns}), new)
                update = {} if self.missing == "keep" else {"missing": "forbid"}
                columns[new] = made.model_copy(update=update) if made is not None else Column()
        return schema.model_copy(update={"columns": columns})

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        made = {}
        for name in self.columns:
            cell = frame[name]
            gone = null("float64") if self.missing == "keep" else ibis.literal(0.0)
            for new, code in self._made(frame.schema, name).items():
                is_it = cell.isnull() if code is None else cell == code
                made[new] = is_it.cast("float64") if code is None else cell.isnull().ifelse(gone, is_it.cast("float64"))
        return frame.replace(made, self.after(frame.schema))
