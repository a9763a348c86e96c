"""Group-by equals the pooled answer; small groups and dominated sums are withheld, with what would tell them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

NAN = float("nan")
CITIES = ("Nanjing", "Suzhou", "Wuxi", "Yangzhou")
COLUMNS: dict[str, dict[str, Any]] = {
    "city": {"dtype": "text", "values": list(CITIES)},
    "grade": {"dtype": "integer", "values": [1, 2, 5]},
    "wide": {"range": [-1e6, 1e6]},
    "tight": {"range": [0, 1e7]},
    "single": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "text": {"dtype": "text"},
}
NUMBERS = ("wide", "tight", "single", "empty")


def site(federation: Any, random: np.random.Generator, n: int, cities: tuple[str, ...] = CITIES) -> Any:
    data = {
        "city": random.choice(np.array([*cities, None], object), n),
        "grade": random.choice([1.0, 2.0, 5.0, NAN], n),
        "wide": np.clip(random.standard_cauchy(n) * 100, -1e6, 1e6),
        "tight": random.normal(1e6, 1e-3, n),
        "single": np.full(n, 3.7),
        "empty": np.full(n, NAN),
    }
    for name in ("wide", "tight"):
        data[name][random.random(n) < 0.2] = NAN
    return federation.table({**data, "text": [None] * n}, COLUMNS)


def group_by(drive: Any, tables: dict[str, Any], rule: Rule | None = None, **params: Any) -> dict[str, Any]:
    rule = rule or Rule()
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, 0, rule.min_group_size)
    driven = drive(build("statistics.group_by", params).coordinate(cohort), tables, rule=rule)
    assert len(driven.rounds) <= 2
    return driven.result["group_by"]


def shown(found: dict[str, Any], what: str, column: str = "x") -> dict[Any, Any]:
    return {tuple(g["key"]): g["count"] if what == "rows" else g["columns"][column][what] for g in found["groups"]}


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    by=st.sampled_from([("city",), ("grade",), ("city", "grade"), ("grade", "city")]),
)
def test_equals_the_pooled_answer(federation: Any, drive: Any, seed: int, sizes: list[int], by: Any) -> None:
    random = np.random.default_rng(seed)
    tables = {f"s{i}": site(federation, random, n, CITIES[: 1 + i % 4]) for i, n in enumerate(sizes)}
    found = group_by(drive, tables, by=by, columns=NUMBERS)
    whole = concatenate(list(tables.values()))
    keys = [[None if v is None or v != v else v for v in whole[name]] for name in by]
    codes = itertools.product(*(COLUMNS[name]["values"] for name in by))
    assert [tuple(g["key"]) for g in found["groups"] if None not in g["key"]] == list(codes)
    assert sum(g["count"] for g in found["groups"]) == len(whole)
    for group in found["groups"]:
        rows = np.array([key == tuple(group["key"]) for key in zip(*keys, strict=True)], bool)
        assert group["count"] == rows.sum()
        for name in NUMBERS:
            told, values = group["columns"][name], whole[name][rows].astype(np.longdouble)
            values = values[~np.isnan(values)]
            assert told["count"] == len(values)
            assert told["sum"] == pytest.approx(float(values.sum()), rel=1e-9, abs=1e-9)
            if len(values):
                assert told["mean"] == pytest.approx(float(values.mean()), rel=1e-12, abs=1e-9)
            else:
                assert told["mean"] is None
            if len(values) > 1:
                assert told["variance"] == pytest.approx(float(values.var(ddof=1)), rel=1e-9, abs=1e-20)
                assert told["std"] == pytest.approx(float(values.std(ddof=1)), rel=1e-9, abs=1e-12)
            else:
                assert told["variance"] is None


def test_all_other_numeric_columns_are_the_default(federation: Any, drive: Any) -> None:
    tables = {"a": site(federation, np.random.default_rng(1), 20)}
    assert group_by(drive, tables, by=["grade"])["columns"] == list(NUMBERS)


def test_equals_pandas_through_the_whole_federation(federation: Any) -> None:
    random = np.random.default_rng(2)
    tables = {"a": site(federation, random, 90), "b": site(federation, random, 70), "c": site(federation, random, 80)}
    plan = federation.plan("statistics.group_by", {"by": ["city"], "columns": ["wide"]}, tables)
    found = federation.run(plan, tables)["result"]["group_by"]
    whole = concatenate(list(tables.values()))
    wanted = pd.Series(whole["wide"]).groupby(pd.Series(whole["city"])).mean()
    for city in CITIES:
        assert shown(found, "mean", "wide")[(city,)] == pytest.approx(wanted[city], rel=1e-9)
    assert all(body["clipped"] == 0 for body in federation.releases())


# ---------------------------------------------------------------- disclosure control


def planted(federation: Any, sizes: dict[str, int], holes: dict[str, int] | None = None, top: float = 0) -> Any:
    """Groups of *sizes*; of each, so many cells missing; in the last group one value is *top*."""
    city = np.concatenate([np.full(n, name, object) for name, n in sizes.items()])
    x = np.full(len(city), 10.0) + np.arange(len(city)) % 7
    for name, missing in (holes or {}).items():
        x[np.flatnonzero(city == name)[:missing]] = NAN
    if top:
        x[-1] = top
    return federation.table({"city": city, "x": x}, {"city": COLUMNS["city"], "x": {"range": [0, 1e6]}})


@pytest.mark.parametrize("at_gate", [True, False])
def test_a_planted_small_group_is_withheld_and_its_complement_too(federation: Any, drive: Any, at_gate: bool) -> None:
    """By the site's gate, or (where only sums are seen) by the coordinator half."""
    table = planted(federation, {"Nanjing": 3, "Suzhou": 40, "Wuxi": 12, "Yangzhou": 50})
    cohort = Cohort(("a",), table.schema, 0, 5)
    steps = build("statistics.group_by", {"by": ["city"]}).coordinate(cohort)
    driven = drive(steps, {"a": table}, rule=Rule(5) if at_gate else Rule())
    found = driven.result["group_by"]
    assert shown(found, "rows") == {("Nanjing",): None, ("Suzhou",): 40, ("Wuxi",): None, ("Yangzhou",): 50}
    for what in ("count", "sum", "mean", "variance", "std"):
        assert [v is None for v in shown(found, what).values()] == [True, False, True, False]
    assert found["notes"]
    if at_gate:
        told = driven.replies[0]["a"]
        assert told["rows"][:, 0].tolist() == [0, 40, 0, 50, 0]
        for field in ("count", "s1", "s2"):
            assert not told[field][[0, 2]].any()


