"""The stability index equals a pooled computation over the same bins, between sites and between periods."""

from __future__ import annotations

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
from atoll.contract.rounds import Gather, Round, real
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "x": {"range": [-5, 5]},
    "grade": {"dtype": "text", "values": ["a", "b", "c", "nobody"]},
    "single": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "day": {"dtype": "date", "role": "time"},
    "free": {"dtype": "text"},
}
NAMES = ["x", "grade", "single", "empty"]
CUT = "2020-03-01"
PERIODS: dict[str, Any] = {"between": "periods", "date": "day", "cut": CUT}


def sites(federation: Any, seed: int, sizes: list[int], undated: float = 0.05) -> dict[str, Any]:
    random, tables = np.random.default_rng(seed), {}
    for i, n in enumerate(sizes):
        day = np.datetime64("2020-01-01") + random.integers(0, 120, n)
        late = day >= np.datetime64(CUT)
        day = day.astype("datetime64[D]")
        day[random.random(n) < undated] = np.datetime64("NaT")
        grade = np.where(random.random(n) < (0.3 if i else 0.6), "a", random.choice(["b", "c"], n)).astype(object)
        grade[random.random(n) < 0.1] = None
        x = (random.normal(0.7 * i, 1, n) + 0.5 * late).clip(-5, 5)
        x[random.random(n) < 0.1] = NAN
        columns = {"x": x, "grade": grade, "single": np.full(n, 3.0), "empty": np.full(n, NAN)}
        tables[f"s{i}"] = federation.table({**columns, "day": day, "free": [None] * n}, COLUMNS)
    return tables


def psi(drive: Any, tables: dict[str, Any], smallest: int = 1, **params: Any) -> Any:
    schema = next(iter(tables.values())).schema
    steps = build("statistics.psi", params).coordinate(Cohort(tuple(tables), schema, 0, smallest))
    return drive(steps, tables, rule=Rule(smallest))


def binned(table: Any, name: str, column: dict[str, Any], rows: Any = slice(None)) -> Any:
    """People of a table in each reported bin, by pandas; [num_bins]."""
    values = pd.Series(table[name][rows])
    if "values" in column:
        return np.array([(values == value).sum() for value in column["values"]])
    return pd.cut(values, column["edges"], include_lowest=True).value_counts(sort=False).to_numpy()


def index_of(expected: Any, actual: Any, s: float = 0.5) -> float:
    if len(expected) < 2 or not expected.sum() or not actual.sum():
        return NAN
    p = (expected + s) / (expected.sum() + s * len(expected))
    q = (actual + s) / (actual.sum() + s * len(actual))
    return float(sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True)))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 20, 90, 400]), min_size=1, max_size=4),
    bins=st.sampled_from([2, 10]),
)
def test_between_sites_equals_the_pooled_computation(
    federation: Any, drive: Any, seed: int, sizes: list[int], bins: int
) -> None:
    tables = sites(federation, seed, sizes)
    found = psi(drive, tables, bins=bins).result["psi"]
    pooled = concatenate(list(tables.values()))
    assert sorted(found["columns"]) == sorted(NAMES)
    for name, column in found["columns"].items():
        if column["note"]:
            assert not pd.Series(pooled[name]).notna().any()
            continue
        whole = binned(pooled, name, column)
        assert column["counts"] == [*whole.tolist(), None]
        wanted = {site: index_of(whole, binned(table, name, column)) for site, table in tables.items()}
        for site, value in wanted.items():
            told = found["own"][site][name]
            assert told is None if math.isnan(value) else told == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert column["sites"] == sum(not math.isnan(v) for v in wanted.values())
        assert column["above"] == {str(m): sum(v > m for v in wanted.values()) for m in (0.1, 0.25)}


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 20, 90, 400]), min_size=1, max_size=4),
    smoothing=st.sampled_from([0.5, 1.0]),
)
def test_between_periods_equals_the_pooled_computation(
    federation: Any, drive: Any, seed: int, sizes: list[int], smoothing: float
) -> None:
    tables = sites(federation, seed, sizes)
    found = psi(drive, tables, smoothing=smoothing, **PERIODS).result["psi"]
    pooled = concatenate(list(tables.values()))
    late = pooled["day"] >= np.datetime64(CUT)
    early = pooled["day"] < np.datetime64(CUT)
    for name, column in found["columns"].items():
        if column["note"].startswith("too few"):
            assert column["psi"] is None
            continue
        before, after = binned(pooled, name, column, early), binned(pooled, name, column, late)
        assert (column["before"], column["after"]) == ([*before.tolist(), None], [*after.tolist(), None])
        wanted = index_of(before, after, smoothing)
        if math.isnan(wanted):
            assert column["psi"] is None
            assert column["note"]
        else:
            assert column["psi"] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_a_numeric_columns_bins_hold_about_equally_many(federation: Any, drive: Any) -> None:
    tables = sites(federation, 1, [3000, 5000])
    column = psi(drive, tables, columns=["x"]).result["psi"]["columns"]["x"]
    counts = np.array(column["counts"][:-1])
    assert len(counts) == 10
    assert np.abs(counts / counts.sum() - 0.1).max() < 0.01


