"""The score's components equal pandas' on the pooled rows and at each site; units that differ are flagged."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy
from atoll.statistics.duplicates import duplicates
from atoll.statistics.own_quality import FLOOR

COLUMNS: dict[str, dict[str, Any]] = {
    "weight": {"range": [0, 200_000], "unit": "kg"},
    "age": {"dtype": "integer", "range": [0, 120]},
    "flat": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "sick": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "town": {"dtype": "text", "values": ["east", "west"]},
    "words": {"dtype": "text"},
    "day": {"dtype": "date", "role": "time"},
}


def site(federation: Any, random: np.random.Generator, n: int, *, factor: float = 1.0, holes: float = 0.1) -> Any:
    weight, age = random.normal(70, 12, n).clip(1, 190) * factor, random.integers(0, 100, n).astype(float)
    weight[random.random(n) < 0.02] = 150_000
    words = np.array([f"w{i}" for i in range(5)] + [None], object)[random.integers(0, 6, n)]
    day = np.datetime64("2026-06-01") + random.integers(0, 150, n)
    data = {"weight": weight, "age": age, "flat": np.full(n, 2.0), "empty": np.full(n, np.nan)}
    data |= {"sick": (random.random(n) < 0.2).astype(float)}
    for values in data.values():
        values[random.random(n) < holes] = np.nan
    day[random.random(n) < holes] = np.datetime64("NaT")
    town = random.choice(np.array(["east", "west", None], object), n)
    rows = {**data, "town": town, "words": words, "day": day}
    again = np.append(np.arange(n), random.integers(0, n, n // 10)) if n else np.arange(0)
    return federation.table({name: np.asarray(values)[again] for name, values in rows.items()}, COLUMNS)


def sites(federation: Any, seed: int, sizes: list[int], **more: Any) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {f"s{i}": site(federation, random, n, **more) for i, n in enumerate(sizes)}


def quality(drive: Any, tables: dict[str, Any], smallest: int = 1, **params: Any) -> Any:
    schema = next(iter(tables.values())).schema
    steps = build("statistics.quality", params).coordinate(Cohort(tuple(tables), schema, 0, smallest))
    driven = drive(steps, tables, rule=Rule(smallest))
    return driven.result["quality"], driven


def frame(*tables: Any) -> pd.DataFrame:
    rows = concatenate(list(tables))
    return pd.DataFrame({name: rows[name] for name in COLUMNS})


def wanted(rows: pd.DataFrame, repeats: int, quartiles: Any, newest: str) -> dict[str, float]:
    """Each component by pandas; repeats are counted site by site."""
    plausible = []
    for name, (lower, median, upper) in zip(("weight", "age"), quartiles, strict=True):
        cells = rows[name].dropna()
        plausible.append(1 - ((cells - median).abs() > 4 * (upper - lower) / 1.349).mean())
    share = rows["sick"].value_counts(normalize=True)
    end = pd.Period(newest).end_time.normalize() + pd.Timedelta(days=1)
    days = rows["day"].dropna()
    return {
        "completeness": float(rows.notna().mean().mean()),
        "uniqueness": 1 - repeats / len(rows),
        "plausibility": float(np.mean(plausible)),
        "balance": float(-(share * np.log2(share)).sum()),
        "timeliness": float(((days >= end - pd.Timedelta(days=30)) & (days < end)).mean()),
    }


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.sampled_from([0, 1, 40, 200]), min_size=0, max_size=3))
def test_equals_pandas_on_pooled_rows_and_at_each_site(
    federation: Any, drive: Any, seed: int, sizes: list[int]
) -> None:
    tables = sites(federation, seed, [*sizes, 300])
    result, driven = quality(drive, tables)
    quartiles = driven.rounds[-1].send["quartiles"][:2]
    whole = frame(*tables.values())
    repeats = {name: int(frame(table).duplicated().sum()) for name, table in tables.items()}
    expected = wanted(whole, sum(repeats.values()), quartiles, result["newest_month"])
    assert (result["rows"], result["note"]) == (len(whole), "")
    assert result["components"] == pytest.approx(expected, rel=1e-9)
    assert result["score"] == pytest.approx(math.prod(max(v, FLOOR) for v in expected.values()) ** 0.2, rel=1e-9)
    assert result["newest_month"] == str(whole["day"].max())[:7]
    assert result["columns"]["flat"]["plausibility"] is None
    last = f"s{len(sizes)}"
    own = wanted(frame(tables[last]), repeats[last], quartiles, result["newest_month"])
    assert result["sites"][last]["components"] == pytest.approx(own, rel=1e-9)
    for name, table in tables.items():
        assert (result["sites"][name]["score"] is None) == (len(table) == 0)


def test_weights_are_of_the_geometric_mean(federation: Any, drive: Any) -> None:
    tables = sites(federation, 1, [200, 100])
    weights = {"completeness": 3.0, "balance": 1.0, "uniqueness": 0, "plausibility": 0, "timeliness": 0}
    result, _ = quality(drive, tables, weights=weights)
    parts = result["components"]
    assert result["score"] == pytest.approx((parts["completeness"] ** 3 * parts["balance"]) ** 0.25, rel=1e-9)
    assert quality(drive, tables, weights=dict.fromkeys(weights, 0.0))[0]["score"] is None


@pytest.mark.parametrize(("factor", "power"), [(1000.0, 3), (0.1, -1), (1.0, 0)])
def test_a_site_in_another_unit_raises_a_flag(federation: Any, drive: Any, factor: float, power: int) -> None:
    random = np.random.default_rng(2)
    tables = {f"s{i}": site(federation, random, 100) for i in range(2)}
    tables["odd"] = site(federation, random, 100, factor=factor)
    result, _ = quality(drive, tables)
    assert result["columns"]["weight"]["unit_flags"] == ({str(power): 1} if power else {})
    assert result["sites"]["odd"]["unit_flags"] == ({"weight": power} if power else {})
    assert all(not result["sites"][name]["unit_flags"] for name in ("s0", "s1"))


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, -0.0, 1.5, math.nan]), st.sampled_from(["a", "b", None])), max_size=30
    )
)
def test_duplicates_are_those_of_pandas(federation: Any, rows: list[tuple[float, Any]]) -> None:
    x, words = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows], object)
    columns = {"x": {"range": [0, 2]}, "words": {"dtype": "text"}}
    table = federation.table({"x": x, "words": words}, columns)
    assert duplicates(table) == pd.DataFrame({"x": x, "words": words}).duplicated().sum()


def test_all_rows_alike(federation: Any, drive: Any) -> None:
    table = federation.table({"age": np.full(50, 7.0)}, {"age": COLUMNS["age"]})
    result, _ = quality(drive, {"a": table})
    assert result["components"]["uniqueness"] == pytest.approx(1 / 50)
    assert [result["components"][name] for name in ("plausibility", "balance", "timeliness")] == [None] * 3


# ---------------------------------------------------------------- disclosure


def test_small_counts_are_withheld_and_said_to_be(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(3)
    age = random.integers(20, 60, 300).astype(float)
    age[:2] = np.nan
    sick = (np.arange(300) < 3).astype(float)
    columns = {name: COLUMNS[name] for name in ("age", "sick")}
    result, driven = quality(drive, {"a": federation.table({"age": age, "sick": sick}, columns)}, 5, own=False)
    reply = driven.replies[-1]["a"]
    assert (reply["cells"][0].tolist(), reply["cells_withheld"][0].tolist()) == ([0, 0], [1, 1])
    assert not reply["parts"][0].any()
    assert not reply["labels"].any()
    assert result["columns"]["age"]["completeness"] is None
    assert result["components"]["balance"] is None
    assert "completeness" in result["note"]
    assert "balance" in result["note"]


def test_no_total_tells_a_small_count_by_subtracting(federation: Any, drive: Any) -> None:
    """One label, one date and two numbers are missing; two of 100 rows are in a month, and two are outliers."""
    random = np.random.default_rng(8)
    day = np.repeat(np.array(["2026-01-05", "2026-02-05", "2026-03-05"], "datetime64[D]"), (50, 2, 48))
    sick, age = np.tile([0.0, 1.0], 50), random.integers(20, 60, 100).astype(float)
    weight, again = random.normal(70, 5, 100), random.normal(70, 5, 100)
    weight[:2], again[:2] = 150_000, np.nan
    data = {"weight": weight, "age": age, "sick": sick, "day": day, "flat": again}
    columns = {**{name: COLUMNS[name] for name in ("weight", "age", "sick", "day")}, "flat": COLUMNS["weight"]}
    for change in ("none", "undated", "unlabelled"):
        data["day"] = np.where((np.arange(100) < 1) & (change == "undated"), np.datetime64("NaT"), day)
        data["sick"] = np.where((np.arange(100) < 1) & (change == "unlabelled"), np.nan, sick)
        _, driven = quality(drive, {"a": federation.table(data, columns)}, 5)
        for replies in driven.replies:
            reply = replies["a"]
            for whole, parts in (("timed", "months"), ("cells", "parts"), ("labelled", "labels"), ("", "repeats")):
                if parts in reply:
                    for total, split in pairwise([100, *([reply[whole]] if whole else []), reply[parts]]):
                        left = total - split.sum(axis=-1)
                        assert (split >= 5)[split > 0].all()
                        assert (left[split.any(axis=-1)] >= 5)[left[split.any(axis=-1)] > 0].all()
            if "months" in reply:
                assert reply["months"].any() == (change != "undated")
            if "labels" in reply:
                assert reply["labels"].any() == (change != "unlabelled")


def test_a_site_scores_itself_by_counts_that_it_may_tell(federation: Any) -> None:
    age = np.arange(100.0) % 60
    age[0] = np.nan
    day = np.repeat(np.datetime64("2026-05-03"), 100)
    table = federation.table({"age": age, "day": day}, {name: COLUMNS[name] for name in ("age", "day")})
    policy = Policy.sandbox().model_copy(update={"min_group_size": 5})
    plan = federation.plan("statistics.quality", {}, {"a": table}, run={"min_group_size": 5})
    result = federation.run(plan, {"a": table}, {"a": policy})["result"]["quality"]
    own = result["sites"]["a"]
    assert (own["completeness"], own["plausibility"]) == ({"age": None, "day": 1.0}, {"age": None})
    assert result["columns"]["age"]["completeness"] is None


def test_the_newest_month_is_not_one_persons(federation: Any, drive: Any) -> None:
    day = np.repeat(np.datetime64("2026-05-03"), 40)
    day[:11] = np.datetime64("2026-04-03")
    day[0] = np.datetime64("2099-12-24")
    table = federation.table({"day": day}, {"day": COLUMNS["day"]})
    assert quality(drive, {"a": table}, 5)[0]["newest_month"] == "2026-05"


def test_only_sites_that_share_their_metrics_are_scored_alone(federation: Any) -> None:
    tables = sites(federation, 4, [200, 150, 90])
    shy = Policy.sandbox().model_copy(update={"share": ()})
    outcome = federation.run(federation.plan("statistics.quality", {}, tables), tables, {"s1": shy})
    result = outcome["result"]["quality"]
    assert sorted(result["sites"]) == ["s0", "s2"]
    assert result["rows"] == sum(map(len, tables.values()))


def test_a_site_judges_by_one_set_of_quartiles(federation: Any) -> None:
    table = sites(federation, 5, [50])["s0"]
    desk = type("Site", (), {"table": table, "state": {}, "min_group_size": 1, "progress": lambda *_: None})()
    asked = build("statistics.quality", {})

    def task(low: float) -> Any:
        arrays = {"quartiles": np.tile([low, 50.0, 60.0], (4, 1)), "newest": np.zeros(1)}
        return type("Asked", (), {"take": lambda _, name, shape: arrays[name]})()

    first = asked.counts(desk, task(40.0))
    assert asked.counts(desk, task(40.0))["parts"].tolist() == first["parts"].tolist()
    with pytest.raises(ProtocolError) as caught:
        asked.counts(desk, task(40.1))
    assert caught.value.code == "task.changed"


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"columns": ["none"]}, "none"),
        ({"label": "age"}, "age"),
        ({"time": "age"}, "age"),
        ({"weights": {"speed": 1}}, "speed"),
    ],
)
def test_what_does_not_fit_is_refused(federation: Any, drive: Any, params: dict[str, Any], field: str) -> None:
    with pytest.raises(PlanError) as caught:
        quality(drive, sites(federation, 6, [20]), **params)
    assert caught.value.field == field
