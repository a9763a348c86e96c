"""What a date or time is in the calendar."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import Frame
from atoll.data.step import Fitted, Step, column_of, free_name, step
from atoll.data.steps.streams import Zone, in_zone

Part = Literal["hour", "weekday", "day", "week", "month", "quarter", "day_of_year", "is_weekend"]
_PARTS: dict[str, tuple[int, int]] = {
    "hour": (0, 24), "weekday": (0, 7), "day": (1, 31), "week": (1, 53), "month": (1, 12), "quarter": (1, 4),
    "day_of_year": (1, 366), "is_weekend": (0, 2),
}  # fmt: skip
"""First value, and how many there are."""


@step("calendar")
class Calendar(Step):
    """New columns ``COLUMN_PART`` of a date or time ``column``.

    parts: hour 0–23, weekday 0–6 (Monday is 0), day of the month, week 1–53 (ISO 8601), month, quarter,
    day_of_year, is_weekend (Saturday or Sunday). cyclic: instead COLUMN_PART_sin and _cos of the angle
    2π · (part − first) / number of parts, so that the last is beside the first. timezone: in which a time
    is looked at (IANA name).
    """

    adds: ClassVar[bool] = True
    column: str
    parts: tuple[Part, ...] = Field(min_length=1)
    cyclic: bool = False
    timezone: Zone = "UTC"

    def after(self, schema: TableSchema) -> TableSchema:
        kinds = ("datetime",) if "hour" in self.parts else ("date", "datetime")
        source = column_of(schema, self.column, *kinds)
        role: Any = source.role if source.role in ("feature", "label") else "feature"
        made: dict[str, Column] = {}
        for part in self.parts:
            first, size = _PARTS[part]
            if self.cyclic and part != "is_weekend":
                wave = Column(range=(-1, 1), role=role, missing=source.missing)
                made |= {f"{self.column}_{part}_sin": wave, f"{self.column}_{part}_cos": wave}
            else:
                values = tuple(range(first, first + size))
                made[f"{self.column}_{part}"] = Column(
                    dtype="integer", values=values, role=role, missing=source.missing
                )
        for name in made:
            free_name(schema, name)
        return schema.with_columns(made)

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        time = frame[self.column]
        if frame.schema.columns[self.column].dtype == "datetime" and self.timezone != "UTC":
            time = in_zone(time.cast("timestamp(6)"), self.timezone)
        made: dict[str, Any] = {}
        for part in self.parts:
            value = _part(time, part).cast("float64")
            first, size = _PARTS[part]
            if self.cyclic and part != "is_weekend":
                angle = (value - first) * (2 * math.pi / size)
                made |= {f"{self.column}_{part}_sin": angle.sin(), f"{self.column}_{part}_cos": angle.cos()}
            else:
                made[f"{self.column}_{part}"] = value
        return frame.replace(made, self.after(frame.schema))


def _part(time: Any, part: str) -> Any:
    if part == "weekday":
        return time.day_of_week.index()
    if part == "is_weekend":
        return time.day_of_week.index() >= 5
    return getattr(time, {"week": "week_of_year"}.get(part, part))()