# ---------------------------------------------------------------- small groups


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(0, 120), min_size=1, max_size=3), periods=st.booleans())
def test_small_cells_are_one_bin_and_their_people_are_not_lost(
    federation: Any, drive: Any, seed: int, sizes: list[int], periods: bool
) -> None:
    tables, k = sites(federation, seed, sizes), 5
    driven = psi(drive, tables, k, **(PERIODS if periods else {}))
    for reply in driven.replies:
        for values in reply.values():
            if "counts" in values:
                assert ((values["counts"] == 0) | (values["counts"] >= k)).all()
                assert ((values["total"] == 0) | (values["total"] >= k)).all()
    for name, column in driven.result["psi"]["columns"].items():
        for told in (column[key] for key in ("before", "after", "counts") if key in column):
            assert all(n is None or n == 0 or n >= k for n in told)
            if None in told[:-1] and told[-1] is not None:
                assert told[-1] == 0 or told[-1] >= k
        if not periods and not column["note"]:
            taking = [t for t in tables.values() if pd.Series(t[name]).notna().sum() >= k]
            whole = np.sum([binned(t, name, column) for t in taking], axis=0)
            shown = [i for i, n in enumerate(column["counts"][:-1]) if n is not None]
            assert [column["counts"][i] for i in shown] == whole[shown].tolist()
            assert (column["counts"][-1] or 0) == whole.sum() - whole[shown].sum()


def test_a_site_answers_for_one_set_of_bins_and_one_cohort(federation: Any, drive: Any) -> None:
    tables = sites(federation, 2, [60])
    steps = psi(drive, tables, columns=["x"], bins=3).rounds

    def again(handled: str, **other: Any) -> Any:
        for asked in steps[:-1]:
            yield asked
        asked = next(a for a in steps if a.name == handled)
        yield Round(asked.name, asked.reduce, asked.reply, {**asked.send, **other}, program=asked.program,
                    params=asked.params)  # fmt: skip

    for handled, other in (
        ("bins", {"edges": np.array([[0.1, 0.2]])}),
        ("drift", {"cohort": np.array([[9.0, 1.0, 1.0, -1.0]])}),
        ("own", {"cohort": np.array([[9.0, 1.0, 1.0, -1.0]])}),
        ("bins", {"edges": np.array([[0.1, 0.2, 0.3]])}),
    ):
        with pytest.raises(ProtocolError) as caught:
            drive(again(handled, **other), tables)
        assert caught.value.code == "task.array"


