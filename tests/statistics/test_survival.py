"""Kaplan–Meier and log-rank equal statsmodels on the pooled rows, and no single event's time is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.duration.survfunc import SurvfuncRight, survdiff

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

COLUMNS: dict[str, dict[str, Any]] = {
    "days": {"dtype": "integer", "range": [0, 60]},
    "years": {"range": [0, 10]},
    "visit": {"dtype": "integer", "values": [7, 1, 3]},
    "event": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "arm": {"dtype": "text", "values": ["old", "new", "none", "other"]},
    "note": {"dtype": "text"},
}
ARMS = ["old", "new", "other"]


def site(federation: Any, random: np.random.Generator, n: int, arms: list[str], holes: float = 0.05) -> Any:
    arm = random.choice(arms, n).astype(object)
    years = np.minimum(random.exponential(np.where(arm == "new", 4.0, 2.5)), 10)
    event = (random.random(n) < 0.7).astype(float)
    data = {"days": np.floor(years * 6), "years": years, "visit": random.choice([1.0, 3.0, 7.0], n), "event": event}
    for values in data.values():
        values[random.random(n) < holes] = np.nan
    arm[random.random(n) < holes] = None
    return federation.table({**data, "arm": arm, "note": [None] * n}, COLUMNS)


def sites(federation: Any, seed: int, sizes: list[int], holes: float = 0.05) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    made = {f"s{i}": site(federation, random, n, ARMS, holes) for i, n in enumerate(sizes)}
    return {**made, "far": site(federation, random, max(sizes), ["old"], holes)}


def survive(drive: Any, tables: dict[str, Any], smallest: int = 1, **params: Any) -> Any:
    schema = next(iter(tables.values())).schema
    asked = {"duration": "days", "event": "event", **params}
    steps = build("statistics.survival", asked).coordinate(Cohort(tuple(tables), schema, 0, smallest))
    driven = drive(steps, tables, rule=Rule(smallest))
    assert len(driven.rounds) == 1
    return driven.result["survival"], driven


def frame(tables: dict[str, Any], duration: str, *more: str) -> pd.DataFrame:
    rows = concatenate(list(tables.values()))
    return pd.DataFrame({"time": rows[duration], **{n: rows[n] for n in ("event", *more)}}).dropna()


def rounded(values: Any, times: Any) -> Any:
    return np.asarray(times)[np.minimum(np.searchsorted(times, values), len(times) - 1)]


def check(curve: dict[str, Any], rows: pd.DataFrame) -> None:
    """The curve is statsmodels' for durations rounded up to its times."""
    assert (curve["rows"], curve["events"]) == (len(rows), rows["event"].sum())
    wanted = SurvfuncRight(rounded(rows["time"], curve["times"]), rows["event"])
    at = np.searchsorted(curve["times"], wanted.surv_times)
    np.testing.assert_array_equal(curve["at_risk"][at], wanted.n_risk)
    np.testing.assert_array_equal(curve["events_at"][at], wanted.n_events)
    assert curve["events_at"].sum() == wanted.n_events.sum()
    np.testing.assert_allclose(curve["survival"][at], wanted.surv_prob, rtol=1e-9, atol=1e-12)
    defined = wanted.surv_prob > 1e-12
    np.testing.assert_allclose(
        np.sqrt(curve["variance"][at][defined]), np.asarray(wanted.surv_prob_se)[defined], rtol=1e-9, atol=1e-12
    )
    below = np.flatnonzero(np.asarray(wanted.surv_prob) <= 0.5 + 1e-12)
    assert curve["median"] == (wanted.surv_times[below[0]] if len(below) else None)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 8, 60, 300]), min_size=1, max_size=4),
    holes=st.sampled_from([0.0, 0.3]),
    duration=st.sampled_from(["days", "visit"]),
)
def test_equals_statsmodels_where_each_time_has_an_interval(
    federation: Any, drive: Any, seed: int, sizes: list[int], holes: float, duration: str
) -> None:
    tables = sites(federation, seed, [*sizes, 20], holes)
    result, _ = survive(drive, tables, duration=duration)
    rows, curve = frame(tables, duration), result["curves"]["all"]
    assert result["exact"]
    assert result["logrank"] is None
    assert result["left_out"] == sum(map(len, tables.values())) - len(rows)
    check(curve, rows)
    np.testing.assert_allclose(curve["survival_lowest"], curve["survival"], rtol=1e-12)
    inner = (curve["survival"] < 1) & (curve["survival"] > 1e-12)
    assert (curve["low"][inner] < curve["survival"][inner]).all()
    assert (curve["high"][inner] > curve["survival"][inner]).all()


