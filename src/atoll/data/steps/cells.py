"""What cleaning steps share: cells as text, and cells that no rule could read."""

from __future__ import annotations

from typing import Annotated, Any

import ibis
from pydantic import BeforeValidator

from atoll.contract.schema import Column
from atoll.data.frame import Frame, null

Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]
"""One name, or a list of them."""

_WIDE = "".join(chr(code) for code in range(0xFF01, 0xFF5F)) + "\u3000\u00a0\u2009\u202f\u2212"
_HALF = "".join(chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)) + "    -"


def half_width(text: Any) -> Any:
    """Full-width letters, digits and signs as ASCII; special spaces as a space, the minus sign as '-'."""
    return text.translate(_WIDE, _HALF)


def as_text(cell: Any) -> Any:
    """A cell of any type as text; whole numbers without a point."""
    kind = cell.type()
    if kind.is_string():
        return cell
    if kind.is_floating() or kind.is_decimal():
        number = cell.cast("float64")
        whole = number.try_cast("int64")
        return ibis.ifelse((whole == number).fill_null(False), whole.cast("string"), number.cast("string"))
    return cell.cast("string")


def marked(text: Any, dtype: str) -> Any:
    """Text that no rule of a step reads. What could still be cast to *dtype* would be taken for a value in
    another notation than was declared, so it gets a mark, and the contract's check counts it."""
    return ibis.ifelse(text.try_cast(dtype).notnull(), ibis.literal("? ") + text, text)


def is_code(cell: Any, declared: Column | None) -> Any:
    """Is a cell one of the column's codes for missing?"""
    codes = declared.null_values if declared is not None else ()
    if not codes:
        return ibis.literal(False)
    found = as_text(cell).isin(sorted(str(code) for code in codes))
    numbers = [float(code) for code in codes if not isinstance(code, str)]
    if numbers:
        found = found | cell.try_cast("float64").isin(numbers).fill_null(False)
    return found.fill_null(False)


def missing(frame: Frame, name: str) -> Any:
    """Is a cell missing, by the contract?"""
    return frame[name].isnull() | is_code(frame[name], frame.schema.columns.get(name))


def text_or_null(condition: Any, text: Any) -> Any:
    """*text* where *condition*, else missing."""
    return ibis.ifelse(condition, text, null("string"))
