"""Quantiles lie within their stated error of the pooled rows' order statistics, whatever is withheld."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "wide": {"range": [-1e6, 1e6]},
    "zeros": {"range": [0, 100]},
    "count": {"dtype": "integer", "range": [-0.5, 50]},
    "amount": {"dtype": "integer", "range": [0, 10_000_000]},
    "code": {"dtype": "integer", "values": [5, 1, 2]},
    "single": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "one": {"values": [7]},
    "text": {"dtype": "text"},
}
NUMBERS = [name for name in COLUMNS if name != "text"]
PROBABILITIES = (0.0, 0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0)
DECILES = [j / 10 for j in range(1, 10)]


def site(federation: Any, random: np.random.Generator, n: int, shift: float, holes: float = 0.0) -> Any:
    data = {
        "wide": np.clip(random.standard_cauchy(n) * 100 * (1 + shift) + 1000 * shift, -1e6, 1e6),
        "zeros": np.where(random.random(n) < 0.6, 0, random.uniform(0, 100, n)),
        "count": np.minimum(random.poisson(3 + 20 * shift, n), 50).astype(float),
        "amount": np.floor(np.minimum(random.lognormal(9, 3, n), 1e7)),
        "code": random.choice([1.0, 2.0, 5.0], n),
        "single": np.full(n, 3.7),
        "empty": np.full(n, NAN),
        "one": np.full(n, 7.0),
    }
    for values in data.values():
        values[random.random(n) < holes] = NAN
    return federation.table({**data, "text": [None] * n}, COLUMNS)


def sites(federation: Any, seed: int, sizes: list[int], holes: float = 0.0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {f"s{i}": site(federation, random, n, random.random(), holes) for i, n in enumerate(sizes)}


def quantiles(drive: Any, tables: dict[str, Any], smallest: int = 1, **params: Any) -> Any:
    schema = next(iter(tables.values())).schema
    steps = build("statistics.quantiles", params).coordinate(Cohort(tuple(tables), schema, 0, smallest))
    return drive(steps, tables, rule=Rule(smallest))


def order_statistic(values: Any, p: float) -> float:
    """The smallest value with at least p · n values at or below it."""
    return float(np.sort(values)[max(math.ceil(Fraction(str(p)) * len(values)), 1) - 1])


def pooled(tables: dict[str, Any], name: str) -> Any:
    values = concatenate(list(tables.values()))[name]
    return values[~np.isnan(values)]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 2, 7, 40, 150]), min_size=1, max_size=5),
    holes=st.sampled_from([0.0, 0.3, 0.9]),
    smallest=st.sampled_from([1, 3, 5]),
    bins=st.sampled_from([2, 9, 128]),
    error=st.sampled_from([1e-6, 1e-3, 0.05]),
)
def test_every_interval_holds_the_pooled_quantile(
    federation: Any, drive: Any, seed: int, sizes: list[int], holes: float, smallest: int, bins: int, error: float
) -> None:
    tables = sites(federation, seed, sizes, holes)
    driven = quantiles(drive, tables, smallest, probabilities=PROBABILITIES, bins=bins, error=error)
    columns = driven.result["quantiles"]["columns"]
    assert list(columns) == NUMBERS
    for name, found in columns.items():
        values = pooled(tables, name)
        few = [(~np.isnan(table[name])).sum() for table in tables.values()]
        told = sum(n for n in few if n >= smallest)
        if told < max(smallest, 1):
            assert found["values"] == [None] * len(PROBABILITIES)
            assert found["count"] == (None if told else 0)
            continue
        assert found["count"] == told
        assert found["withheld_sites"] == sum(0 < n < smallest for n in few)
        for p, value, off in zip(PROBABILITIES, found["values"], found["errors"], strict=True):
            wanted = order_statistic(values, p)
            low, high = COLUMNS[name].get("range") or (1, 7)
            assert abs(value - wanted) <= off * (1 + 1e-9) + 1e-12 * (high - low)
            if smallest == 1:
                exact = "values" in COLUMNS[name] or (name == "count" and error < 0.02)
                assert off == 0 if exact else off <= error * (high - low) * (1 + 1e-9)
                continue
            inside = (values >= value - off * (1 + 1e-9)) & (values <= value + off * (1 + 1e-9))
            assert inside.sum() >= smallest


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), smallest=st.sampled_from([1, 5]), sizes=st.lists(st.integers(0, 900), min_size=1))
def test_cuts_have_exact_counts_that_every_site_has_told(
    federation: Any, drive: Any, seed: int, smallest: int, sizes: list[int]
) -> None:
    tables = sites(federation, seed, sizes[:4], 0.1)
    driven = quantiles(drive, tables, smallest, probabilities=DECILES, bins=16)
    for c, (name, found) in enumerate(driven.result["quantiles"]["columns"].items()):
        told = [t[name] for t in tables.values() if (~np.isnan(t[name])).sum() >= smallest]
        counts = np.array([[(values <= edge).sum() for edge in found["cuts"]] for values in told])
        assert found["cut_counts"] == (counts.sum(axis=0).tolist() if told else [])
        parts = np.diff([0, *found["cut_counts"], found["count"] or 0])
        assert (parts >= smallest).all() or not found["cuts"]
        for name_of_site, table in tables.items():
            seen = {int(v) for reply in driven.replies for v in reply[name_of_site]["low"][c].ravel()}
            if (~np.isnan(table[name])).sum() >= smallest:
                assert {(table[name] <= edge).sum() for edge in found["cuts"]} <= seen


def test_cuts_are_near_the_quantiles_of_many_rows(federation: Any, drive: Any) -> None:
    tables = sites(federation, 6, [4000, 9000, 2500])
    for smallest in (1, 5):
        found = quantiles(drive, tables, smallest, columns=["wide"], probabilities=DECILES)
        column = found.result["quantiles"]["columns"]["wide"]
        assert np.abs(np.array(column["cut_counts"]) / 15_500 - DECILES).max() < 0.01


def test_equals_numpy_through_the_whole_federation_in_the_stated_rounds(federation: Any) -> None:
    tables = sites(federation, 1, [64, 128, 320], 0.0)
    dyadic = [0.125, 0.25, 0.5, 0.75]
    for bins, rounds in ((128, 4), (8, 8)):  # 10^7 + 1 integers would need more than error asks: 500 001 points do
        params = {"probabilities": dyadic, "bins": bins}
        outcome = federation.run(federation.plan("statistics.quantiles", params, tables), tables)
        found = outcome["result"]["quantiles"]
        assert found["rounds"] <= rounds
        for name, column in found["columns"].items():
            if name != "empty":
                wanted = np.quantile(pooled(tables, name), dyadic, method="inverted_cdf")
                assert np.abs(wanted - column["values"]).max() <= column["error"] * (1 + 1e-9)


def test_the_number_of_rounds_is_known_before(federation: Any, drive: Any) -> None:
    tables = sites(federation, 2, [50, 30])
    for bins, error, rounds in ((1000, 1e-6, 2), (128, 1e-6, 3), (32, 1e-6, 4), (32, 1e-2, 2), (4096, 1e-3, 1)):
        params = {"columns": ["wide"], "bins": bins, "error": error}
        assert build("statistics.quantiles", params).rounds(tables["s0"].schema) == rounds  # type: ignore[attr-defined]
        assert len(quantiles(drive, tables, **params).rounds) == rounds


# ---------------------------------------------------------------- small groups


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 60),
    smallest=st.sampled_from([2, 5]),
    bins=st.sampled_from([3, 40]),
)
def test_no_difference_of_a_sites_answers_counts_few_people(
    federation: Any, drive: Any, seed: int, n: int, smallest: int, bins: int
) -> None:
    """Over all rounds together: a site's numbers are counts at cuts with nobody or k people between them."""
    tables = sites(federation, seed, [n, 300])
    driven = quantiles(drive, tables, smallest, probabilities=PROBABILITIES, bins=bins, columns=["wide", "count"])
    for c in range(2):
        told = {int(v) for reply in driven.replies for k in ("low", "high") for v in np.unique(reply["s0"][k][c])}
        gaps = np.diff(sorted(told))
        assert not len(gaps) or gaps.min() >= smallest


