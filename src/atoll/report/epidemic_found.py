"""What the epidemic sections draw, read from the daily job's JSON: any part of it may be missing, None or odd."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from atoll.report.section import part
from atoll.report.words import real

Found = Mapping[str, Any]
Day = dt.date
Interval = tuple[float, float | None, float | None]
"""Mean, lower and upper end."""


def course(
    found: Found,
) -> tuple[dict[Day, float], dict[Day, Interval], list[tuple[int, Interval]], dict[Day, Interval]]:
    """Reported cases by day, SEIR by day, learned forecasts by horizon, and R_t by day."""
    past = {day: value for one in mappings(found.get("incidence"))
            if (day := day_of(one.get("day"))) and (value := real(one.get("cases"))) is not None}  # fmt: skip
    seir, spread = (
        {day: known for one in mappings(rows) if (day := day_of(one.get("day"))) and (known := interval(one, "mean"))}
        for rows in (part(found, "forecast").get("seir"), found.get("reproduction"))
    )
    return past, seir, forecasts(part(found, "forecast").get("learned")), spread


def forecasts(rows: object) -> list[tuple[int, Interval]]:
    return sorted((int(days), known) for one in mappings(rows)
                  if (days := real(one.get("days"))) and days >= 1 and (known := interval(one, "mean")))  # fmt: skip


def newest(found: Found, past: Mapping[Day, float], seir: Mapping[Day, Interval]) -> Day | None:
    """The day that the report is of, whether its own cases are told or withheld."""
    if (told := day_of(found.get("day"))) is not None or past:
        return told or max(past)
    return min(seir) - dt.timedelta(1) if seir else None


def summed(seir: Mapping[Day, Interval], horizons: Iterable[int], today: Day | None) -> dict[int, Interval]:
    """SEIR's cases summed over so many days from *today* on, where it reaches so far."""
    if today is None:
        return {}
    made: dict[int, Interval] = {}
    for days in horizons:
        each = [seir.get(today + dt.timedelta(n + 1)) for n in range(days)]
        known = [one for one in each if one is not None]
        if len(known) == days:
            low, high = ([one[side] for one in known] for side in (1, 2))
            made[days] = (sum(one[0] for one in known), _sum(low), _sum(high))
    return made


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def levels(joint: Found) -> list[tuple[str, float]]:
    """Levels and where each begins, in order: [{"level", "from"}, …]."""
    marks = [(str(one.get("level")), begin) for one in mappings(joint.get("levels"))
             if (begin := real(one.get("from"))) is not None and 0 <= begin < 1]  # fmt: skip
    return sorted(marks, key=lambda pair: pair[1])


def newest_risk(region: Found) -> float | None:
    if (value := real(region.get("risk"))) is not None:
        return value
    by_day = risks(region.get("by_day"))
    return by_day[max(by_day)] if by_day else None


def risks(rows: object) -> dict[Day, float]:
    return {day: value for one in mappings(rows)
            if (day := day_of(one.get("day"))) and (value := real(one.get("risk"))) is not None}  # fmt: skip


def interval(one: Found, middle: str) -> Interval | None:
    mean = real(one.get(middle))
    return None if mean is None else (mean, real(one.get("low")), real(one.get("high")))


def many(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def mappings(value: object) -> list[Found]:
    return [one for one in many(value) if isinstance(one, Mapping)]


def day_of(value: object) -> Day | None:
    try:
        return dt.date.fromisoformat(str(value)[:10])
    except ValueError:
        return None