@pytest.mark.parametrize("arms", [ARMS, ["old", "new"]])
def test_log_rank_equals_statsmodels(federation: Any, drive: Any, arms: list[str]) -> None:
    random = np.random.default_rng(1)
    tables = {name: site(federation, random, n, arms) for name, n in (("a", 90), ("b", 210), ("c", 0), ("d", 1))}
    result, _ = survive(drive, tables, group="arm")
    rows = frame(tables, "days", "arm")
    square, p = survdiff(rows["time"], rows["event"], rows["arm"].to_numpy(dtype=str))
    found = result["logrank"]
    assert found["chi_square"] == pytest.approx(square, rel=1e-9)
    assert found["p_value"] == pytest.approx(p, rel=1e-9)
    assert (found["degrees_of_freedom"], sorted(found["groups"])) == (len(arms) - 1, sorted(arms))
    for arm in arms:
        check(result["curves"][arm], rows[rows["arm"] == arm])
    assert result["curves"]["none"]["rows"] == 0
    assert (result["curves"]["none"]["survival"] == 1).all()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    intervals=st.sampled_from([1, 3, 20, 400]),
    smallest=st.sampled_from([1, 4]),
)
def test_a_coarse_grid_rounds_up_and_bounds_the_curve(
    federation: Any, drive: Any, seed: int, intervals: int, smallest: int
) -> None:
    tables = sites(federation, seed, [80, 45], holes=0.0)
    result, _ = survive(drive, tables, smallest, duration="years", intervals=intervals)
    rows, curve = frame(tables, "years"), result["curves"]["all"]
    assert not result["exact"]
    check(curve, rows)
    exact = SurvfuncRight(rows["time"], rows["event"])
    place = np.searchsorted(exact.surv_times, curve["times"], "right")
    wanted = np.append(1.0, exact.surv_prob)[place]
    assert (curve["survival_lowest"] <= wanted + 1e-12).all()
    assert (wanted <= curve["survival"] + 1e-12).all()


def test_confidence_limits_are_those_of_the_log_log_scale(federation: Any, drive: Any) -> None:
    """Kalbfleisch & Prentice's limits at S = 0.6, standard error 0.1 on three of five rows: worked by hand."""
    table = federation.table(
        {"days": [1, 2, 3, 3, 3], "event": [1, 1, 0, 0, 0]}, {k: COLUMNS[k] for k in ("days", "event")}
    )
    curve = survive(drive, {"a": table}, confidence=0.9)[0]["curves"]["all"]
    theta = 1.6448536269514722 * np.sqrt(1 / 20 + 1 / 12) / np.log(0.6)
    assert curve["low"][2] == pytest.approx(0.6 ** np.exp(-theta))
    assert curve["high"][2] == pytest.approx(0.6 ** np.exp(theta))
    assert curve["median"] is None
    assert np.isnan(curve["low"][0])


def test_given_edges_and_the_rest_of_the_range(federation: Any, drive: Any) -> None:
    tables = sites(federation, 3, [200])
    result, _ = survive(drive, tables, edges=[5, 10, 30])
    assert result["curves"]["all"]["times"].tolist() == [5, 10, 30, 60]
    check(result["curves"]["all"], frame(tables, "days"))


def test_through_the_whole_federation(federation: Any) -> None:
    tables = sites(federation, 4, [200, 150])
    plan = federation.plan("statistics.survival", {"duration": "days", "event": "event", "group": "arm"}, tables)
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    rows = frame(tables, "days", "arm")
    for policies in ({}, dict.fromkeys(tables, strict)):
        result = federation.run(plan, tables, policies)["result"]["survival"]
        for arm in ("old",):
            check(result["curves"][arm], rows[rows["arm"] == arm])