def test_a_large_group_at_one_value_is_told_exactly_and_a_small_one_is_not(federation: Any, drive: Any) -> None:
    columns = {"x": {"dtype": "integer", "range": [0, 1000]}}
    tables = {s: federation.table({"x": [3] * 20 + [777] + [900] * 20}, columns) for s in ("a", "b")}
    column = quantiles(drive, tables, 5, probabilities=[0.25, 0.5, 0.75, 1]).result["quantiles"]["columns"]["x"]
    assert (column["values"][0], column["errors"][0]) == (3, 0)
    assert [value + off for value, off in zip(column["values"], column["errors"], strict=True)][1:] == [900, 900, 1000]
    assert min(column["errors"][1:]) > 50  # so that nobody sees whether the one is at 777 or with the others


def test_extremes_are_never_single_values(federation: Any, drive: Any) -> None:
    tables = {"a": federation.table({"x": [1.0, *range(40, 60), 99.0]}, {"x": {"range": [0, 100]}})}
    column = quantiles(drive, tables, 4, probabilities=[0, 1]).result["quantiles"]["columns"]["x"]
    (low, high), (low_off, high_off) = column["values"], column["errors"]
    assert low + low_off >= 42
    assert high - high_off <= 57


@pytest.mark.parametrize("at_sites", [1, 5])
@pytest.mark.parametrize("top", [[60.0, 60.0, 60.0, 60.001], [61.0, 70.0, 80.0, 99.9], [100.0] * 4])
def test_where_the_extremes_are_changes_nothing_that_is_told(
    federation: Any, drive: Any, at_sites: int, top: list[float]
) -> None:
    """The highest and lowest k − 1 people may be anywhere beyond the others: no answer depends on it."""

    def asked(low: list[float], high: list[float]) -> Any:
        rows = {"x": [*low, *np.linspace(40, 60, 300), *high]}
        tables = {s: federation.table(rows, {"x": {"range": [0, 100]}}) for s in ("a", "b")[:at_sites]}
        schema = tables["a"].schema
        made = build("statistics.quantiles", {"probabilities": [0, 0.001, 0.5, 0.999, 1], "bins": 16})
        return drive(made.coordinate(Cohort(tuple(tables), schema, 0, 5)), tables, rule=Rule(at_sites))

    known, moved = asked([40.0] * 4, [60.0] * 4), asked([100 - x for x in top], top)
    found = moved.result["quantiles"]["columns"]["x"]
    reached = [value + off for value, off in zip(found["values"], found["errors"], strict=True)]
    assert reached[-1] == 100
    assert found["values"][0] - found["errors"][0] == 0
    assert found["errors"][2] < 1
    if at_sites == 5:
        assert moved.result == known.result
        for one, other in zip(known.replies, moved.replies, strict=True):
            for name in one:
                assert all(np.array_equal(one[name][key], other[name][key]) for key in ("low", "high", "count"))


