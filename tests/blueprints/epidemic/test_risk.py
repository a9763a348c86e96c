"""The regional risk's formula, its joint form, and the levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.blueprints.epidemic.risk import LEVELS, Level, joint_risk, level_of, regional_risk, trailing_mean
from atoll.contract.errors import SchemaError


def test_the_formula_by_hand() -> None:
    daily = np.array([0.0, 10.0, 20.0, 30.0])
    risk = regional_risk(daily, 1_000_000, window_days=3, ceiling_per_100k=4.0)
    # means 0, 5, 10, 20 a day; per 100,000: a tenth of it; as a share of 4
    assert risk.tolist() == pytest.approx([0.0, 0.125, 0.25, 0.5])


def test_it_stops_at_one_and_counts_negative_predictions_as_none() -> None:
    risk = regional_risk(np.array([-5.0, 1e9]), 10, window_days=1, ceiling_per_100k=1.0)
    assert risk.tolist() == [0.0, 1.0]


def test_unknown_days_are_left_out_of_the_mean() -> None:
    daily = np.array([math.nan, math.nan, 6.0, math.nan, 2.0])
    assert trailing_mean(daily, 3).tolist()[2:] == [6.0, 6.0, 4.0]
    assert np.isnan(trailing_mean(daily, 3)[:2]).all()


@pytest.mark.parametrize("population", [0.0, -1.0, math.nan, math.inf])
def test_nobody_lives_there(population: float) -> None:
    with pytest.raises(SchemaError) as caught:
        regional_risk(np.ones(3), population, window_days=2, ceiling_per_100k=1.0)
    assert caught.value.code == "epidemic.no-population" and "population column" in caught.value.remedy


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**8)), min_size=1, max_size=6),
)
def test_the_joint_risk_lies_between_those_of_the_regions(regions: list[tuple[float, int]]) -> None:
    risk, people = (np.array(part, np.float64) for part in zip(*regions, strict=True))
    joint = float(joint_risk(np.array([risk @ people]), np.array([people.sum()]))[0])
    assert risk.min() - 1e-9 <= joint <= risk.max() + 1e-9


def test_a_joint_risk_of_nobody_is_unknown() -> None:
    assert np.isnan(joint_risk(np.zeros(2), np.zeros(2))).all()


def test_levels_begin_at_their_borders() -> None:
    told = [level_of(risk) for risk in (0.0, 0.049, 0.05, 0.25, 0.4999, 0.5, 1.0)]
    assert [level.level for level in told if level] == ["green", "green", "yellow", "orange", "orange", "red", "red"]
    assert all(level.action for level in LEVELS)
    assert level_of(math.nan) is None and level_of(0.1, [Level(level="high", at=0.2)]) is None


def test_the_calibration_that_the_docstring_tells() -> None:
    """Zhejiang's largest mean of seven days was 93.7 cases of 64,567,588 residents."""
    rate = regional_risk(np.full(7, 93.7), 64_567_588, window_days=7, ceiling_per_100k=1.0)[-1]
    assert rate == pytest.approx(0.145, abs=5e-4)
    assert regional_risk(np.full(7, 93.7), 64_567_588, window_days=7, ceiling_per_100k=0.2)[-1] == pytest.approx(
        0.73, abs=5e-3
    )