def test_a_column_does_not_tell_what_its_group_hides(federation: Any, drive: Any) -> None:
    """The complement of the rows and of a column's values may differ: neither shows the other's."""
    table = planted(federation, {"Nanjing": 3, "Suzhou": 40, "Wuxi": 12, "Yangzhou": 13}, {"Yangzhou": 3})
    found = group_by(drive, {"a": table}, Rule(5), by=["city"])
    assert shown(found, "rows")[("Wuxi",)] is None
    assert shown(found, "count")[("Wuxi",)] is None


def test_a_column_with_few_values_is_withheld_in_that_group(federation: Any, drive: Any) -> None:
    table = planted(federation, {"Nanjing": 20, "Suzhou": 40, "Wuxi": 30, "Yangzhou": 50}, {"Wuxi": 28})
    found = group_by(drive, {"a": table}, Rule(5), by=["city"])
    assert list(shown(found, "rows").values()) == [20, 40, 30, 50]
    assert [v is None for v in shown(found, "mean").values()] == [True, False, True, False]


def test_a_dominated_mean_is_withheld(federation: Any, drive: Any) -> None:
    table = planted(federation, {"Nanjing": 20, "Suzhou": 40, "Wuxi": 30, "Yangzhou": 50}, top=9e5)
    found = group_by(drive, {"a": table}, Rule(5, 2, 0.85), by=["city"])
    assert list(shown(found, "rows").values()) == [20, 40, 30, 50]
    assert [v is None for v in shown(found, "mean").values()] == [True, False, False, True]
    assert not any(v is None for v in shown(group_by(drive, {"a": table}, Rule(5), by=["city"]), "mean").values())


def test_sites_withhold_by_their_own_policies(federation: Any) -> None:
    tables = {
        "a": planted(federation, {"Nanjing": 3, "Suzhou": 40, "Wuxi": 12, "Yangzhou": 50}),
        "b": planted(federation, {"Nanjing": 30, "Suzhou": 40, "Wuxi": 12, "Yangzhou": 50}),
    }
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    plan = federation.plan("statistics.group_by", {"by": ["city"]}, tables)
    found = federation.run(plan, tables, {"a": strict})["result"]["group_by"]
    assert list(shown(found, "rows").values()) == [None, 80, None, 100]


def test_slices_of_rows_add_up(federation: Any, drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"a": site(federation, np.random.default_rng(3), 100)}
    whole = group_by(drive, tables, Rule(1, 2, 0.5), by=["city", "grade"], columns=["wide"])
    monkeypatch.setattr("atoll.statistics.group_by.SLICE", 7)
    parts = group_by(drive, tables, Rule(1, 2, 0.5), by=["city", "grade"], columns=["wide"])
    assert any(v is None for v in shown(whole, "sum", "wide").values())
    for what in ("rows", "count", "sum", "variance"):
        for key, value in shown(whole, what, "wide").items():
            assert shown(parts, what, "wide")[key] == (None if value is None else pytest.approx(value, rel=1e-9))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"by": ["text"]}, "text"),
        ({"by": ["wide"]}, "wide"),
        ({"by": ["none"]}, "none"),
        ({"by": ["city"], "columns": ["text"]}, "text"),
        ({"by": ["city"], "columns": ["wide", "none"]}, "none"),
    ],
)
def test_columns_that_do_not_fit_are_refused(federation: Any, params: dict[str, Any], field: str) -> None:
    tables = {"a": site(federation, np.random.default_rng(1), 9)}
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.group_by", params, tables), tables)
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", field)


@pytest.mark.parametrize("center", [np.zeros((9, 5, 1, 1)), np.zeros(1), np.full((5, 1, 1), math.nan)])
def test_crafted_arrays_are_refused(federation: Any, center: Any) -> None:
    made = build("statistics.group_by", {"by": ["city"], "columns": ["wide"]})
    table = site(federation, np.random.default_rng(1), 9)
    desk = type("Desk", (), {"table": table, "progress": lambda *_: None})()
    with pytest.raises(ProtocolError) as caught:
        type(made).handlers["moments"].answer(
            made, desk, Task(TaskId("0", 0, 0, "reply", "a"), {"center": center}, (0,))
        )
    assert caught.value.code == "task.array"