def test_a_range_much_wider_than_the_values_loses_little(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(9)
    tables = {s: federation.table({"x": random.uniform(20, 100, 300)}, {"x": {"range": [0, 1e6]}}) for s in "abc"}
    column = quantiles(drive, tables, 5, probabilities=[0.25, 0.5, 0.75]).result["quantiles"]["columns"]["x"]
    assert max(column["errors"]) < 10
    for p, value, off in zip(column["probabilities"], column["values"], column["errors"], strict=True):
        assert abs(order_statistic(pooled(tables, "x"), p) - value) <= off


def test_sums_alone_lose_nothing_to_a_sites_own_threshold(federation: Any, drive: Any) -> None:
    """Where only sums are seen, sites of one row each give an exact answer; the plan's k still holds."""
    random = np.random.default_rng(4)
    tables = {f"s{i}": site(federation, random, 1, 0.5) for i in range(30)}
    schema = tables["s0"].schema
    steps = build("statistics.quantiles", {"columns": ["count"]}).coordinate(Cohort(tuple(tables), schema, 0, 2))
    column = drive(steps, tables).result["quantiles"]["columns"]["count"]
    values = pooled(tables, "count")
    assert column["count"] == 30
    for p, value, off in zip(column["probabilities"], column["values"], column["errors"], strict=True):
        assert abs(order_statistic(values, p) - value) <= off <= 15


def test_a_strict_policy_lets_the_refined_rounds_through(federation: Any) -> None:
    tables = sites(federation, 3, [400, 3, 700])
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5, "repeats": "refuse"})
    plan = federation.plan("statistics.quantiles", {"columns": ["wide", "count"]}, tables)
    found = federation.run(plan, tables, dict.fromkeys(tables, strict))["result"]["quantiles"]["columns"]
    for name, column in found.items():
        assert (column["count"], column["withheld_sites"]) == (1100, 1)
        for p, value, off in zip(column["probabilities"], column["values"], column["errors"], strict=True):
            assert abs(order_statistic(pooled(tables, name), p) - value) <= off
    assert found["wide"]["errors"][3] < 50  # of a range of two million
    assert found["count"]["errors"][3] == 0


