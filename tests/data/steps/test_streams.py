"""Steps over time equal pandas, stream by stream, whatever the order of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import signal

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.table import Table

from .irregular import BY, COLUMNS, NAN, by_stream, frame_of, grouped, run

# ---------------------------------------------------------------- as-of, lags


@pytest.mark.parametrize("delay", ["", "15min"])
def test_asof(stream: Table, prepare: Any, delay: str) -> None:
    made = run(prepare, stream, step="asof", value=["x", "note"], tolerance="2h", delay=delay, suffix="_known", **BY)
    rows = frame_of(stream)
    wait = pd.Timedelta(delay or 0)
    for i in range(len(rows)):
        row = rows.loc[i]
        age = row["t"] - rows["t"]
        near = rows[(rows["s"] == row["s"]) & (age >= wait) & (age <= pd.Timedelta("2h"))]
        for name in ("x", "note"):
            known = near.dropna(subset=name).sort_values("t", kind="stable")
            cell = made[f"{name}_known"][i]
            if len(known):
                assert cell == known[name].iloc[-1]
            else:
                assert cell is None or cell != cell
    assert made["x"].tolist()[:5] == pytest.approx(stream["x"].tolist()[:5], nan_ok=True)


def test_asof_aligns_two_streams_of_a_long_table(table_of: Any, prepare: Any, same: Any) -> None:
    """As pandas.merge_asof of the two streams."""
    columns = {"t": COLUMNS["t"], "a": {"range": [0, 99]}, "b": {"range": [0, 99]}}
    times = np.datetime64("2020-01-01", "us") + np.array([0, 7, 10, 20, 34, 40, 90]) * np.timedelta64(1, "m")
    table = table_of({"t": times, "a": [1, NAN, 2, 3, NAN, 4, 5], "b": [NAN, 10, NAN, NAN, 11, NAN, NAN]}, columns)
    steps = [
        {"step": "asof", "on": "t", "value": "b", "tolerance": "15min"},
        {"step": "complete_rows", "columns": ["a"]},
    ]
    made = prepare(steps, {"site": table})["site"]
    frame = frame_of(table)
    left, right = frame[["t", "a"]].dropna(), frame[["t", "b"]].dropna()
    expected = pd.merge_asof(left, right, on="t", tolerance=pd.Timedelta("15min"))
    assert same(made["b"], expected["b"])
    assert made.dropped == {"without a": 2}


def test_differences_of_what_only_rises_are_never_negative(stream: Table, prepare: Any) -> None:
    falling, rising = (
        run(prepare, stream, step="lag", columns=["x", "n"], differences=[2], rising=told, **BY)
        for told in (False, True)
    )
    for name in ("x_diff2", "n_diff2"):
        assert rising.schema.columns[name].range == (0, falling.schema.columns[name].range[1])
        assert (falling[name] < 0).any()
        assert np.array_equal(rising[name], np.maximum(falling[name], 0), equal_nan=True)


def test_lags_differences_and_what_comes(stream: Table, prepare: Any, same: Any) -> None:
    made = run(prepare, stream, step="lag", columns=["x", "n"], lags=[1, 3], differences=[2], ahead=[1, 4], **BY)
    streams = by_stream(stream).groupby("s")
    for name in ("x", "n"):
        assert same(made[f"{name}_lag1"], grouped(streams[name].shift(1)))
        assert same(made[f"{name}_lag3"], grouped(streams[name].shift(3)))
        assert same(made[f"{name}_diff2"], grouped(streams[name].diff(2)))
        assert same(made[f"{name}_ahead1"], grouped(streams[name].shift(-1)))
        assert same(made[f"{name}_ahead4"], grouped(streams[name].shift(-4)))
        assert same(made[name], stream[name])
    assert made.schema.columns["x_diff2"].range == (-10, 10)
    assert made.schema.columns["n_diff2"].dtype == "integer"
    assert (made.schema.columns["n_ahead1"].dtype, made.schema.columns["n_ahead1"].role) == ("integer", "label")


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("least", [1, 3])
def test_rolling_rows(stream: Table, prepare: Any, current: bool, least: int) -> None:
    how = ["mean", "sum", "std", "min", "max"]
    made = run(
        prepare, stream, step="lag", columns="x", windows=[5], statistics=how, current=current, least=least, **BY
    )
    for name in how:
        expected = (
            by_stream(stream)
            .groupby("s")["x"]
            .transform(
                lambda c, name=name: getattr((c if current else c.shift(1)).rolling(5, min_periods=least), name)()
            )
        )
        assert np.allclose(made[f"x_{name}_5"], grouped(expected), rtol=1e-9, atol=1e-9, equal_nan=True), name


@pytest.mark.parametrize("current", [True, False])
def test_rolling_durations(stream: Table, prepare: Any, current: bool) -> None:
    distinct = stream.rows(np.array(~frame_of(stream).duplicated(["s", "t"])))
    how = ["mean", "sum", "std", "min", "max"]
    made = run(
        prepare, distinct, step="lag", columns="x", windows=["6h"], statistics=how, current=current, most=400, **BY
    )
    frame = by_stream(distinct)
    for name in how:
        rolling = (
            frame.set_index("t").groupby("s")["x"].rolling("6h", closed=None if current else "left", min_periods=1)
        )
        expected = pd.Series(getattr(rolling, name)().to_numpy(), frame.index)
        assert np.allclose(made[f"x_{name}_6h"], grouped(expected), rtol=1e-9, atol=1e-9, equal_nan=True), name


def test_sums_of_more_than_declared_are_missing(table_of: Any, prepare: Any) -> None:
    times = np.datetime64("2020-01-01", "us") + np.arange(4) * np.timedelta64(1, "m")
    table = table_of({"t": times, "x": [1, 2, 3, 4]}, {"t": COLUMNS["t"], "x": COLUMNS["x"]})
    made = run(prepare, table, step="lag", on="t", columns="x", windows=["1h"], statistics=["sum"], most=3)
    assert made["x_sum_1h"].tolist()[:3] == [1, 3, 6]
    assert np.isnan(made["x_sum_1h"][3])


def test_forward_fill(stream: Table, prepare: Any, same: Any) -> None:
    for limit in (0, 2):
        step = {"step": "impute", "with": "forward_fill", "limit": limit, "indicator": True, **BY}
        made = run(prepare, stream, columns=["x"], **step)
        expected = by_stream(stream).groupby("s")["x"].ffill(limit=limit or None)
        assert same(made["x"], grouped(expected))
        assert same(made["x_missing"], np.isnan(stream["x"]))


def test_rows_without_a_time_have_nothing_before_them(table_of: Any, prepare: Any) -> None:
    times = np.array(["2020-01-01", "NaT", "2020-01-02", "NaT"], "datetime64[us]")
    table = table_of({"t": times, "x": [1, 2, NAN, NAN]}, {"t": COLUMNS["t"], "x": COLUMNS["x"]})
    steps = [
        {"step": "lag", "on": "t", "columns": "x", "lags": [1], "windows": ["3d", 2]},
        {"step": "asof", "on": "t", "value": "x", "tolerance": "2d", "suffix": "_known"},
        {"step": "impute", "columns": ["x"], "with": "forward_fill", "on": "t"},
    ]
    made = prepare(steps, {"site": table})["site"]
    for name, cells in {"x": [1, 2, 1, NAN], "x_lag1": [NAN, NAN, 1, NAN], "x_known": [1, NAN, 1, NAN],
                        "x_mean_3d": [1, NAN, 1, NAN], "x_mean_2": [1, NAN, 1, NAN]}.items():  # fmt: skip
        assert np.array_equal(made[name], cells, equal_nan=True), name


# ---------------------------------------------------------------- calendar


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai", "America/New_York"])
def test_calendar(stream: Table, prepare: Any, same: Any, zone: str) -> None:
    parts = ["hour", "weekday", "day", "week", "month", "quarter", "day_of_year", "is_weekend"]
    made = run(prepare, stream, step="calendar", column="t", parts=parts, timezone=zone)
    local = pd.Series(stream["t"]).dt.tz_localize("UTC").dt.tz_convert(zone).dt
    expected = {
        "hour": local.hour, "weekday": local.day_of_week, "day": local.day, "week": local.isocalendar().week,
        "month": local.month, "quarter": local.quarter, "day_of_year": local.day_of_year,
        "is_weekend": local.day_of_week >= 5,
    }  # fmt: skip
    for part, cells in expected.items():
        assert same(made[f"t_{part}"], cells.astype(float)), part


def test_cyclic_calendar(stream: Table, prepare: Any, same: Any) -> None:
    made = run(prepare, stream, step="calendar", column="day", parts=["weekday", "month"], cyclic=True)
    day = pd.Series(stream["day"].astype("datetime64[us]")).dt
    assert same(made["day_weekday_sin"], np.sin(2 * np.pi * day.day_of_week / 7))
    assert same(made["day_month_cos"], np.cos(2 * np.pi * (day.month - 1) / 12))


# ---------------------------------------------------------------- noise


def smoothed(prepare: Any, stream: Table, **options: Any) -> np.ndarray:
    return run(prepare, stream, step="smooth", columns="x", **options, **BY)["x"]


def test_rolling_median(stream: Table, prepare: Any, same: Any) -> None:
    x = by_stream(stream).groupby("s")["x"]
    expected = x.transform(lambda c: c.rolling(7, center=True, min_periods=1).median().where(c.notna()))
    assert same(smoothed(prepare, stream, method="median", window=7), grouped(expected))


def test_hampel(stream: Table, prepare: Any, same: Any) -> None:
    def hampel(cells: pd.Series) -> pd.Series:
        made = cells.copy()
        for i in range(len(cells)):
            near = cells.iloc[max(i - 3, 0) : i + 4].dropna()
            if len(near) and abs(cells.iloc[i] - near.median()) > 1.2 * 1.4826 * (near - near.median()).abs().median():
                made.iloc[i] = near.median()
        return made

    expected = by_stream(stream).groupby("s")["x"].transform(hampel)
    assert (expected.dropna() != by_stream(stream)["x"].dropna()).sum() > 20
    assert same(smoothed(prepare, stream, method="hampel", window=7, sigmas=1.2), grouped(expected))


def test_lowpass(stream: Table, prepare: Any, same: Any) -> None:
    def lowpass(cells: pd.Series) -> pd.Series:
        present = cells.dropna()
        filtered = signal.sosfiltfilt(signal.butter(3, 0.2, output="sos"), present)
        return pd.Series(np.clip(filtered, -5, 5), present.index).reindex(cells.index)

    expected = by_stream(stream).groupby("s")["x"].transform(lowpass)
    assert same(smoothed(prepare, stream, method="lowpass", order=3, cutoff=0.2), grouped(expected))


def test_exponential(stream: Table, prepare: Any, same: Any) -> None:
    x = by_stream(stream).groupby("s")["x"]
    expected = x.transform(lambda c: c.ewm(alpha=0.4, adjust=False, ignore_na=True).mean().where(c.notna()))
    assert same(smoothed(prepare, stream, method="exponential", alpha=0.4), grouped(expected))


@pytest.mark.parametrize("method", ["median", "hampel", "lowpass", "exponential"])
def test_short_streams(table_of: Any, prepare: Any, same: Any, method: str) -> None:
    columns = {"t": COLUMNS["t"], "s": COLUMNS["s"], "x": COLUMNS["x"]}
    times = np.array(["2020-01-01", "2020-01-02"], "datetime64[us]")
    for n in (0, 1, 2):
        table = table_of({"t": times[:n], "s": ["one", "two"][:n], "x": [1.5, NAN][:n]}, columns)
        assert same(smoothed(prepare, table, method=method), [1.5, NAN][:n])


# ---------------------------------------------------------------- all


STEPS: list[dict[str, Any]] = [
    {"step": "resample", "every": "1h", "columns": {"x": "mean", "n": "sum"}, "most": 9, "fill": True, **BY},
    {"step": "asof", "value": ["x", "n"], "tolerance": "1h", **BY},
    {"step": "lag", "columns": ["x"], "lags": [1], "ahead": [1], "differences": [1], "windows": [3, "1h"], **BY},
    {"step": "impute", "columns": ["x"], "with": "forward_fill", **BY},
    {"step": "smooth", "columns": ["x"], "method": "median", **BY},
    {"step": "smooth", "columns": ["x"], "method": "exponential", **BY},
    {"step": "calendar", "column": "t", "parts": ["hour"]},
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step['step']}-{step.get('method', '')}")
@pytest.mark.parametrize("rows", ["none", "missing"])
def test_nothing_to_work_on(table_of: Any, prepare: Any, step: dict[str, Any], rows: str) -> None:
    n = 0 if rows == "none" else 3
    day = np.full(n, np.datetime64("2020-01-01"))
    blank = {"t": day.astype("datetime64[us]"), "s": ["one"] * n, "x": [NAN] * n, "n": [NAN] * n, "note": [None] * n}
    made = prepare([step], {"site": table_of({**blank, "day": day}, COLUMNS)})["site"]
    assert len(made) in (n, min(n, 1))


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ({**STEPS[0], "on": "x"}, "plan.invalid"),
        ({**STEPS[0], "on": "n", "columns": {"x": "mean"}}, "recipe.wrong-type"),
        ({**STEPS[0], "by": ["who"]}, "recipe.no-column"),
        ({**STEPS[0], "columns": {"note": "mean"}}, "recipe.not-numeric"),
        ({**STEPS[0], "columns": {"gone": "mean"}}, "recipe.no-column"),
        ({**STEPS[0], "most": 0}, "plan.bad-value"),
        ({**STEPS[0], "every": "1week"}, "plan.bad-value"),
        ({**STEPS[1], "delay": "2h"}, "plan.bad-value"),
        ({**STEPS[1], "value": ["gone"]}, "recipe.no-column"),
        ({**STEPS[1], "suffix": "x", "value": ["n", "nx"]}, "recipe.no-column"),
        ({"step": "lag", "columns": ["x"], **BY}, "plan.bad-value"),
        ({**STEPS[2], "statistics": ["sum"]}, "plan.bad-value"),
        ({**STEPS[2], "columns": ["note"]}, "recipe.not-numeric"),
        ({**STEPS[4], "window": 4}, "plan.bad-value"),
        ({**STEPS[4], "columns": ["note"]}, "recipe.not-numeric"),
        ({**STEPS[6], "column": "day"}, "recipe.wrong-type"),
        ({**STEPS[6], "column": "x"}, "recipe.wrong-type"),
        ({**STEPS[6], "timezone": "nowhere"}, "plan.bad-value"),
    ],
)
def test_recipes_that_cannot_work_are_refused_without_data(step: Any, code: str) -> None:
    schema = TableSchema(name="t", columns={n: Column(**c) for n, c in COLUMNS.items()})
    with pytest.raises(PlanError) as caught:
        Prepared(Recipe(steps=(step,))).schema(schema)
    assert code in (caught.value.code, "plan.invalid")


def test_bounds_of_made_columns() -> None:
    schema = TableSchema(name="t", columns={n: Column(**c) for n, c in COLUMNS.items()})
    steps = ({**STEPS[2], "columns": ["x", "n"], "statistics": ["sum", "std"], "windows": [3]},)
    columns = Prepared(Recipe(steps=steps)).schema(schema).columns
    assert columns["x_sum_3"].bounds() == (-15, 15)
    assert columns["n_sum_3"].bounds() == (0, 27)
    assert columns["x_std_3"].bounds() == (0, pytest.approx(10 / np.sqrt(2)))
    sums = Prepared(Recipe(steps=({**STEPS[0], "columns": {"n": "sum", "x": "sum"}},))).schema(schema).columns
    assert sums["n"].bounds() == (0, 81)
    assert sums["x"].bounds() == (-45, 45)


def test_streams_after_fitted_steps_keep_the_held_out_rows(stream: Table, federation: Any) -> None:
    """Rows that are held out stay so, through windows, filters and dropped rows; all are counted."""
    steps = [
        {"step": "impute", "columns": ["n"], "with": "median"},
        {"step": "lag", "columns": ["n"], "lags": [1], **BY},
        {"step": "smooth", "columns": ["n"], "method": "exponential", **BY},
        {"step": "asof", "value": ["x"], "tolerance": "1h", **BY},
        {"step": "complete_rows", "columns": ["x", "n_lag1"]},
    ]
    tables = {"a": stream, "b": stream.rows(np.arange(len(stream)) % 3 == 0)}
    plan = federation.plan(
        "statistics.describe", {"columns": ["n", "x", "n_lag1"]}, tables, recipe={"steps": steps},
        run={"holdout": 0.25, "evaluate": False, "seed": 1},
    )  # fmt: skip
    outcome = federation.run(plan, tables)
    left = outcome["preparation"]
    assert left["dropped"]["without x"] > 10
    assert left["dropped"]["without n_lag1"] is None  # too few to be told
    split = [SiteData.of(table, plan, name).parts(outcome["fitted"]) for name, table in tables.items()]
    dropped = sum(sum(training.dropped.values()) for training, _ in split)
    assert left["rows"] + dropped == sum(map(len, tables.values()))
    assert outcome["result"]["columns"]["n"]["count"] == sum(len(training) for training, _ in split)
    assert sum(len(part) for parts in split for part in parts) == left["rows"]
    held = sum(len(held) for _, held in split)
    assert 0.15 * left["rows"] < held < 0.35 * left["rows"]
