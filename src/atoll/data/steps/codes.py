"""Codes of one site in the contract's code list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import ibis
from pydantic import Field

from atoll.contract.errors import AtollError, SchemaError, refuse_all
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import Names, as_text


@step("codes", "clean")
class Codes(Step):
    """Replace cells of ``columns`` by what ``map`` says (null: missing).

    other: what becomes of cells that are not in the map: "keep" leaves them to the contract's check,
    "missing" makes them missing, "error" refuses the table, counting them.
    """

    columns: Names = Field(min_length=1)
    map: Mapping[str, float | int | str | None] = Field(min_length=1)
    other: Literal["keep", "missing", "error"] = "keep"

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        codes = {code: value for code, value in self.map.items() if value is not None}
        changed: dict[str, Any] = {}
        strange: dict[str, Any] = {"rows": frame.table.count()}
        for name in self.columns:
            text = as_text(frame[name])
            listed = text.isin(sorted(self.map))
            strange[name] = (text.notnull() & ~listed).sum()
            other = text if self.other == "keep" else null("string")
            cases = [(text == code, ibis.literal(_written(value))) for code, value in codes.items()]
            changed[name] = ibis.cases(*cases, (listed, null("string")), else_=other)
        if self.other == "error":
            found = frame.engine.row(frame.table.aggregate(**strange))
            problems: list[AtollError] = [
                SchemaError(
                    "schema.code",
                    f"column {name!r}: {found[name]} of {found['rows']} cells are not in the recipe's map", field=name,
                    remedy="map the codes, or choose what becomes of other cells",
                )
                for name in self.columns if found[name]
            ]  # fmt: skip
            refuse_all(SchemaError, "schema.broken", problems)
        return frame.replace(changed)


def _written(value: float | int | str) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
