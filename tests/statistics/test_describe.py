"""Describe equals pandas on the pooled rows, and its low and high never show a single row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import AtollError, DisclosureError, PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "wide": {"range": [-1e6, 1e6]},
    "percent": {"range": [0, 100]},
    "count": {"dtype": "integer", "range": [0, 50]},
    "code": {"dtype": "integer", "values": [1, 2, 5]},
    "single": {"range": [0, 10]},
    "tight": {"range": [999_999, 1_000_001]},
    "loose": {"range": [0, 1e7]},
    "empty": {"range": [0, 1]},
    "text": {"dtype": "text"},
    "gone": {"role": "ignore"},
}
NUMBERS = [name for name in COLUMNS if name not in ("text", "gone")]


def site(federation: Any, random: np.random.Generator, n: int, shift: float, holes: float, blank: str) -> Any:
    """One site's rows: its own distribution (non-IID), its own share of holes, one column all missing."""
    data = {
        "wide": np.clip(random.standard_cauchy(n) * 100 * (1 + shift) + 1000 * shift, -1e6, 1e6),
        "percent": np.clip(random.normal(20 + 60 * shift, 10, n), 0, 100),
        "count": np.minimum(random.poisson(3 + 20 * shift, n), 50).astype(float),
        "code": random.choice([1.0, 2.0, 5.0], n, p=[shift, (1 - shift) / 2, (1 - shift) / 2]),
        "single": np.full(n, 3.7),
        "tight": random.normal(1e6, 1e-3, n),
        "loose": random.normal(1e6, 1e-3, n),
        "empty": np.full(n, NAN),
    }
    for name, values in data.items():
        if name != "single":
            values[random.random(n) < holes] = NAN
        if name == blank:
            values[:] = NAN
    return federation.table({**data, "text": [None] * n}, COLUMNS)


def describe(federation: Any, drive: Any, tables: dict[str, Any], **params: Any) -> dict[str, Any]:
    schema = next(iter(tables.values())).schema
    made = build("statistics.describe", params)
    driven = drive(made.coordinate(Cohort(tuple(tables), schema)), tables)
    assert len(driven.rounds) <= 2
    return driven.result


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    holes=st.sampled_from([0.0, 0.3, 0.9]),
    blank=st.sampled_from(NUMBERS[:-1]),
)
def test_equals_pandas_on_pooled_rows(
    federation: Any, drive: Any, seed: int, sizes: list[int], holes: float, blank: str
) -> None:
    random = np.random.default_rng(seed)
    tables = {
        f"s{i}": site(federation, random, n, random.random(), holes, blank if i == 0 else "")
        for i, n in enumerate(sizes)
    }
    result = describe(federation, drive, tables)
    pooled = pd.DataFrame({n: concatenate(list(tables.values()))[n] for n in NUMBERS})
    assert result["rows"] == sum(sizes)
    assert list(result["columns"]) == NUMBERS
    for name, found in result["columns"].items():
        column = pooled[name]
        assert (found["rows"], found["count"]) == (len(column), column.count())
        assert found["missing"] == column.isna().sum()
        assert found["mean"] == pytest.approx(column.mean(), rel=1e-9, abs=1e-12, nan_ok=True)
        wanted = column.var() if column.nunique() > 1 else (0.0 if column.count() > 1 else NAN)
        assert found["variance"] == pytest.approx(wanted, rel=1e-9, abs=1e-20, nan_ok=True)
        assert found["std"] == pytest.approx(math.sqrt(wanted), rel=1e-9, abs=1e-10, nan_ok=True)


def test_equals_pandas_through_the_whole_federation(federation: Any) -> None:
    random = np.random.default_rng(1)
    tables = {
        n: site(federation, random, k, s, 0.2, b) for n, k, s, b in [("a", 30, 0.1, "percent"), ("b", 50, 0.9, "")]
    }
    outcome = federation.run(federation.plan("statistics.describe", {}, tables), tables)
    pooled = concatenate(list(tables.values()))
    for name, found in outcome["result"]["columns"].items():
        series = pd.Series(pooled[name])
        assert found["count"] == series.count()
        assert found["mean"] == pytest.approx(series.mean(), rel=1e-9, nan_ok=True)
        assert found["variance"] == pytest.approx(series.var(), rel=1e-9, abs=1e-20, nan_ok=True)
    assert [body["clipped"] for body in federation.releases()] == [0, 0, 0, 0]