# ---------------------------------------------------------------- dropout and bad questions


def test_the_survivors_quantile_is_found_when_a_site_drops_out(federation: Any, drive: Any) -> None:
    columns = {"x": {"range": [0, 100]}}
    tables = {
        "a": federation.table({"x": np.linspace(60, 70, 300)}, columns),
        "b": federation.table({"x": np.linspace(10, 20, 200)}, columns),
    }
    schema = tables["a"].schema
    steps = build("statistics.quantiles", {"probabilities": [0.5]}).coordinate(Cohort(("a", "b"), schema))
    driven = drive(steps, tables, absent=lambda number: ["a"] if number else [])
    column = driven.result["quantiles"]["columns"]["x"]
    assert column["count"] == 200
    assert abs(column["values"][0] - order_statistic(tables["b"]["x"], 0.5)) <= column["error"] <= 1.0001e-4


@pytest.mark.parametrize("column", ["text", "none"])
def test_columns_without_numbers_are_refused(federation: Any, column: str) -> None:
    tables = sites(federation, 1, [9])
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.quantiles", {"columns": ["wide", column]}, tables), tables)
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", column)


@pytest.mark.parametrize("wrong", [{"probabilities": [1.5]}, {"probabilities": []}, {"error": 0}, {"bins": 1}])
def test_meaningless_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        build("statistics.quantiles", wrong)


def test_a_site_answers_only_at_grid_points_and_to_arrays_of_the_right_shape(federation: Any, drive: Any) -> None:
    tables = sites(federation, 5, [30])
    made = build("statistics.quantiles", {"columns": ["count"], "probabilities": [0.5], "bins": 4})

    def crafted(brackets: Any) -> Any:
        asked = next(made.coordinate(Cohort(("s0",), tables["s0"].schema)))
        yield type(asked)("brackets", asked.reduce, asked.reply, {"brackets": brackets}, program=asked.program,
                          params=asked.params)  # fmt: skip

    with pytest.raises(ProtocolError):
        drive(crafted(np.zeros((2, 1, 2))), tables)
    reply = drive(crafted(np.array([[[-1e9, 1e9]]])), tables).replies[0]["s0"]
    assert set(np.unique(reply["low"])) <= {0, *(int((tables["s0"]["count"] <= v).sum()) for v in range(51))}
