"""One column made of several, as text: a date of its parts, an id of its pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import ibis
from pydantic import Field

from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, step

_PART = re.compile(r"\{([^{}]+)\}")


@step("combine", "clean")
class Combine(Step):
    """Make the text column ``into`` of other columns' cells: ``template: "{year}-{month}-{day}"``.

    Missing where any of its cells is. Columns that the contract does not know are left out then.
    """

    into: str
    template: str = Field(pattern=r"\{[^{}]+\}")

    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_PART.findall(self.template)))

    def moves(self, there: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
        return {self.into: self.reads()}

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        used = _PART.findall(self.template)
        pieces: Sequence[object] = [
            frame[piece].cast("string") if number % 2 else ibis.literal(piece)
            for number, piece in enumerate(_PART.split(self.template))
            if piece
        ]
        made = pieces[0]
        for piece in pieces[1:]:
            made = made + piece  # type: ignore[operator]
        table = frame.table.mutate(**{self.into: made})
        left = [name for name in table.columns if name not in used or name in frame.schema.columns or name == self.into]
        return replace(frame, table=table.select(*left))