def test_one_round_is_enough_for_well_scaled_columns(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(2)
    tables = {"a": site(federation, random, 50, 0.5, 0.1, "")}
    steps = build("statistics.describe", {"columns": ["wide", "percent", "count", "code", "empty"]}).coordinate(
        Cohort(("a",), tables["a"].schema)
    )
    assert [asked.name for asked in drive(steps, tables).rounds] == ["moments"]


# ---------------------------------------------------------------- low and high


def bounds_of(federation: Any, drive: Any, values: Any, **params: Any) -> dict[str, Any]:
    table = federation.table({"x": np.asarray(values, float)}, {"x": {"range": [0, 100]}})
    return describe(federation, drive, {"a": table}, **params)["columns"]["x"]


@settings(max_examples=60)
@given(
    values=st.lists(st.integers(0, 400).map(lambda v: v / 4 + 0.01 if v < 400 else 100.0), min_size=1, max_size=60),
    tail=st.integers(1, 8),
    bins=st.sampled_from([1, 7, 32]),
)
def test_low_and_high_have_enough_rows_beyond_them(
    federation: Any, drive: Any, values: list[float], tail: int, bins: int
) -> None:
    found = bounds_of(federation, drive, values, tail_rows=tail, bins=bins)
    if len(values) < 2 * tail:
        assert math.isnan(found["low"])
        assert math.isnan(found["high"])
        assert found["histogram"] == []
        assert found["edges"] == []
        return
    x, width = np.array(values), 100 / bins
    assert found["low"] < found["high"]
    assert (x < found["low"] + width + 1e-9).sum() >= tail  # the bin at the edge, and beyond it: enough rows
    assert (x >= found["high"] - width - 1e-9).sum() >= tail
    assert (x < found["low"] - 1e-9).sum() < tail  # and no farther in than needed
    assert (x > found["high"] + 1e-9).sum() < tail
    assert sum(found["histogram"]) == len(values)
    assert found["histogram"][0] >= tail
    assert found["histogram"][-1] >= tail
    assert len(found["edges"]) == len(found["histogram"]) + 1
    assert (found["edges"][0], found["edges"][-1]) == (found["low"], found["high"])


@pytest.mark.parametrize("extreme", [70.0, 85.0, 99.9])
def test_a_single_extreme_row_does_not_show(federation: Any, drive: Any, extreme: float) -> None:
    """Wherever the one outlier lies: bounds and histogram are the same."""
    crowd = np.random.default_rng(3).uniform(20, 60, 200)
    found = bounds_of(federation, drive, [*crowd, extreme])
    other = bounds_of(federation, drive, [*crowd, 65.0])
    for shown in ("low", "high", "edges", "histogram"):
        assert found[shown] == other[shown]
    assert found["high"] < 65


def test_tail_rows_of_several_sites_count_together(federation: Any, drive: Any) -> None:
    parts = np.array_split(np.linspace(10, 90, 30), 10)
    tables = {f"s{i}": federation.table({"x": p}, {"x": {"range": [0, 100]}}) for i, p in enumerate(parts)}
    found = describe(federation, drive, tables, tail_rows=5)["columns"]["x"]
    assert found == bounds_of(federation, drive, np.linspace(10, 90, 30), tail_rows=5) | {
        key: pytest.approx(found[key], rel=1e-12) for key in ("mean", "variance", "std")
    }


# ---------------------------------------------------------------- what is refused


def small_groups(federation: Any, rows: int, known: int) -> AtollError:
    x = np.where(np.arange(rows) < known, 5.0, NAN)
    tables = {
        "big": federation.table({"x": np.linspace(0, 10, 40)}, {"x": {"range": [0, 10]}}),
        "small": federation.table({"x": x}, {"x": {"range": [0, 10]}}),
    }
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    with pytest.raises(DisclosureError) as caught:
        federation.run(federation.plan("statistics.describe", {}, tables), tables, {"small": strict})
    assert not [body for body in federation.releases() if body["site"] == "small"]
    return caught.value


def test_a_small_site_is_refused(federation: Any) -> None:
    error = small_groups(federation, rows=4, known=4)
    assert (error.code, error.where["site"], error.where["round"]) == ("disclosure.small-group", "small", 0)


def test_a_mean_over_one_person_is_withheld(federation: Any) -> None:
    """Σx over one non-missing cell is that person's value, however many rows the site has."""
    columns = {"x": {"range": [0, 10]}, "y": {"range": [0, 10]}}
    one = federation.table({"x": [7.310585786, *[NAN] * 39], "y": np.linspace(0, 10, 40)}, columns)
    tables = {"big": federation.table({"x": np.linspace(0, 10, 40), "y": np.ones(40)}, columns), "small": one}
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    found = federation.run(federation.plan("statistics.describe", {}, tables), tables, {"small": strict})["result"]
    assert found["columns"]["x"]["withheld"] is True
    assert math.isnan(found["columns"]["x"]["mean"])
    assert found["columns"]["x"]["histogram"] == []
    assert found["columns"]["y"]["count"] == 80
    shifted = np.array([(7.310585786 - 5) / 5]).tobytes()
    sent = [data for name, way, data in federation.wire if (name, way) == ("small", "from")]
    assert not any(shifted in data for data in sent)


def test_a_dominated_mean_is_withheld(federation: Any) -> None:
    columns = {"cost": {"range": [0, 1e6], "unit": "EUR"}}
    cost = np.append(np.full(60, 20.0), 900_000.0)
    tables = {"a": federation.table({"cost": cost}, columns), "b": federation.table({"cost": cost[:60]}, columns)}
    for share, withheld in ((0.85, True), (1.0, False)):
        policy = Policy.sandbox().model_copy(update={"dominant_people": 1, "dominant_share": share})
        outcome = federation.run(federation.plan("statistics.describe", {}, tables), tables, {"a": policy})
        found = outcome["result"]["columns"]["cost"]
        assert found.get("withheld", False) is withheld
        assert math.isnan(found["mean"]) is withheld


def test_small_bins_are_withheld_with_their_complement(federation: Any) -> None:
    x = np.concatenate([np.full(20, 1.0), np.full(2, 3.0), np.full(9, 5.0), np.full(30, 9.0)])
    tables = {"a": federation.table({"x": x}, {"x": {"range": [0, 10]}})}
    plan = federation.plan("statistics.describe", {"bins": 5}, tables, run={"min_group_size": 5})
    assert federation.run(plan, tables)["result"]["columns"]["x"]["histogram"] == [20, None, None, 0, 30]


@pytest.mark.parametrize(("rows", "known"), [(5, 5), (40, 0)])
def test_groups_that_are_large_enough_or_empty_are_released(federation: Any, rows: int, known: int) -> None:
    x = np.where(np.arange(rows) < known, 5.0, NAN)
    tables = {"a": federation.table({"x": x}, {"x": {"range": [0, 10]}})}
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    outcome = federation.run(federation.plan("statistics.describe", {}, tables), tables, {"a": strict})
    assert outcome["result"]["columns"]["x"]["count"] == known


@pytest.mark.parametrize("column", ["text", "gone", "none"])
def test_columns_without_numbers_are_refused(federation: Any, column: str) -> None:
    tables = {"a": site(federation, np.random.default_rng(1), 9, 0.5, 0, "")}
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.describe", {"columns": ["wide", column]}, tables), tables)
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", column)


def test_a_column_so_skewed_that_its_bins_are_withheld(federation: Any) -> None:
    x = np.append(np.full(1000, 1.0), [80.0, 90.0, 99.0])
    tables = {"a": federation.table({"x": x}, {"x": {"range": [0, 100]}})}
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    found = federation.run(federation.plan("statistics.describe", {}, tables), tables, {"a": strict})["result"]
    assert found["columns"]["x"]["mean"] == pytest.approx(x.mean())
    assert not any(found["columns"]["x"]["histogram"])


def test_few_missing_cells_are_not_counted_for_the_reader(federation: Any) -> None:
    x = np.where(np.arange(60) < 2, NAN, np.linspace(0, 10, 60))
    tables = {"a": federation.table({"x": x}, {"x": {"range": [0, 10]}})}
    plan = federation.plan("statistics.describe", {"bins": 4}, tables, run={"min_group_size": 5})
    found = federation.run(plan, tables)["result"]["columns"]["x"]
    assert math.isnan(found["count"]) and math.isnan(found["missing"])
    assert found["mean"] == pytest.approx(np.nanmean(x))
    shown = [rows for rows in found["histogram"] if rows is not None]
    assert 0 < sum(shown) < 55  # else they could be counted