# ---------------------------------------------------------------- small groups


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_no_small_group_is_told(federation: Any, drive: Any, seed: int) -> None:
    tables = sites(federation, seed, [150, 90, 12])
    result, driven = survive(drive, tables, 5, group="arm")
    for reply in driven.replies[0].values():
        for g in range(4):
            told = reply["told"][g] == 1
            assert not reply["below"][g][:, ~told].any()
            parts = np.diff(reply["below"][g][:, told], axis=1, prepend=0, append=reply["people"][g][:, None])
            assert ((parts == 0) | (parts >= 5)).all()
    rows = frame(tables, "days", "arm")
    for arm, curve in result["curves"].items():
        if "times" in curve:
            for key in ("events_at", "censored_at"):
                assert ((curve[key] == 0) | (curve[key] >= 5)).all()
            if curve["withheld_sites"] == 0 and curve["rows"]:
                check(curve, rows[rows["arm"] == arm])
    if result["logrank"]["chi_square"] is not None and all(c["withheld_sites"] == 0 for c in result["curves"].values()):
        assert "merged" in result["logrank"]["note"]


def test_a_site_or_cohort_with_too_few_events_is_left_out(federation: Any, drive: Any) -> None:
    few = {"days": np.arange(1.0, 31), "event": (np.arange(30) < 3).astype(float)}
    many = {"days": np.arange(60.0), "event": (np.arange(60) % 2).astype(float)}
    columns = {k: COLUMNS[k] for k in ("days", "event")}
    tables = {"few": federation.table(few, columns), "many": federation.table(many, columns)}
    curve = survive(drive, tables, 5)[0]["curves"]["all"]
    assert (curve["withheld_sites"], curve["rows"]) == (1, 60)
    schema = tables["few"].schema
    asked = build("statistics.survival", {"duration": "days", "event": "event"})
    seen = drive(asked.coordinate(Cohort(("few",), schema, 0, 5)), {"few": tables["few"]})  # sums are all it sees
    assert "times" not in seen.result["survival"]["curves"]["all"]
    assert "withheld" in seen.result["survival"]["curves"]["all"]["note"]


@pytest.mark.parametrize("at_sites", [1, 5])
def test_the_longest_and_the_shortest_duration_are_not_told(federation: Any, drive: Any, at_sites: int) -> None:
    days, event = np.random.default_rng(2).integers(8, 30, 300).astype(float), (np.arange(300) % 2).astype(float)
    told = []
    for low, high in ((1.0, 57.0), (6.0, 41.0)):
        days[0], days[1] = low, high
        table = federation.table({"days": days, "event": event}, {k: COLUMNS[k] for k in ("days", "event")})
        steps = build("statistics.survival", {"duration": "days", "event": "event"}).coordinate(
            Cohort(("a",), table.schema, 0, 5)
        )
        driven = drive(steps, {"a": table}, rule=Rule(at_sites))
        curve = driven.result["survival"]["curves"]["all"]
        left = curve["events_at"] + curve["censored_at"]
        assert left[0] >= 5
        assert left[-1] >= 5
        assert curve["times"][-1] == 60
        assert curve["times"][-2] < 30
        check(curve, frame({"a": table}, "days"))
        told.append((curve["times"].tolist(), left.tolist()))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"duration": "note"}, "plan.bad-column"),
        ({"event": "visit"}, "plan.bad-column"),
        ({"group": "days"}, "plan.bad-column"),
        ({"group": "gone"}, "plan.bad-column"),
        ({"edges": [3, 2]}, "plan.bad-edges"),
        ({"edges": [3, 99]}, "plan.bad-edges"),
    ],
)
def test_what_does_not_fit_is_refused(federation: Any, drive: Any, params: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError) as caught:
        survive(drive, sites(federation, 5, [20]), **params)
    assert caught.value.code == code
