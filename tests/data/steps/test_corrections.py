"""Counts corrected downward, missing and slipped: mended in each stream, with totals as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.frame import Frame
from atoll.data.recipe import Prepared
from atoll.data.steps.corrections import Corrections
from atoll.data.table import Table

NAN = float("nan")
COLUMNS: dict[str, Any] = {
    "day": {"dtype": "date", "role": "time", "grain": "1d"},
    "city": {"dtype": "text", "values": ["a", "b"]},
    "n": {"dtype": "integer", "range": [-500, 1000]},
    "x": {"range": [0, 1000]},
}
DAY = 86_400_000_000


def mended(values: list[float], days: list[int] | None = None, whole: bool = True, **options: Any) -> list[float]:
    """One stream by itself."""
    made = Corrections(step="corrections", columns=("n",), on="day", **options)
    times = np.array(range(len(values)) if days is None else days, np.int64) * DAY
    return made._stream(np.array(values, float), times, whole).tolist()


def same(left: list[float], right: list[float]) -> None:
    assert np.array_equal(left, right, equal_nan=True), (left, right)


def test_a_fall_is_taken_back_from_the_days_before() -> None:
    same(mended([0, 4, 9, 15, 12, 12, 14], slip=0), [0, 4, 9, 12, 12, 12, 14])
    same(mended([0, 4, 9, 15, 3, 3], slip=0), [0, 3, 3, 3, 3, 3])  # further back where one day is not enough
    same(mended([5, 3, 1], slip=0), [1, 1, 1])
    same(mended([0, 4, 9]), [0, 4, 9])


def test_a_count_typed_in_as_a_sum_is_no_correction() -> None:
    # Suzhou, 2020-02-01 … 02-06, as the bulletins have it: 2 is the day's count
    same(mended([38, 44, 52, 2, 60, 69]), [38, 44, 52, 56, 60, 69])
    same(mended([38, 44, 52, 2, 60, 69], slip=0), [2, 2, 2, 2, 60, 69])
    same(mended([10, 20, 3, 4, 22]), [10, 20, 20, 21, 22])
    same(mended([10, 20, 3, 4, 5, 22]), [3, 3, 3, 4, 5, 22])  # for longer it is one
    same(mended([10, 20, 900, 21, 22]), [10, 20, 21, 21, 22])  # too high for a day
    same(mended([4, 1, 10, 18]), [4, 7, 10, 18])  # Wenzhou's first days
    same(mended([10, 8, 9, NAN, 12], slip=1), [8, 8, 9, 10, 12])


def test_gaps() -> None:
    series = [NAN, 2, NAN, NAN, 10, NAN]
    same(mended(series), [NAN, 2, 4, 7, 10, NAN])
    same(mended(series, whole=False), [NAN, 2, 2 + 8 / 3, 2 + 16 / 3, 10, NAN])
    same(mended(series, gaps="carry"), [NAN, 2, 2, 2, 10, NAN])
    same(mended(series, gaps="keep"), series)
    same(mended([2, NAN, 10], [0, 3, 4]), [2, 8, 10])  # by time, not by row
    same(mended([2, NAN, NAN, 10, NAN, 12], longest="1d"), [2, NAN, NAN, 10, 11, 12])
    same(mended([2, NAN, NAN, 10, NAN, 12], longest="2d"), [2, 4, 7, 10, 11, 12])
    same(mended([NAN, NAN]), [NAN, NAN])
    same(mended([2, NAN, 10], [4, 4, 4]), [2, 2, 10])  # all at one time


def test_new_counts() -> None:
    new = {"kind": "new"}
    same(mended([3, 5, 6, -8, 2], **new), [3, 3, 0, 0, 2])
    same(mended([3, -5, 6], **new), [0, 0, 4])  # 2 of it are owed by the next count
    same(mended([3, -5], **new), [0, 0])  # or lost
    same(mended([3, NAN, 7, 2], **new), [3, 3, 4, 2])
    same(mended([3, NAN, 7, 2], gaps="carry", **new), [3, 0, 7, 2])
    same(mended([3, NAN, 7, 2], gaps="keep", **new), [3, NAN, 7, 2])
    same(mended([NAN, 3, NAN], **new), [NAN, 3, NAN])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(-40, 60), st.just(NAN)), min_size=1, max_size=30),
    st.sampled_from(["spread", "carry", "keep"]),
    st.integers(0, 3),
)
def test_properties(values: list[float], gaps: str, slip: int) -> None:
    new = np.array(mended(values, kind="new", gaps=gaps))
    known = np.array(values, float)
    assert (new[~np.isnan(new)] >= 0).all()
    assert np.nansum(new) == max(np.nansum(known), 0)
    assert (new[~np.isnan(new)] % 1 == 0).all()
    total = np.array(mended(values, gaps=gaps, slip=slip))
    rising = total[~np.isnan(total)]
    assert (np.diff(rising) >= 0).all()
    if not np.isnan(known).all():
        assert rising[-1] == known[~np.isnan(known)][-1]  # the last word stands
    again = np.array(mended(total.tolist(), gaps=gaps, slip=slip))
    assert np.array_equal(again, total, equal_nan=True)


# ---------------------------------------------------------------- as a step


@pytest.fixture
def table(table_of: Any) -> Table:
    """Two cities by day, in no order; b's third day is missing, a's count falls on its last."""
    rows = [("a", 0, 5), ("a", 1, 9), ("a", 2, 14), ("a", 3, 12), ("b", 0, 1), ("b", 1, 2), ("b", 2, NAN), ("b", 3, 6)]
    order = np.random.default_rng(3).permutation(len(rows))
    city, day, n = zip(*[rows[i] for i in order], strict=True)
    days = np.datetime64("2020-02-01") + np.array(day)
    return table_of({"day": days, "city": city, "n": n, "x": n}, COLUMNS)


def run(prepare: Any, table: Table, **options: Any) -> Table:
    step = {"step": "corrections", "columns": ["n", "x"], "on": "day", "by": "city", **options}
    return prepare([step], {"site": table})["site"]


def by_city(table: Table, name: str) -> dict[str, list[float]]:
    order = np.argsort(table["day"])
    return {city: table[name][order][table["city"][order] == city].tolist() for city in ("a", "b")}


def test_each_city_by_itself_in_any_order(table: Table, prepare: Any) -> None:
    made = run(prepare, table, indicator=True)
    assert by_city(made, "n") == {"a": [5, 9, 12, 12], "b": [1, 2, 4, 6]}
    assert by_city(made, "x") == by_city(made, "n")
    assert by_city(made, "n_corrected") == {"a": [0, 0, 1, 0], "b": [0, 0, 1, 0]}
    assert (made["day"] == table["day"]).all()  # rows stay where they were
    assert made.schema.columns["n"] == table.schema.columns["n"]
    assert made.schema.columns["n_corrected"].values == (0, 1)


def test_without_groups_the_table_is_one_stream(table: Table, prepare: Any) -> None:
    made = run(prepare, table, by=[], slip=0)
    order = np.argsort(made["day"], kind="stable")
    assert (np.diff(made["n"][order]) >= 0).all()


def test_schema_of_new_counts_and_kept_gaps(table: Table, prepare: Any) -> None:
    made = run(prepare, table, kind="new", gaps="keep")
    assert made.schema.columns["n"].range == (0, 1000)
    assert made.schema.columns["n"].dtype == "integer"
    assert made.schema.columns["n"].missing == "allow"
    strict = {**COLUMNS, "n": {"dtype": "integer", "values": [1, 2, 5], "missing": "forbid"}}
    schema = TableSchema.model_validate({"name": "t", "columns": strict})
    coded = Corrections(step="corrections", columns=("n",), on="day").after(schema).columns["n"]
    assert coded.range == (1, 5)
    assert coded.missing == "forbid"


def test_rows_without_a_time_stay(table_of: Any, prepare: Any) -> None:
    days = np.array(["2020-02-01", "NaT", "2020-02-03"], "datetime64[D]")
    table = table_of({"day": days, "city": ["a"] * 3, "n": [5, 1, 3], "x": [5, 1, 3]}, COLUMNS)
    assert run(prepare, table, slip=0)["n"].tolist() == [3, 1, 3]


def test_nothing_to_do_for_an_empty_table(table_of: Any, prepare: Any) -> None:
    empty = table_of({"day": np.array([], "datetime64[D]"), "city": [], "n": [], "x": []}, COLUMNS)
    assert len(run(prepare, empty, indicator=True)) == 0


def test_a_missing_day_a_repeated_report_and_a_correction_together(table_of: Any, prepare: Any) -> None:
    """As a recipe does it: one row a day, corrections, then new cases."""
    days = np.array(
        ["2020-02-01", "2020-02-02", "2020-02-02", "2020-02-05", "2020-02-06", "2020-02-07"], "datetime64[D]"
    )
    table = table_of({"day": days, "city": ["a"] * 6, "n": [3, 8, 9, 15, 20, 18], "x": [0] * 6}, COLUMNS)
    steps = [
        {"step": "resample", "on": "day", "by": "city", "every": "1d", "columns": {"n": "last"}, "fill": True},
        {"step": "corrections", "columns": "n", "on": "day", "by": "city", "slip": 0},
        {"step": "lag", "columns": "n", "on": "day", "by": "city", "differences": [1]},
    ]
    made = prepare(steps, {"site": table})["site"]
    assert made["n"].tolist() == [3, 9, 11, 13, 15, 18, 18]
    assert made["n_diff1"][1:].tolist() == [6, 2, 2, 2, 3, 0]


def test_large_tables_of_many_streams(table_of: Any) -> None:
    rng = np.random.default_rng(0)
    columns = {**COLUMNS, "city": {"dtype": "text"}}
    days, cities = np.meshgrid(np.arange(100), np.arange(300))
    n = rng.integers(0, 5, (300, 100)).cumsum(axis=1).astype(float)
    n[rng.random(n.shape) < 0.05] -= 3
    data = {
        "day": np.datetime64("2020-01-01") + days.ravel(), "city": [f"c{c}" for c in cities.ravel()],
        "n": n.ravel(), "x": np.zeros(n.size),
    }  # fmt: skip
    step = Prepared(Recipe(steps=({"step": "corrections", "columns": ["n"], "on": "day", "by": ["city"], "slip": 0},)))
    made = step.prepare(Frame.of(table_of(data, columns), Engine()), {}).to_table()["n"].reshape(300, 100)
    assert np.array_equal(made, np.minimum.accumulate(n[:, ::-1], axis=1)[:, ::-1])


def test_refused(table: Table, prepare: Any) -> None:
    for wrong in ({"longest": "2d", "gaps": "keep"}, {"longest": "2 days"}, {"slip": -1}, {"kind": "daily"}):
        with pytest.raises((PlanError, ValidationError)):
            run(prepare, table, **wrong)
    with pytest.raises(PlanError) as told:
        run(prepare, table, columns=["city"])
    assert told.value.code == "recipe.not-numeric"
    with pytest.raises(PlanError) as told:
        run(prepare, table, on="n")
    assert told.value.code == "recipe.wrong-type"
