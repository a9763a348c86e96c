"""Text and ids in one notation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import Names, as_text, half_width, text_or_null


@step("text", "clean")
class Text(Step):
    """Trim ``columns``, and collapse spaces inside; what is empty then is missing. Options in their order:

    width: "half" turns full-width letters and digits into ASCII. remove: characters to leave out.
    case: "lower" or "upper". strip_zeros: leave out leading zeros (of "000", one stays). pad: zeros are
    put before texts shorter than that.
    """

    columns: Names = Field(min_length=1)
    width: Literal["keep", "half"] = "keep"
    remove: str = ""
    case: Literal["keep", "lower", "upper"] = "keep"
    strip_zeros: bool = False
    pad: int = Field(default=0, ge=0, le=100)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        changed = {}
        for name in self.columns:
            text = as_text(frame[name])
            if self.width == "half":
                text = half_width(text)
            for character in self.remove:
                text = text.replace(character, "")
            text = text.re_replace(r"[\s\x{00a0}\x{3000}]+", " ").strip()
            if self.case != "keep":
                text = text.lower() if self.case == "lower" else text.upper()
            if self.strip_zeros:
                text = text.re_replace(r"^0+(.)", r"\1")
            text = text_or_null(text != "", text)
            if self.pad:
                text = (text.length() < self.pad).ifelse(text.lpad(self.pad, "0"), text)
            changed[name] = text
        return frame.replace(changed)
