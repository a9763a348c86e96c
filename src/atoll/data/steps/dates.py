"""Dates of mixed formats, calendars and time zones, as the contract writes them."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

import ibis
import ibis.expr.datatypes as dt
from pydantic import Field, model_validator

from atoll.contract.errors import AtollError, SchemaError, refuse_all
from atoll.data.frame import Frame, null
from atoll.data.step import Fitted, Step, step
from atoll.data.steps.cells import Names, as_text, half_width, marked
from atoll.data.steps.streams import Zone, in_zone, to_utc

YEARS = {"gregorian": 0, "roc": 1911, "buddhist": -543}
"""What is added to a calendar's year to make it Gregorian; months and days are the same."""
_DIGITS = {"y": 2, "m": 2, "d": 2, "H": 2, "I": 2, "M": 2, "S": 2, "j": 3, "f": 6}
_LETTERS = {"b": "[A-Za-z]+", "B": "[A-Za-z]+", "p": "[AaPp][Mm]"}


# DuckDB's own; NULL where the text is not of that form, or is no date (30 February)
_try_strptime: Any = ibis.udf.scalar.builtin(
    lambda text, form: (text, form), name="try_strptime", signature=((dt.string, dt.string), dt.timestamp)
)


@step("dates", "clean")
class Dates(Step):
    """Read dates in ``columns`` that are written in one of ``formats``, and write them as the contract does.

    formats: with the directives %Y %y %m %d %H %I %M %S %f %p %b %B %j, or "excel" for serial numbers (of
        the 1900 system). Years (%Y) have four digits, in "roc" up to three.
    calendar: "roc" (民國, year 1 = 1912) or "buddhist" (year 2543 = 2000) count years otherwise.
    ambiguous: cells that two formats read as different dates, or whose local time occurs twice as
        clocks are put back, are refused (and counted), or read by the "first" format, as the earlier time.
    timezone: of date-times, an IANA name ("Asia/Shanghai"): local time becomes UTC. Times that do not
        exist there, as clocks are put forward, are unreadable.

    What no format reads stays, and breaks the contract.
    """

    columns: Names = Field(min_length=1)
    formats: Names = Field(min_length=1)
    calendar: Literal["gregorian", "roc", "buddhist"] = "gregorian"
    ambiguous: Literal["refuse", "first"] = "refuse"
    timezone: Zone = "UTC"

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for form in self.formats:
            if form != "excel":
                _pattern(form, self.calendar)
                if self.calendar != "gregorian" and "%Y" not in form:
                    raise ValueError("formats of other calendars need %Y")
        return self

    def apply(self, frame: Frame, fitted: Fitted) -> Frame:
        changed, doubtful = {}, {"rows": frame.table.count()}
        for name in self.columns:
            cell = frame[name]
            declared = frame.schema.columns.get(name)
            kind = "timestamp" if declared is not None and declared.dtype == "datetime" else "date"
            reads = [cell.cast("timestamp(6)")] if cell.type().is_temporal() else self._reads(cell)
            if kind == "date":
                reads = [read.date().cast("timestamp(6)") for read in reads]
            read, unclear = ibis.coalesce(*reads), ibis.least(*reads) != ibis.greatest(*reads)
            if kind == "timestamp" and self.timezone != "UTC":
                read, twice = _from_local(read, self.timezone)
                unclear = unclear | twice
            doubtful[name] = unclear.sum()
            written = read.cast("date" if kind == "date" else "timestamp(6)").cast("string")
            changed[name] = read.notnull().ifelse(written, marked(as_text(cell), kind))
        if self.ambiguous == "refuse":
            found = frame.engine.row(frame.table.aggregate(**doubtful))
            problems: list[AtollError] = [
                SchemaError(
                    "schema.ambiguous", f"column {name!r}: {found[name]} of {found['rows']} cells can be read as "
                    "different dates", field=name,
                    remedy="name one format for each site's table, or set ambiguous: first",
                )
                for name in self.columns if found[name]
            ]  # fmt: skip
            refuse_all(SchemaError, "schema.broken", problems)
        return frame.replace(changed)

    def _reads(self, cell: Any) -> list[Any]:
        """What each format makes of a cell."""
        text = half_width(as_text(cell))
        return [_excel(text) if form == "excel" else self._read(text, form) for form in self.formats]

    def _read(self, text: Any, form: str) -> Any:
        before, year, after = _pattern(form, self.calendar)
        whole = text.re_search(f"^{before}{year}{after}$")
        if self.calendar != "gregorian":  # first: leap years are the Gregorian ones
            number = text.re_extract(f"^{before}({year}){after}$", 1).try_cast("int64") + YEARS[self.calendar]
            start = text.re_extract(f"^({before}){year}{after}$", 1)
            text = start + number.cast("string").lpad(4, "0") + text.re_extract(f"^{before}{year}({after})$", 1)
        return ibis.ifelse(whole, _try_strptime(text, form), null("timestamp(6)"))


def _pattern(form: str, calendar: str) -> tuple[str, str, str]:
    """A regular expression for what a format reads: (before the year, the year, after it)."""
    parts = re.findall(r"%.|[^%]+", form, re.DOTALL)
    if "".join(parts) != form or not any(part[0] == "%" for part in parts):
        raise ValueError("a date format has no directive, or a lone %")
    made, year = ["", ""], ""
    for i, part in enumerate(parts):
        letter = part[1:] if part[0] == "%" else ""
        beside = any(0 <= j < len(parts) and parts[j][0] == "%" for j in (i - 1, i + 1))
        if letter == "Y":
            if year:
                raise ValueError("a date format has two years")
            year = "[0-9]{1,3}" if calendar == "roc" else "[0-9]{4}"
            if calendar == "roc" and beside:
                year = "[0-9]{3}"
        elif letter in _DIGITS:  # a width is left open only where something ends the number
            most = _DIGITS[letter]
            made[bool(year)] += f"[0-9]{{{most}}}" if beside or letter == "y" else f"[0-9]{{1,{most}}}"
        elif letter in _LETTERS:
            made[bool(year)] += _LETTERS[letter]
        elif letter:
            raise ValueError(f"a date format has an unknown directive %{letter}")
        else:
            made[bool(year)] += re.escape(part)
    return made[0], year, made[1]


def _excel(text: Any) -> Any:
    """A serial number of days since 1899-12-30; before March 1900 since the day after it, as Excel counts a
    29 February 1900 (serial number 60) that never was."""
    days = ibis.ifelse(text.re_search(r"^[0-9]{1,7}(\.[0-9]+)?$"), text.try_cast("float64"), null("float64"))
    real = (
        days.between(
            1,
            2_958_466,
        )
        & (days < 2_958_466)
        & ~((days >= 60) & (days < 61))
    )
    shifted = ibis.ifelse(days < 60, days + 1, days)
    second = (ibis.ifelse(real, shifted, null("float64")) - 25_569) * 86_400  # 25569: 1970-01-01
    return second.round().cast("int64").as_timestamp("s").cast("timestamp(6)")


def _from_local(local: Any, zone: str) -> tuple[Any, Any]:
    """(UTC, does the local time occur twice?); NULL for times that do not occur."""
    hour = ibis.interval(hours=1)
    utc = to_utc(local, zone)
    earlier, later = in_zone(utc - hour, zone) == local, in_zone(utc + hour, zone) == local
    found = ibis.ifelse(earlier, utc - hour, utc)
    return ibis.ifelse(in_zone(utc, zone) == local, found, null("timestamp(6)")), earlier | later
