"""Resampling equals pandas, stream by stream, whatever the order of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.plan import Recipe
from atoll.data.engine import Engine
from atoll.data.frame import Frame
from atoll.data.recipe import Prepared
from atoll.data.table import Table

from .irregular import BY, COLUMNS, by_stream, frame_of, run


@pytest.mark.parametrize("every", ["1h", "15min", "1d"])
@pytest.mark.parametrize("fill", [False, True])
def test_resample(stream: Table, prepare: Any, same: Any, every: str, fill: bool) -> None:
    how = {"x": "mean", "n": "sum", "note": "last"}
    made = frame_of(run(prepare, stream, step="resample", every=every, columns=how, fill=fill, most=400, **BY))
    grid = every.replace("d", "D")
    sums = {"x": "mean", "n": lambda c: c.sum(min_count=1), "note": "last"}
    expected = by_stream(stream).set_index("t").groupby("s").resample(grid, origin="epoch").agg(sums)
    if not fill:
        size = by_stream(stream).set_index("t").groupby("s")["x"].resample(grid, origin="epoch").size()
        expected = expected[size > 0]
    expected = expected.reset_index()
    for name in ("s", "t", "x", "n"):
        assert same(made[name], expected[name]), name
    assert (
        made["note"].where(made["note"].notna(), None).tolist()
        == expected["note"].where(expected["note"].notna(), None).tolist()
    )


def test_resample_counts_extremes_and_bounds(stream: Table, prepare: Any, same: Any) -> None:
    step = {"step": "resample", "every": "6h", "label": "right", "fill": True, **BY}
    made = run(prepare, stream, columns={"x": "max", "n": "min", "note": "count"}, **step)
    expected = (
        by_stream(stream).set_index("t").groupby("s").resample("6h", origin="epoch", label="right")
        .agg({"x": "max", "n": "min", "note": "count"}).reset_index()
    )  # fmt: skip
    for name in ("s", "t", "x", "n", "note"):
        assert same(frame_of(made)[name], expected[name]), name
    assert made.schema.columns["note"].range == (0, 10_000_000)
    assert made.schema.columns["t"].grain == "6h"
    assert "day" not in made.columns


def test_days_of_another_zone(table_of: Any, prepare: Any) -> None:
    times = np.array(["2020-01-01T15:59", "2020-01-01T16:00"], "datetime64[us]")
    table = table_of({"t": times, "x": [1, 2]}, {"t": COLUMNS["t"], "x": COLUMNS["x"]})
    made = run(prepare, table, step="resample", on="t", every="1d", offset="16h", columns={"x": "mean"})
    assert [str(t)[:13] for t in made["t"]] == ["2019-12-31T16", "2020-01-01T16"]
    assert made.schema.columns["t"].grain is None


def test_resample_dates(stream: Table, prepare: Any) -> None:
    made = run(prepare, stream, step="resample", on="day", every="7d", columns={"x": "count"})
    assert made["day"].dtype == np.dtype("datetime64[D]")
    assert set(made["day"].astype(int) % 7) == {0}
    assert made["x"].sum() == np.isfinite(stream["x"]).sum()


def test_rows_without_a_time_are_counted(table_of: Any, prepare: Any) -> None:
    times = np.array(["2020-01-01", "NaT", "NaT"], "datetime64[us]")
    table = table_of({"t": times, "x": [1, 2, 3]}, {"t": COLUMNS["t"], "x": COLUMNS["x"]})
    made = run(prepare, table, step="resample", on="t", every="1h", columns={"x": "mean"})
    assert made.dropped == {"without a time": 2}
    assert made["x"].tolist() == [1]


def test_a_bin_may_not_hold_more_than_declared(stream: Table, prepare: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        run(prepare, stream, step="resample", every="1d", columns={"x": "sum"}, most=3, **BY)
    assert caught.value.code == "recipe.too-many-in-bin"


def test_a_grid_may_not_be_longer_than_any_table(table_of: Any, prepare: Any) -> None:
    times = np.array(["1990-01-01", "2020-01-01"], "datetime64[us]")
    table = table_of({"t": times, "x": [1, 2]}, {"t": COLUMNS["t"], "x": COLUMNS["x"]}, max_rows=1000)
    step = {"step": "resample", "on": "t", "every": "1s", "columns": {"x": "mean"}}
    assert len(run(prepare, table, **step)) == 2
    with pytest.raises(SchemaError) as caught:
        run(prepare, table, fill=True, **step)
    assert caught.value.code == "schema.too-many-rows"


def test_rows_are_not_merged_after_the_hold_out(stream: Table) -> None:
    held = Table(stream.schema, stream.columns, np.arange(len(stream)) < 100)
    recipe = Prepared(Recipe(steps=({"step": "resample", "every": "1h", "columns": {"x": "mean"}, **BY},)))
    with pytest.raises(PlanError) as caught:
        recipe.prepare(Frame.of(held, Engine()), {})
    assert caught.value.code == "recipe.too-late"