def test_a_sites_own_index_does_not_tell_its_small_bins(federation: Any, drive: Any) -> None:
    """Of two bins whose edge is the coordinator's choice, 2 of 98 are in the one, or 3: the answer is the same."""
    found = []
    for few in (2, 3):
        x = np.concatenate([np.full(few, -4.0), np.linspace(0, 4, 100 - few)])
        table = federation.table({"x": x}, {"x": COLUMNS["x"]})
        for edges, cohort in (([[-1.0]], [[50.0, 50.0, -1.0]]), ([[-1.0]], [[50.0, -1.0, 50.0]])):
            send = {"edges": np.array(edges), "cohort": np.array(cohort)}
            made = build("statistics.psi", {"columns": ["x"], "bins": 2})

            def ask(name: str, reduce: Any, fields: Any, send: Any = send, made: Any = made) -> Any:
                yield Round(name, reduce, fields, send, program=made.name, params={"columns": ["x"], "bins": 2})

            driven = drive(ask("own", Gather(), {"psi": real(1)}), {"a": table}, rule=Rule(5))
            found.append(driven.replies[0]["a"]["psi"][0])
    assert np.isnan(found).all()


def test_small_bins_of_a_site_are_one_bin_of_its_own_index(federation: Any, drive: Any) -> None:
    grades = {"a": {"a": 40, "b": 3, "c": 9}, "b": {"a": 50, "b": 30, "c": 20}}
    tables = {
        site: federation.table({"grade": np.repeat(list(n), list(n.values()))}, {"grade": COLUMNS["grade"]})
        for site, n in grades.items()
    }
    cohort = Cohort(("a", "b"), tables["a"].schema, 0, 1)
    found = drive(build("statistics.psi", {}).coordinate(cohort), tables, rule=Rule(5)).result["psi"]
    told = np.array([n or 0 for n in found["columns"]["grade"]["counts"]])
    whole = np.array([told[0], told[3], told[[1, 2, 4]].sum()])
    assert found["own"]["a"]["grade"] == pytest.approx(index_of(whole, np.array([40, 0, 12])), rel=1e-9)


def test_a_few_rows_without_a_date_are_not_told(federation: Any, drive: Any) -> None:
    day = np.repeat(np.array(["2020-01-05", "2020-04-05"], "datetime64[D]"), 50)
    for undated in (0, 1, 7):
        day[:undated] = np.datetime64("NaT")
        data = {"grade": np.tile(np.array(["a", "b"], object), 50), "day": day}
        table = federation.table(data, {name: COLUMNS[name] for name in data})
        driven = psi(drive, {"a": table}, 5, columns=["grade"], **PERIODS)
        assert driven.replies[0]["a"]["total"].sum() == (0 if undated == 1 else 100)
        assert (driven.result["psi"]["columns"]["grade"]["psi"] is None) == (undated == 1)


def test_a_sites_own_index_leaves_only_where_its_policy_shares_metrics(federation: Any) -> None:
    tables = sites(federation, 3, [300, 200, 250])
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5, "share": ()})
    plan = federation.plan("statistics.psi", {"columns": ["x", "grade"]}, tables)
    found = federation.run(plan, tables, {"s1": strict, "s2": strict})["result"]["psi"]
    assert list(found["own"]) == ["s0"]
    assert found["columns"]["x"]["sites"] == 3
    assert found["columns"]["x"]["above"]["0.25"] >= 1


@pytest.mark.parametrize(
    ("params", "code", "field"),
    [
        ({"columns": ["x", "free"]}, "plan.bad-column", "free"),
        ({"columns": ["none"]}, "plan.bad-column", "none"),
        ({"between": "periods", "date": "x", "cut": CUT}, "plan.bad-column", "x"),
        ({"between": "periods", "cut": CUT}, "plan.bad-column", "date"),
        ({"between": "periods", "date": "day"}, "plan.bad-value", "cut"),
    ],
)
def test_what_cannot_be_compared_is_refused(federation: Any, params: dict[str, Any], code: str, field: str) -> None:
    tables = sites(federation, 1, [9])
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.psi", params, tables), tables)
    assert (caught.value.code, caught.value.field) == (code, field)
