"""Alarms: EARS and CUSUM by hand, multi-point triggers, and how early alarms are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.blueprints.epidemic.alarms import AlarmRule, alarms, deviations, from_none, lead_times, multi_point, since


def test_c2_by_hand() -> None:
    cases = np.array([1, 2, 3, 4, 5, 6, 7, 50, 50, 14], float)
    base = cases[:7]
    expected = (14 - base.mean()) / base.std(ddof=1)
    assert deviations(cases)[-1] == pytest.approx(expected)
    assert np.isnan(deviations(cases)[:9]).all()
    assert alarms(cases)[-1] == (expected > 3)


def test_c3_adds_up_three_days() -> None:
    rule = AlarmRule(method="c3", min_deviation=1.0, lag=2)
    cases = np.array([0] * 12 + [2, 2, 2], float)
    # C2 = 2 on each of the three days, whose baselines are all 0: 1 + 1 + 1 > 2 on the third
    assert alarms(cases, rule)[-3:].tolist() == [False, False, True]
    assert not alarms(cases, AlarmRule(min_deviation=1.0)).any()


def test_cusum_remembers_and_begins_anew() -> None:
    rule = AlarmRule(method="cusum", min_deviation=1.0, drift=1.0, limit=4.0)
    cases = np.array([0] * 12 + [3, 3, 3, 3], float)  # C2 = 3 each, but the baseline rises on the fourth day
    assert alarms(cases, rule)[12:15].tolist() == [False, False, True]  # 2, 4, 6
    cases[13] = math.nan
    assert not alarms(cases, rule)[12:15].any()


def test_after_a_week_without_cases_two_alarm_and_one_does_not() -> None:
    quiet = np.zeros(20)
    for number, expected in ((1, False), (2, True)):
        quiet[-1] = number
        assert alarms(quiet)[-1] == expected


@pytest.mark.parametrize("method", ["c2", "c3", "cusum"])
def test_a_series_of_zeros_never_alarms(method: str) -> None:
    assert not alarms(np.zeros((40, 3)), AlarmRule(method=method)).any()  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 200), min_size=12, max_size=60), st.sampled_from(["c2", "c3", "cusum"]))
def test_cities_side_by_side_are_as_one_by_one(values: list[int], method: str) -> None:
    one = np.array(values, float)
    rule = AlarmRule(method=method)  # type: ignore[arg-type]
    both = alarms(np.column_stack([one, one[::-1]]), rule)
    assert np.array_equal(both[:, 0], alarms(one, rule)) and np.array_equal(both[:, 1], alarms(one[::-1], rule))


def test_unknown_days_neither_alarm_nor_stop_alarms() -> None:
    cases = np.zeros(30)
    cases[[3, 8, 20]] = math.nan
    cases[29] = 5
    assert np.flatnonzero(alarms(cases)).tolist() == [29]
    cases[20:27] = math.nan  # the whole baseline
    assert not alarms(cases).any()


def test_the_first_report_of_a_place_alarms() -> None:
    cases = np.full((12, 3), math.nan)
    cases[10:, 0], cases[11, 1] = (2, 0), 3
    assert not alarms(cases).any()
    begun = from_none(cases)
    assert begun[:10, 0].tolist() == [0.0] * 10 and np.isnan(begun[:, 2]).all()
    assert np.argwhere(alarms(begun)).tolist() == [[10, 0], [11, 1]]
    cases[5, 1] = 0.0
    assert np.isnan(from_none(cases)[6:11, 1]).all()  # a gap stays one


def test_multi_point_triggers() -> None:
    region = np.array([False, True, False])
    cities = np.array([[True, True, False], [False] * 3, [True] * 3])
    assert multi_point(region, cities, AlarmRule(cities=3)).tolist() == [False, True, True]
    assert multi_point(region, cities, AlarmRule(cities=2)).tolist() == [True, True, True]
    assert multi_point(region, cities, AlarmRule(cities=0)).tolist() == region.tolist()


def test_since_when() -> None:
    assert since(np.array([True, False, True, True])) == 2
    assert since(np.array([True, True])) == 0
    assert since(np.array([True, False])) is None and since(np.array([], bool)) is None


def test_lead_times_by_hand() -> None:
    flags = np.zeros(60, bool)
    flags[[3, 18, 45]] = True
    assert lead_times(flags, [20, 43, 59], before=5, after=3) == [2, -2, None]
    assert lead_times(flags, [2], before=5, after=3) == [-1]
