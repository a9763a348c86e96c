"""Dates of mixed formats, calendars and zones."""

from __future__ import annotations

import datetime as dt
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError, SchemaError

COLUMNS = {"d": {"dtype": "date"}, "k": {"dtype": "text"}}
TIMES = {"t": {"dtype": "datetime"}}


def dates(clean: Any, cells: list[str], formats: list[str], **more: Any) -> list[Any]:
    step = {"step": "dates", "columns": ["d"], "formats": formats, **more}
    read = clean([step], COLUMNS, [["d", "k"], *([cell, "x"] for cell in cells)])["d"]
    return [None if np.isnat(day) else str(day) for day in read]


def times(clean: Any, cells: list[str], **more: Any) -> list[str]:
    step = {"step": "dates", "columns": "t", "formats": "%Y-%m-%d %H:%M", **more}
    return [str(t)[:16].replace("T", " ") for t in clean([step], TIMES, [["t"], *([c] for c in cells)])["t"]]


def refused(clean: Any, cells: list[str], formats: list[str], **more: Any) -> Any:
    with pytest.raises(SchemaError) as caught:
        dates(clean, cells, formats, **more)
    for part in [caught.value, *caught.value.parts]:
        assert not any(cell in str(part) for cell in cells if len(cell) > 3)
    return (caught.value.parts or [caught.value])[0]


MIXED = ["%Y-%m-%d", "%d/%m/%Y", "%Y年%m月%d日", "%d %b %Y", "%Y%m%d"]


def test_mixed_formats(clean: Any) -> None:
    cells = ["2020-02-29", "28/2/2020", "2020年3月1日", "1 Mar 2020", "20200301", "", "２０２０-01-02"]
    read = ["2020-02-29", "2020-02-28", "2020-03-01", "2020-03-01", "2020-03-01", None, "2020-01-02"]
    assert dates(clean, cells, MIXED) == read


@pytest.mark.parametrize(
    "cell", ["30/02/2020", "2020-13-01", "29/02/2019", "1/2/20", "soon", "2020-1-1x", "2020/01/02"]
)
def test_what_no_format_reads_breaks_the_contract(clean: Any, cell: str) -> None:
    error = refused(clean, ["2020-01-01", cell, cell], MIXED)
    assert (error.code, error.field) == ("schema.type", "d")
    assert "2 of 3" in error.message


def test_ambiguous_cells_are_counted(clean: Any) -> None:
    formats = ["%d/%m/%Y", "%m/%d/%Y"]
    cells = ["03/04/2020", "04/04/2020", "13/04/2020", "04/13/2020", "05/06/2020"]
    error = refused(clean, cells, formats)
    assert error.code == "schema.ambiguous"
    assert "2 of 5" in error.message
    first = dates(clean, cells, formats, ambiguous="first")
    assert first == ["2020-04-03", "2020-04-04", "2020-04-13", "2020-04-13", "2020-06-05"]


def test_roc_calendar(clean: Any) -> None:
    formats = ["%Y/%m/%d", "民國%Y年%m月%d日", "%Y%m%d"]
    cells = ["109/2/29", "民國1年1月1日", "099/12/31", "1090229"]
    assert dates(clean, cells, formats, calendar="roc") == ["2020-02-29", "1912-01-01", "2010-12-31", "2020-02-29"]
    assert refused(clean, ["108/02/29"], formats, calendar="roc").code == "schema.type"
    assert refused(clean, ["2020/02/28"], formats, calendar="roc").code == "schema.type"


def test_a_roc_date_of_another_form_is_not_taken_for_the_year_109(clean: Any) -> None:
    assert refused(clean, ["0109-02-03"], ["%Y/%m/%d"], calendar="roc").code == "schema.type"


def test_buddhist_calendar(clean: Any) -> None:
    assert dates(clean, ["29/02/2563"], ["%d/%m/%Y"], calendar="buddhist") == ["2020-02-29"]


def test_excel_serial_numbers(clean: Any) -> None:
    assert dates(clean, ["1", "59", "61", "43831", "43831.75"], ["excel"]) == [
        "1900-01-01", "1900-02-28", "1900-03-01", "2020-01-01", "2020-01-01",
    ]  # fmt: skip
    for cell in ("60", "0", "2958466", "9999999", "-3"):
        assert refused(clean, [cell], ["excel"]).code == "schema.type"
    step = {"step": "dates", "columns": ["t"], "formats": ["excel"]}
    assert str(clean([step], TIMES, [["t"], ["43831.75"]])["t"][0]) == "2020-01-01T18:00:00.000000"


@pytest.mark.parametrize("zone", ["Asia/Shanghai", "Europe/Berlin", "America/New_York", "Asia/Kolkata"])
@settings(max_examples=15)
@given(st.lists(st.datetimes(dt.datetime(1995, 1, 1), dt.datetime(2024, 12, 31)), min_size=1, max_size=30))
def test_local_time_becomes_utc(clean: Any, zone: str, moments: list[dt.datetime]) -> None:
    local = [m.replace(second=0, microsecond=0) for m in moments]
    utc = [m.replace(tzinfo=ZoneInfo(zone)).astimezone(dt.UTC) for m in local]
    there = [u.astimezone(ZoneInfo(zone)).replace(tzinfo=None) == m for u, m in zip(utc, local, strict=True)]
    known = [(m, u) for m, u, is_there in zip(local, utc, there, strict=True) if is_there]
    if known:
        read = times(clean, [f"{m:%Y-%m-%d %H:%M}" for m, _ in known], timezone=zone, ambiguous="first")
        assert read == [f"{u:%Y-%m-%d %H:%M}" for _, u in known]


def test_clocks_put_forward_and_back(clean: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        times(clean, ["2021-03-28 02:30"], timezone="Europe/Berlin")
    assert caught.value.code == "schema.type"
    with pytest.raises(SchemaError) as caught:
        times(clean, ["2021-10-31 02:30", "2021-10-31 03:00"], timezone="Europe/Berlin")
    assert caught.value.code == "schema.ambiguous"
    assert "1 of 2" in caught.value.message
    read = times(clean, ["2021-10-31 02:30", "2021-10-31 03:00"], timezone="Europe/Berlin", ambiguous="first")
    assert read == ["2021-10-31 00:30", "2021-10-31 02:00"]


def test_seconds_and_halves_of_days(clean: Any) -> None:
    step = {"step": "dates", "columns": "t", "formats": ["%d.%m.%Y %H:%M:%S.%f", "%m/%d/%Y %I:%M %p"]}
    read = clean([step], TIMES, [["t"], ["01.02.2020 03:04:05.25"], ["2/3/2020 1:05 PM"]])["t"]
    assert [str(t) for t in read] == ["2020-02-01T03:04:05.250000", "2020-02-03T13:05:00.000000"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"formats": ["%Q"]}, {"formats": ["%Y-%m-%d%"]}, {"formats": ["plain"]}, {"formats": []},
        {"formats": ["%d.%m.%y"], "calendar": "roc"}, {"timezone": "Mars/Olympus"}, {"calendar": "lunar"},
        {"formats": ["%Y %Y"]},
    ],
)  # fmt: skip
def test_formats_that_cannot_work_are_refused(clean: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        dates(clean, ["2020-01-01"], **{"formats": ["%Y-%m-%d"], **wrong})
