"""Scores of forecasts and alarms, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.blueprints.epidemic.backtest import (
    ALPHAS,
    PRIOR_ERRORS,
    Wave,
    alarm_score,
    coverage,
    interval_score,
    levels,
    log_errors,
    mean_absolute_error,
    mean_difference,
    quantiles_of_errors,
    recall_by_chance,
    root_mean_squared_error,
    waves,
    weighted_interval_score,
)


def test_interval_score_is_width_and_penalty() -> None:
    low, high = np.array([2.0, 2.0, 2.0]), np.array([6.0, 6.0, 6.0])
    found = interval_score(np.array([3.0, 1.0, 8.0]), low, high, 0.5)
    assert found.tolist() == [4.0, 4.0 + 4.0 * 1.0, 4.0 + 4.0 * 2.0]


def test_wis_by_hand() -> None:
    """Bracher et al. 2021, eq. 1: one interval (α = 0.2) and the median; K = 1."""
    quantiles = np.array([[1.0, 3.0, 7.0]])
    inside = weighted_interval_score(np.array([5.0]), quantiles, (0.2,))
    assert inside == pytest.approx([(0.5 * 2 + 0.1 * 6) / 1.5])
    outside = weighted_interval_score(np.array([9.0]), quantiles, (0.2,))
    assert outside == pytest.approx([(0.5 * 6 + 0.1 * (6 + 10 * 2)) / 1.5])


@given(st.lists(st.floats(0, 1e4), min_size=7, max_size=7), st.floats(0, 1e4))
def test_wis_is_twice_the_mean_pinball_loss(values: list[float], truth: float) -> None:
    """Bracher et al. 2021, section 2.2: the same as the mean of 2·pinball over all levels."""
    quantiles, at = np.sort(np.array(values)), levels()
    pinball = np.where(truth >= quantiles, at * (truth - quantiles), (1 - at) * (quantiles - truth))
    assert weighted_interval_score(np.array([truth]), quantiles[None])[0] == pytest.approx(2 * pinball.mean(), abs=1e-8)


def test_wis_of_a_point_is_its_absolute_error() -> None:
    point = np.full((1, 2 * len(ALPHAS) + 1), 4.0)
    assert weighted_interval_score(np.array([10.0]), point) == pytest.approx([6.0])


def test_wis_wants_the_levels_it_is_told_of() -> None:
    with pytest.raises(ValueError, match="quantiles must be"):
        weighted_interval_score(np.zeros(2), np.zeros((2, 3)))


def test_plain_scores() -> None:
    truth, forecast = np.array([1.0, 5.0]), np.array([4.0, 9.0])
    assert mean_absolute_error(truth, forecast) == 3.5
    assert root_mean_squared_error(truth, forecast) == pytest.approx(math.sqrt(12.5))
    assert coverage(truth, np.array([0.0, 6.0]), np.array([1.0, 9.0])) == 0.5
    assert math.isnan(mean_absolute_error(truth[:0], forecast[:0]))


def test_intervals_are_those_of_past_errors() -> None:
    """Errors of a factor of two each way: the 95 % interval is from half to twice, on the scale of 1 + cases."""
    errors = np.log(np.array([0.5, 2.0] * 50))
    told = quantiles_of_errors(np.array([99.0]), errors)
    assert told[0, 0] == pytest.approx(49.0) and told[0, -1] == pytest.approx(199.0)
    assert told[0, len(ALPHAS)] == pytest.approx(99.0)


@given(st.lists(st.floats(-3, 3), max_size=40), st.floats(0, 1e5))
def test_intervals_never_cross_and_are_no_less_than_none(errors: list[float], forecast: float) -> None:
    told = quantiles_of_errors(np.array([forecast]), np.array(errors))
    assert (np.diff(told[0]) >= -1e-9).all() and (told >= 0).all()


def test_a_model_with_no_past_is_not_sure() -> None:
    told = quantiles_of_errors(np.array([50.0]), np.empty(0))
    assert told[0, 0] < 20 and told[0, -1] > 120
    sure = quantiles_of_errors(np.array([50.0]), np.zeros(PRIOR_ERRORS))
    assert sure[0].tolist() == pytest.approx([50.0] * len(levels()))


def test_an_error_of_none_is_of_none() -> None:
    assert log_errors(np.array([7.0]), np.array([7.0])).tolist() == [0.0]
    assert log_errors(np.array([-3.0]), np.array([-1.0])).tolist() == [0.0]


def test_the_bootstrap_knows_that_neighbours_are_alike() -> None:
    draw = np.random.default_rng(1)
    slow = np.repeat(draw.normal(size=20), 7)
    none = np.zeros_like(slow)
    mean, low, high = mean_difference(slow, none, block=7)
    _, short_low, short_high = mean_difference(slow, none, block=1)
    assert mean == pytest.approx(slow.mean()) and low < mean < high
    assert high - low > 1.5 * (short_high - short_low)
    assert mean_difference(slow, none, block=7) == (mean, low, high)
    assert all(math.isnan(x) for x in mean_difference(slow[:0], none[:0]))


def test_waves_are_found_with_hindsight() -> None:
    daily = np.zeros(120)
    daily[30:50] = np.concatenate([np.arange(1, 11), np.arange(10, 0, -1)]) * 5.0
    daily[100:110] = 30
    first, second = waves(daily, threshold=5)
    assert 27 <= first.onset <= 32 and first.peak in (39, 40) and 47 <= first.end <= 52
    assert 97 <= second.onset <= 100
    assert waves(np.zeros(50), threshold=5) == []
    assert len(waves(daily, threshold=5, gap=60)) == 1
    assert len(waves(daily, threshold=np.full(120, 28.0))) == 2


def test_alarms_are_scored_by_wave() -> None:
    alarms = np.zeros(200, bool)
    alarms[[95, 96, 104]] = True  # in time: 15 days before the peak
    alarms[10] = True  # false
    alarms[185] = True  # after the second wave's peak: too late
    score = alarm_score([(alarms, [Wave(100, 110, 120), Wave(175, 180, 190)])])
    assert score.waves == 2 and score.recall == 0.5 and score.lead_days == 15
    outside = 200 - (120 - 86 + 1) - (190 - 161 + 1)
    assert score.false_per_100_days == pytest.approx(100 / outside)


def test_no_waves_no_recall() -> None:
    score = alarm_score([(np.zeros(50, bool), [])])
    assert score.waves == 0 and math.isnan(score.recall) and score.false_per_100_days == 0


def test_an_alarm_that_always_sounds_knows_nothing() -> None:
    wave = Wave(100, 110, 120)
    always = np.arange(200) % 5 == 0
    assert alarm_score([(always, [wave])]).recall == recall_by_chance([(always, [wave])]) == 1.0
    once = np.zeros(200, bool)
    once[104] = True
    assert alarm_score([(once, [wave])]).recall == 1.0
    assert recall_by_chance([(once, [wave])]) < 0.2
    assert math.isnan(recall_by_chance([]))
