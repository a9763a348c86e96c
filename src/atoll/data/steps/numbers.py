"""Numbers as people write them."""

from __future__ import annotations

import re
from typing import Literal, Self

import ibis
from pydantic import Field, model_validator

from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import Names, half_width, marked


@step("numbers", "clean")
class Numbers(Step):
    """Read numbers in ``columns`` as people write them; full-width digits always.

    thousands: what groups of three digits are separated by; a cell grouped otherwise is not a number.
    decimal: the decimal sign. percent: what "12%" is: "fraction" 0.12, "number" 12, or not a number.
    suffix: units that may stand behind a number ("mg"), taken off. What cannot be read stays, and breaks
    the contract.
    """

    columns: Names = Field(min_length=1)
    thousands: Literal["", ",", ".", " ", "'", "_"] = ""
    decimal: Literal[".", ","] = "."
    percent: Literal["refuse", "fraction", "number"] = "refuse"
    suffix: Names = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.thousands == self.decimal:
            raise ValueError("thousands and decimal must differ")
        if not all(one.strip() for one in self.suffix):
            raise ValueError("a suffix is empty")
        return self

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        whole = r"[0-9]+"
        if self.thousands:
            whole = rf"(?:[0-9]{{1,3}}(?:{re.escape(self.thousands)}[0-9]{{3}})+|[0-9]+)"
        point = re.escape(self.decimal)
        number = rf"[+-]?(?:{whole}(?:{point}[0-9]*)?|{point}[0-9]+)(?:[eE][+-]?[0-9]+)?"
        changed = {}
        for name in self.columns:
            if not frame[name].type().is_string():
                continue
            cell = half_width(frame[name]).strip()
            text = cell
            for suffix in sorted(self.suffix, key=len, reverse=True):  # so that "mg" goes before "g"
                text = text.re_replace(rf"^({number})\s*{re.escape(half_width_of(suffix))}$", r"\1")
            if self.percent != "refuse":
                text = text.re_replace(rf"^({number})\s*%$", r"\1")
            plain = text
            if self.thousands:
                plain = plain.replace(self.thousands, "")
            plain = plain.replace(self.decimal, ".")
            if self.percent == "fraction":
                hundredth = plain.try_cast("float64") / 100
                plain = ibis.ifelse(cell.endswith("%"), hundredth.cast("string"), plain)
            changed[name] = ibis.ifelse(text.re_search(f"^{number}$"), plain, marked(cell, "float64"))
        return frame.replace(changed)


def half_width_of(text: str) -> str:
    """A suffix as cells are read: half width, trimmed."""
    return "".join(chr(ord(c) - 0xFEE0) if "！" <= c <= "～" else c for c in text).strip()
